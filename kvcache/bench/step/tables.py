"""Tables of decode steps. Needs rich."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvcache.bench.harness.contest import RAW
from kvcache.bench.harness.tables import new_table, page, short_number

if TYPE_CHECKING:
    from .report import StepReport, StepTiming


def step_tables(report: StepReport) -> RenderableType:
    """Return timings and absent contestants."""
    return page(report, _timings(report), skipped=report.skipped)


def _timings(report: StepReport) -> Table:
    """Make a table of a column pair per place: microseconds, and their ratio to the base."""
    shape = f"{report.layers} layers of {report.heads} heads x {report.head_dim}"
    title = f"us per decode step, {shape}, by sequences x tokens"
    base = _base(report)
    columns = [
        (f"{sequences} x {tokens:,}", f"x {base.partition(' ')[0]}")
        for sequences, tokens in report.places
    ]
    table = new_table(title, "", *(column for pair in columns for column in pair))
    for backend, dtype in report.groups:
        table.add_row(Text(f"{backend} {dtype}", style="bold"))
        for name, timings in report.contestants(backend, dtype).items():
            table.add_row(*_row(report, name, timings), style="dim" if name == base else "")
        table.add_section()
    return table


def _base(report: StepReport) -> str:
    """Return the standard of comparison: raw, or attention alone."""
    names = {timing.contestant for timing in report.timings}
    return next((name for name in report.against if name in names), RAW)


def _row(report: StepReport, name: str, timings: list[StepTiming]) -> Iterator[str]:
    base = _base(report)
    yield f" {name}"
    by_place = {timing.place: timing for timing in timings}
    for place in report.places:
        yield short_number(by_place[place].us) if place in by_place else ""
        ratio = report.ratio(by_place[place], base) if place in by_place and name != base else None
        yield "" if ratio is None else short_number(ratio)
