"""Common parts of all tables: layout, targets, circumstances. Needs rich."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .report import Judged, MeasuredTiming, Report, Skipped


def page(
    report: Report[MeasuredTiming],
    timings: Table,
    held_where: str = "",
    skipped: Sequence[Skipped] = (),
) -> RenderableType:
    """Return `timings`, then the targets, absent contestants and circumstances of `report`.

    held_where: ends the sentence that counts the targets that hold.
    """
    parts: list[RenderableType] = []
    if report.timings:
        parts += [timings, ""]
    if report.verdicts:
        parts += [_verdicts(report.verdicts, held_where), ""]
    return Group(*parts, *_missing(skipped), *_circumstances(report))


def new_table(title: str, *columns: str) -> Table:
    """Return a table of names, on the left, and numbers; narrow, for terminals of 80 columns."""
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    # Not wrapped, in any column: half a number in a second line would be misread.
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def short_number(value: float) -> str:
    """Write `value` in six characters at most."""
    if abs(value) >= 10_000:
        return f"{value / 1000:,.0f}k"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _verdicts(verdicts: Sequence[Judged], held_where: str) -> Table:
    """Make a table of the targets under their headings, and count the ones kept."""
    held = sum(verdict.passed for verdict in verdicts)
    title = f"Targets: {held} of {len(verdicts)} hold{held_where}"
    table = new_table(title, "", "bound", "is", "at", "")
    for heading, group in groupby(verdicts, lambda verdict: verdict.heading):
        table.add_row(Text(heading, style="bold"))
        for verdict in group:
            mark = Text("pass", "green") if verdict.passed else Text("MISS", "bold red")
            measured = short_number(verdict.measured)
            table.add_row(f" {verdict.rule}", verdict.bound, measured, verdict.at, mark)
        table.add_section()
    return table


def _missing(skipped: Sequence[Skipped]) -> Iterator[Text]:
    """Name the absent contestants, all dtypes with the same reason in one line."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for skip in skipped:
        reasons.setdefault((skip.contestant, skip.backend, skip.reason), []).append(skip.dtype)
    for (contestant, backend, reason), dtypes in reasons.items():
        place = f"{backend} {', '.join(dtypes)}"
        yield Text(f"Not measured: {contestant or 'everyone'} on {place}: {reason}.", style="dim")


def _circumstances(report: Report[MeasuredTiming]) -> Iterator[Text]:
    libraries = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield Text(f"Medians of {report.rounds} interleaved rounds. {libraries}.", style="dim")
    yield Text(report.machine, style="dim")
