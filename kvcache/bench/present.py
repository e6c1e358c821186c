"""A report for people who read it in a terminal. Needs rich."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .contest import MEMMOVE, OURS, RAW

if TYPE_CHECKING:
    from .report import AppendReport, Timing
    from .targets import Verdict


def tables(report: AppendReport) -> RenderableType:
    """Timings, targets, and whoever was skipped."""
    parts: list[RenderableType] = []
    if report.timings:
        parts += [_timings(report), ""]
    if report.verdicts:
        parts += [_verdicts(report.verdicts), ""]
    return Group(*parts, *_notes(report))


def _table(title: str, *columns: str) -> Table:
    """A table of names, on the left, and numbers; narrow, for terminals of 80 columns."""
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _timings(report: AppendReport) -> Table:
    shape = f"{report.batch} x {report.heads} heads x {report.head_dim}"
    title = f"us to append one token of K and of V ({shape}), by capacity"
    capacities = [f"{capacity:,}" for capacity in report.capacities]
    table = _table(title, "", *capacities, "x raw", "x memmove")
    for backend, dtype in report.groups:
        table.add_row(Text(f"{backend} {dtype}", style="bold"))
        for name, timings in report.contestants(backend, dtype).items():
            table.add_row(*_row(report, name, timings), style="" if name in OURS else "dim")
        table.add_section()
    return table


def _row(report: AppendReport, name: str, timings: list[Timing]) -> Iterator[str]:
    yield f" {name}"
    at = {timing.capacity: timing for timing in timings}
    for capacity in report.capacities:
        yield figure(at[capacity].us) if capacity in at else ""
    for other in (RAW, MEMMOVE):
        ratios = [report.ratio(timing, other) for timing in timings]
        yield "" if name == other else _range([ratio for ratio in ratios if ratio is not None])


def _range(ratios: list[float]) -> str:
    """From the least to the greatest, once if they read the same."""
    if not ratios:
        return ""
    low, high = figure(min(ratios)), figure(max(ratios))
    return low if low == high else f"{low} - {high}"


def figure(value: float) -> str:
    """`value` in six characters."""
    if abs(value) >= 10_000:
        return f"{value / 1000:,.0f}k"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _verdicts(verdicts: list[Verdict]) -> Table:
    held = sum(verdict.passed for verdict in verdicts)
    title = f"Targets: {held} of {len(verdicts)} hold, at the capacity where they are furthest off"
    table = _table(title, "", "bound", "is", "at", "")
    for (backend, dtype), group in groupby(
        verdicts, lambda verdict: (verdict.backend, verdict.dtype)
    ):
        table.add_row(Text(f"{backend} {dtype}", style="bold"))
        for verdict in group:
            mark = Text("pass", "green") if verdict.passed else Text("MISS", "bold red")
            measured = figure(verdict.measured)
            at = f"{verdict.capacity:,}"
            table.add_row(f" {verdict.rule}", verdict.bound, measured, at, mark)
        table.add_section()
    return table


def _notes(report: AppendReport) -> Iterator[Text]:
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for skip in report.skipped:
        reasons.setdefault((skip.contestant, skip.backend, skip.reason), []).append(skip.dtype)
    for (contestant, backend, reason), dtypes in reasons.items():
        where = f"{backend} {', '.join(dtypes)}"
        yield Text(f"Not measured: {contestant or 'everyone'} on {where}: {reason}.", style="dim")
    libraries = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield Text(f"Medians of {report.rounds} interleaved rounds. {libraries}.", style="dim")
    yield Text(report.machine, style="dim")
