"""Tables of lookups and evictions. Needs rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table

from kvcache.bench.harness.tables import new_table, page, short_number

if TYPE_CHECKING:
    from .report import PrefixReport


def prefix_tables(report: PrefixReport) -> RenderableType:
    """Return evictions, lookups and targets."""
    return Group(_evictions(report), "", page(report, _lookups(report)))


def _lookups(report: PrefixReport) -> Table:
    title = f"us per query or sequence, among {report.sequences:,} sequences"
    table = new_table(title, "", "tokens", "us", "M tokens/s")
    for timing in report.lookups:
        figures = short_number(timing.us), short_number(timing.rate)
        table.add_row(timing.name, f"{timing.tokens:,}", *figures)
    return table


def _evictions(report: PrefixReport) -> Table:
    title = f"us to evict one of {report.spans:,} spans, until half are left"
    table = new_table(title, "", "mean", "longest")
    for timing in report.evictions:
        longest = short_number(timing.longest_us or 0.0)
        table.add_row(timing.name, short_number(timing.us), longest)
    return table
