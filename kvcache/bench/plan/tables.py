"""Tables of planning. Needs rich."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvcache.bench.harness.tables import new_table, page, short_number

if TYPE_CHECKING:
    from .report import Load, PlanReport


def plan_tables(report: PlanReport) -> RenderableType:
    """Return timings and targets."""
    return page(report, _timings(report))


def _timings(report: PlanReport) -> Table:
    title = "us to plan a pass that adds one token to each sequence (Batch, start_forward)"
    table = new_table(title, "", "no mask", "10x cells", "mask", "10x cells")
    for load in report.loads:
        table.add_row(Text(load.label, style="bold"))
        for window in dict.fromkeys(t.window for t in report.timings if t.load == load):
            table.add_row(*_row(report, load, window))
        table.add_section()
    return table


def _row(report: PlanReport, load: Load, window: int | None) -> Iterator[str]:
    timings = [t for t in report.timings if (t.load, t.window) == (load, window)]
    yield f" {timings[0].visibility}"
    # In the order of the columns: mask last, and within either the large pool last.
    for timing in sorted(timings, key=lambda timing: (timing.mask, timing.pool)):
        yield short_number(timing.us)
