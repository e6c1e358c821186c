"""The figure of a comparison of appends. Needs matplotlib."""

from __future__ import annotations

import os
from itertools import product
from typing import TYPE_CHECKING

from kvcache.bench.harness.contest import RAW
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

from .case import MEMMOVE, OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .report import AppendReport

# Ours are the blues and green.
_FIXED = dict(zip((MEMMOVE, RAW, *OURS), (GREY, BLACK, SKY, BLUE, GREEN), strict=True))


def draw(report: AppendReport, path: str | os.PathLike[str]) -> None:
    """Write cost over capacity to `path`: a column per backend, a row per dtype."""
    if not report.timings:
        raise ValueError("a plot needs timings; this report has none.")
    backends, dtypes = (list(dict.fromkeys(names)) for names in zip(*report.groups, strict=True))
    figure = new_figure((3.1 * len(backends) + 1.6, 3.9 * len(dtypes) + 1.2))
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
    add_legend(figure, colors, columns=min(5, 1 + len(backends)))
    figure.savefig(path, dpi=150)


def _colors(report: AppendReport) -> dict[str, str]:
    """Return a color for every contestant of the report."""
    names = dict.fromkeys(timing.contestant for timing in report.timings)
    peers = (name for name in names if name not in _FIXED)
    others = {name: OTHER_COLORS[i % len(OTHER_COLORS)] for i, name in enumerate(peers)}
    return {name: color for name, color in {**_FIXED, **others}.items() if name in names}


def _panel(
    panel: Axes, report: AppendReport, backend: str, dtype: str, colors: dict[str, str]
) -> None:
    """Draw the medians of every contestant, and the range between the quartiles behind them."""
    from matplotlib.ticker import LogLocator

    order = list(colors)
    for name, timings in report.contestants(backend, dtype).items():
        low, high = zip(*(timing.quartiles for timing in timings), strict=True)
        capacities = [timing.capacity for timing in timings]
        panel.plot(
            capacities,
            [timing.us for timing in timings],
            color=colors[name],
            marker=marker(order.index(name)),
            markersize=MARKER_SIZE,
            linewidth=LINE_WIDTH,
        )
        panel.fill_between(capacities, low, high, color=colors[name], alpha=0.12, linewidth=0)
    panel.set(xscale="log", yscale="log", title=f"{backend}, {dtype}")
    panel.set_xticks(report.capacities, [_short(capacity) for capacity in report.capacities])
    panel.minorticks_off()
    bottom, top = panel.get_ylim()
    if top / bottom < 500:
        # Powers of ten alone would leave one or two labels.
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter("{x:,.10g}")
    add_grid(panel)


def _short(tokens: int) -> str:
    """Write `tokens`, in units of 1024 where it is a multiple."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
