"""Tables of a comparison of appends. Needs rich."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvcache.bench.harness.contest import RAW
from kvcache.bench.harness.tables import new_table, page, short_number

from .case import MEMMOVE, OURS

if TYPE_CHECKING:
    from .report import AppendReport, Timing


def append_tables(report: AppendReport) -> RenderableType:
    """Return timings, targets and absent contestants."""
    held_where = ", at the capacity where they are furthest off"
    return page(report, _timings(report), held_where, report.skipped)


def _timings(report: AppendReport) -> Table:
    """Make a table of a row per contestant, backend by backend; only rows of ours are bright."""
    shape = f"{report.batch} x {report.heads} heads x {report.head_dim}"
    title = f"us to append one token of K and of V ({shape}), by capacity"
    capacities = [f"{capacity:,}" for capacity in report.capacities]
    table = new_table(title, "", *capacities, "x raw", "x memmove")
    for backend, dtype in report.groups:
        table.add_row(Text(f"{backend} {dtype}", style="bold"))
        for name, timings in report.contestants(backend, dtype).items():
            table.add_row(*_row(report, name, timings), style="" if name in OURS else "dim")
        table.add_section()
    return table


def _row(report: AppendReport, name: str, timings: list[Timing]) -> Iterator[str]:
    yield f" {name}"
    by_capacity = {timing.capacity: timing for timing in timings}
    for capacity in report.capacities:
        yield short_number(by_capacity[capacity].us) if capacity in by_capacity else ""
    for other in (RAW, MEMMOVE):
        ratios = [report.ratio(timing, other) for timing in timings]
        yield "" if name == other else _range([ratio for ratio in ratios if ratio is not None])


def _range(ratios: list[float]) -> str:
    """Write the least and the greatest of `ratios`, once if they read the same."""
    if not ratios:
        return ""
    low, high = short_number(min(ratios)), short_number(max(ratios))
    return low if low == high else f"{low} - {high}"
