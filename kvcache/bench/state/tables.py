"""Tables of the cost of recurrent states. Needs rich."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvcache.bench.harness.tables import new_table, page, short_number

from .case import BASES

if TYPE_CHECKING:
    from .report import StateReport, StateTiming


def state_tables(report: StateReport) -> RenderableType:
    """Return timings, targets and absent contestants."""
    held_where = ", at the number of sequences where they are furthest off"
    return page(report, _timings(report), held_where, report.skipped)


def _timings(report: StateReport) -> Table:
    """Make a table of a column pair per place: microseconds, and their ratio to the raw calls."""
    state = (
        f"{report.heads} x {report.head_dim} x {report.head_dim} "
        f"and {report.channels:,} x {report.kernel - 1}"
    )
    title = f"us per step of {report.layers} layers with states of {state}, by sequences"
    columns = [(f"{sequences}", "x raw") for sequences in report.places]
    table = new_table(title, "", *(column for pair in columns for column in pair))
    for backend, dtype in report.groups:
        table.add_row(Text(f"{backend} {dtype}", style="bold"))
        for name, timings in report.contestants(backend, dtype).items():
            is_base = name in BASES.values()
            table.add_row(*_row(report, name, timings), style="dim" if is_base else "")
        table.add_section()
    return table


def _row(report: StateReport, name: str, timings: list[StateTiming]) -> Iterator[str]:
    yield f" {name}"
    by_place = {timing.place: timing for timing in timings}
    for place in report.places:
        timing = by_place.get(place)
        yield "" if timing is None else short_number(timing.us)
        base = BASES.get(name)
        ratio = report.ratio(timing, base) if timing and base else None
        yield "" if ratio is None else short_number(ratio)
