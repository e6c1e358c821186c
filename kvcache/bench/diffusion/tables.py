"""Tables of recipes. Needs rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvcache.bench.harness.tables import new_table, page, short_number

if TYPE_CHECKING:
    from .report import DiffusionReport


def diffusion_tables(report: DiffusionReport) -> RenderableType:
    """Return every recipe, targets, and absent contestants."""
    return page(report, _recipes(report), skipped=report.skipped)


def _recipes(report: DiffusionReport) -> Table:
    """Make a table of a row per recipe, place by place; rows of peers are dim."""
    title = (
        f"Sampling {report.samples} at once in {report.steps} steps: work skipped, time saved,\n"
        "error against no cache, how far samples are off what they should show"
    )
    table = new_table(title, "", "", "skip %", "saved %", "error", "off", "ms")
    for place in report.places:
        table.add_row(Text(place, style="bold"))
        for timing in report.at(place):
            quality = "" if timing.quality is None else f"{timing.quality:.3f}"
            table.add_row(
                f" {timing.family}",
                timing.setting,
                str(round(100 * timing.skipped)),
                str(round(100 * report.saved(timing))),
                f"{timing.error:.2g}",
                quality,
                short_number(timing.us / 1000),
                style="" if timing.ours else "dim",
            )
        table.add_section()
    return table
