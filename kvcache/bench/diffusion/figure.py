"""The figure of recipes. Needs matplotlib."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvcache.bench.harness.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LINE_WIDTH,
    MARKER_SIZE,
    OTHER_COLORS,
    SKY,
    add_grid,
    add_legend,
    marker,
    new_figure,
)
from kvcache.storage.lengths import ceil_div

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .report import DiffusionReport, DiffusionTiming

SOME = 0.005
"""Least share of the work skipped that is drawn: below it there is nothing to see."""
_PALETTE = (SKY, BLUE, GREEN, BLACK, GREY, *OTHER_COLORS)


def draw_diffusion(report: DiffusionReport, path: str | os.PathLike[str]) -> None:
    """Write error over time saved to `path`: a panel per place, a line per family of recipes."""
    if not report.timings:
        raise ValueError("a plot needs timings; this report has none.")
    columns = min(2, len(report.places))
    rows = ceil_div(len(report.places), columns)
    figure = new_figure((5.2 * columns, 3.9 * rows + 1.1))
    panels = figure.subplots(rows, columns, squeeze=False)
    families = [*dict.fromkeys(t.family for t in report.timings if t.skipped > SOME)]
    colors = {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(families)}
    for place, panel in zip(report.places, panels.flat, strict=False):
        for name in families:
            line = [t for t in report.at(place) if t.family == name and t.skipped > SOME]
            _draw_line(panel, report, line, colors[name], families.index(name))
        panel.set(yscale="log", title=place, xlabel="time saved, %", ylabel="relative error")
        add_grid(panel)
    for panel in panels.flat[len(report.places) :]:
        panel.set_visible(False)
    add_legend(figure, colors, columns=2 * columns)
    figure.savefig(path, dpi=150)


def _draw_line(
    panel: Axes, report: DiffusionReport, line: list[DiffusionTiming], color: str, number: int
) -> None:
    """Draw one family, its settings ordered by the time they save; dashed if not all are ours."""
    ordered = sorted(line, key=report.saved)
    panel.plot(
        [100 * report.saved(timing) for timing in ordered],
        [timing.error for timing in ordered],
        color=color,
        marker=marker(number),
        markersize=MARKER_SIZE,
        linewidth=LINE_WIDTH,
        linestyle="-" if all(timing.ours for timing in line) else "--",
    )
