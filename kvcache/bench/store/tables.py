"""Tables of the throughput of stores. Needs rich."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvcache.bench.harness.tables import new_table, page, short_number

from .case import BASES, OPERATIONS, size_name

if TYPE_CHECKING:
    from .report import StoreReport


def store_tables(report: StoreReport) -> RenderableType:
    """Return timings, targets and absent contestants."""
    return page(report, _timings(report), skipped=report.skipped)


def _timings(report: StoreReport) -> Table:
    """Make a table of a row per contestant, under the size of its values."""
    columns = [(f"{operation} ms", "GB/s", "x ceiling") for operation in OPERATIONS]
    title = "Values into and out of stores, and their ceilings"
    table = new_table(title, "", *(column for group in columns for column in group))
    for nbytes in report.sizes:
        table.add_row(Text(size_name(nbytes), style="bold"))
        for name in report.contestants:
            style = "" if name in BASES else "dim"
            table.add_row(f" {name}", *_row(report, nbytes, name), style=style)
        table.add_section()
    return table


def _row(report: StoreReport, nbytes: int, name: str) -> Iterator[str]:
    for operation in OPERATIONS:
        timing = report.find(operation, nbytes, name)
        yield "" if timing is None else short_number(timing.us / 1e3)
        yield "" if timing is None else short_number(timing.gigabytes_per_second)
        share = report.share(operation, nbytes, name) if name in BASES else None
        yield "" if share is None else short_number(share)
