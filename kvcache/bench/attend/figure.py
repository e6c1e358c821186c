"""The figure of attention of a decode pass. Needs matplotlib."""

from __future__ import annotations

import os
from itertools import product
from typing import TYPE_CHECKING

from kvcache.bench.harness.figures import (
    BLACK,
    BLUE,
    LINE_WIDTH,
    MARKER_SIZE,
    OTHER_COLORS,
    add_grid,
    add_legend,
    marker,
    new_figure,
)

from .case import ATTEND, IDEAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .report import AttendReport


def draw(report: AttendReport, path: str | os.PathLike[str]) -> None:
    """Write cost over sequences to `path`: a column per load, a row per backend and dtype."""
    if not report.timings:
        raise ValueError("a plot needs timings; this report has none.")
    loads = list(dict.fromkeys(load for load, _ in report.places))
    figure = new_figure((2.6 * len(loads) + 1.2, 2.7 * len(report.groups) + 1.2))
    panels = figure.subplots(len(report.groups), len(loads), sharex=True, squeeze=False)
    colors = _colors(report)
    for ((backend, dtype), load), panel in zip(
        product(report.groups, loads), panels.flat, strict=True
    ):
        _panel(panel, report, (backend, dtype), load, colors)
    for panel in panels[:, 0]:
        panel.set_ylabel("us per pass")
    for panel in panels[-1]:
        panel.set_xlabel("sequences")
    figure.suptitle(f"Attention of a decode pass, one layer, {report.tokens:,} tokens")
    add_legend(figure, colors, columns=len(colors))
    figure.savefig(path, dpi=150)


def _colors(report: AttendReport) -> dict[str, str]:
    """Return a color for every contestant of the report."""
    fixed = {IDEAL: BLACK, ATTEND: BLUE}
    names = dict.fromkeys(timing.contestant for timing in report.timings)
    rest = (name for name in names if name not in fixed)
    others = {name: OTHER_COLORS[i % len(OTHER_COLORS)] for i, name in enumerate(rest)}
    return {name: color for name, color in {**fixed, **others}.items() if name in names}


def _panel(
    panel: Axes,
    report: AttendReport,
    group: tuple[str, str],
    load: str,
    colors: dict[str, str],
) -> None:
    """Draw the medians of every contestant with one load."""
    order = list(colors)
    for name, timings in report.contestants(*group).items():
        drawn = [timing for timing in timings if timing.load == load]
        panel.plot(
            [timing.sequences for timing in drawn],
            [timing.us for timing in drawn],
            color=colors[name],
            marker=marker(order.index(name)),
            markersize=MARKER_SIZE,
            linewidth=LINE_WIDTH,
        )
    counts = sorted({timing.sequences for timing in report.timings})
    panel.set(xscale="log", yscale="log", title=f"{group[0]} {group[1]}\n{load}")
    panel.set_xticks(counts, [str(count) for count in counts])
    panel.minorticks_off()
    add_grid(panel)
