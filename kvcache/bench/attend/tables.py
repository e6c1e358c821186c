"""Tables of attention of a decode pass. Needs rich."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvcache.bench.harness.tables import new_table, page, short_number

from .case import IDEAL

if TYPE_CHECKING:
    from .report import AttendReport


def attend_tables(report: AttendReport) -> RenderableType:
    """Return timings, targets and absent contestants."""
    held_where = ", at the number of sequences where they are furthest off"
    return page(report, _timings(report), held_where, report.skipped)


def _timings(report: AttendReport) -> Table:
    """Make a table of a row per load and number of sequences, and a column per contestant."""
    heads = f"{report.query_heads} over {report.heads} heads x {report.head_dim}"
    title = (
        f"Attention of a decode pass ({heads}, {report.tokens:,} tokens): multiples of the ideal"
    )
    names = dict.fromkeys(timing.contestant for timing in report.timings)
    others = [name for name in names if name != IDEAL]
    table = new_table(title, "sequences", f"{IDEAL}, us", *others)
    for backend, dtype in report.groups:
        table.add_row(Text(f"{backend} {dtype}", style="bold"))
        for load, sequences in report.places:
            place = load, sequences
            if report.find(backend, dtype, place, IDEAL) is not None:
                cells = _row(report, backend, dtype, place, others)
                table.add_row(f" {load}, {sequences}", *cells)
        table.add_section()
    return table


def _row(
    report: AttendReport, backend: str, dtype: str, place: tuple[str, int], others: list[str]
) -> Iterator[str]:
    """Yield the microseconds of the ideal, and the multiple of each of the others."""
    timing = report.find(backend, dtype, place, IDEAL)
    yield "" if timing is None else short_number(timing.us)
    for name in others:
        timing = report.find(backend, dtype, place, name)
        ratio = None if timing is None else report.ratio(timing, IDEAL)
        yield "" if ratio is None else short_number(ratio)
