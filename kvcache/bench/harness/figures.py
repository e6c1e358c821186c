"""A report as a figure. Needs matplotlib."""

from __future__ import annotations

import os
from itertools import product
from typing import TYPE_CHECKING, Any

from .contest import MEMMOVE, OURS, RAW

if TYPE_CHECKING:
    from kvcache.bench.append.report import AppendReport
    from kvcache.bench.diffusion.report import DiffusionReport, DiffusionTiming

# Okabe and Ito's palette, which any eye can tell apart. Ours are the blues and green.
_FIXED = dict(
    zip((MEMMOVE, RAW, *OURS), ("#999999", "#000000", "#56b4e9", "#0072b2", "#009e73"), strict=True)
)
_OTHERS = ("#d55e00", "#e69f00", "#cc79a7", "#a6761d", "#b2a800")
_MARKERS = "osvD^P"
SOME = 0.005
"""Share of the work from which on there is something to draw."""


def draw(report: AppendReport, path: str | os.PathLike[str]) -> None:
    """Write cost over capacity to `path`: a column per backend, a row per dtype."""
    if not report.timings:
        raise ValueError("a plot needs timings; this report has none.")
    Figure = _matplotlib()
    backends, dtypes = (list(dict.fromkeys(names)) for names in zip(*report.groups, strict=True))
    figure = Figure(
        figsize=(3.1 * len(backends) + 1.6, 3.9 * len(dtypes) + 1.2), layout="constrained"
    )
    panels = figure.subplots(len(dtypes), len(backends), sharex=True, squeeze=False)
    colors = _colors(report)
    for (dtype, backend), panel in zip(product(dtypes, backends), panels.flat, strict=True):
        _panel(panel, report, backend, dtype, colors)
    for panel in panels[:, 0]:
        panel.set_ylabel("us per step")
    for panel in panels[-1]:
        panel.set_xlabel("capacity in tokens")
    figure.suptitle(
        f"Appending one token: {report.batch} x {report.heads} heads x {report.head_dim}, K and V"
    )
    _legend(figure, colors, columns=min(5, 1 + len(backends)))
    figure.savefig(path, dpi=150)


def draw_diffusion(report: DiffusionReport, path: str | os.PathLike[str]) -> None:
    """Write error over time saved to `path`: a panel per place, a line per family of recipes."""
    if not report.timings:
        raise ValueError("a plot needs timings; this report has none.")
    Figure = _matplotlib()
    columns = min(2, len(report.places))
    rows = -(-len(report.places) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.9 * rows + 1.1), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    families = [*dict.fromkeys(t.family for t in report.timings if t.skipped > SOME)]
    palette = ("#56b4e9", "#0072b2", "#009e73", "#000000", "#999999", *_OTHERS)
    colors = {name: palette[i % len(palette)] for i, name in enumerate(families)}
    for place, panel in zip(report.places, panels.flat, strict=False):
        for name in families:
            line = [t for t in report.at(place) if t.family == name and t.skipped > SOME]
            _saving_line(panel, report, line, colors[name], families.index(name))
        panel.set(yscale="log", title=place, xlabel="time saved, %", ylabel="relative error")
        panel.grid(visible=True, color="#dddddd", linewidth=0.6)
    for panel in panels.flat[len(report.places) :]:
        panel.set_visible(False)
    _legend(figure, colors, columns=2 * columns)
    figure.savefig(path, dpi=150)


def _saving_line(
    panel: Any, report: DiffusionReport, line: list[DiffusionTiming], color: str, number: int
) -> None:
    ordered = sorted(line, key=report.saved)
    panel.plot(
        [100 * report.saved(timing) for timing in ordered],
        [timing.error for timing in ordered],
        color=color,
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=4,
        linewidth=1.3,
        linestyle="-" if all(timing.ours for timing in line) else "--",
    )


def _matplotlib() -> Any:
    """Its figures."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"a plot needs matplotlib ({error}). pip install 'kvcache[bench]'"
        ) from error
    return Figure


def _colors(report: AppendReport) -> dict[str, str]:
    """A color for every contestant of the report."""
    names = dict.fromkeys(timing.contestant for timing in report.timings)
    peers = (name for name in names if name not in _FIXED)
    others = {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(peers)}
    return {name: color for name, color in {**_FIXED, **others}.items() if name in names}


def _panel(
    panel: Any, report: AppendReport, backend: str, dtype: str, colors: dict[str, str]
) -> None:
    order = list(colors)
    for name, timings in report.contestants(backend, dtype).items():
        low, high = zip(*(timing.quartiles for timing in timings), strict=True)
        capacities = [timing.capacity for timing in timings]
        marker = _MARKERS[order.index(name) % len(_MARKERS)]
        costs = [timing.us for timing in timings]
        panel.plot(
            capacities, costs, color=colors[name], marker=marker, markersize=4, linewidth=1.3
        )
        panel.fill_between(capacities, low, high, color=colors[name], alpha=0.12, linewidth=0)
    panel.set(xscale="log", yscale="log", title=f"{backend}, {dtype}")
    panel.set_xticks(report.capacities, [_short(capacity) for capacity in report.capacities])
    panel.minorticks_off()
    low, high = panel.get_ylim()
    if high / low < 500:
        panel.yaxis.get_major_locator().set_params(subs=(1.0, 2.0, 5.0))
    panel.yaxis.set_major_formatter("{x:,.10g}")
    panel.grid(visible=True, color="#dddddd", linewidth=0.6)


def _short(tokens: int) -> str:
    """`tokens`, in units of 1024 where it is a multiple."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _legend(figure: Any, colors: dict[str, str], columns: int) -> None:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=color, marker=_MARKERS[i % len(_MARKERS)], markersize=4, label=name)
        for i, (name, color) in enumerate(colors.items())
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False)
