"""A report for people who read it in a terminal. Needs rich."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvcache.bench.plan.report import BOUNDS

from .contest import MEMMOVE, OURS, RAW

if TYPE_CHECKING:
    from kvcache.bench.append.report import AppendReport, Timing
    from kvcache.bench.diffusion.report import DiffusionReport
    from kvcache.bench.plan.report import Load, PlanReport
    from kvcache.bench.prefix.report import PrefixReport
    from kvcache.bench.step.report import StepReport, StepTiming

    from .report import Judged, Report, Skipped


def append_tables(report: AppendReport) -> RenderableType:
    """Timings, targets, and whoever was skipped."""
    where = ", at the capacity where they are furthest off"
    return _page(report, _timings(report), where, report.skipped)


def plan_tables(report: PlanReport) -> RenderableType:
    """Timings and targets."""
    return _page(report, _plans(report))


def prefix_tables(report: PrefixReport) -> RenderableType:
    """Lookups, evictions and targets."""
    return Group(_evictions(report), "", _page(report, _lookups(report)))


def step_tables(report: StepReport) -> RenderableType:
    """Timings, and whoever was skipped."""
    return _page(report, _steps(report), skipped=report.skipped)


def diffusion_tables(report: DiffusionReport) -> RenderableType:
    """Every recipe, targets, and whoever was skipped."""
    return _page(report, _recipes(report), skipped=report.skipped)


def _page(
    report: Report, timings: Table, where: str = "", skipped: Sequence[Skipped] = ()
) -> RenderableType:
    """Timings, targets that hold `where` said, whoever was skipped, and the circumstances."""
    parts: list[RenderableType] = []
    if report.timings:
        parts += [timings, ""]
    if report.verdicts:
        parts += [_verdicts(report.verdicts, where), ""]
    return Group(*parts, *_missing(skipped), *_circumstances(report))


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


def _plans(report: PlanReport) -> Table:
    title = "us to plan a pass that adds one token to each sequence (Batch, start_forward)"
    columns = ["no mask", "10x cells", "mask", "10x cells", "Go, mask"]
    table = _table(title, "", *columns)
    for load in report.loads:
        table.add_row(Text(load.label, style="bold"))
        for window in dict.fromkeys(t.window for t in report.timings if t.load == load):
            table.add_row(*_plan_row(report, load, window))
        table.add_section()
    return table


def _plan_row(report: PlanReport, load: Load, window: int | None) -> Iterator[str]:
    timings = [t for t in report.timings if (t.load, t.window) == (load, window)]
    yield f" {timings[0].visibility}"
    for timing in sorted(timings, key=lambda timing: (timing.mask, timing.pool)):
        yield figure(timing.us)
    yield figure(BOUNDS[load].go) if load in BOUNDS and window is None else ""


def _lookups(report: PrefixReport) -> Table:
    title = f"us per query or sequence, among {report.sequences:,} sequences"
    table = _table(title, "", "tokens", "us", "M tokens/s")
    for timing in report.lookups:
        table.add_row(timing.name, f"{timing.tokens:,}", figure(timing.us), figure(timing.rate))
    return table


def _evictions(report: PrefixReport) -> Table:
    title = f"us to evict one of {report.spans:,} spans, until half are left"
    table = _table(title, "", "mean", "longest")
    for timing in report.evictions:
        table.add_row(timing.name, figure(timing.us), figure(timing.longest_us or 0.0))
    return table


def _steps(report: StepReport) -> Table:
    shape = f"{report.layers} layers of {report.heads} heads x {report.head_dim}"
    title = f"us per decode step, {shape}, by sequences x tokens"
    base = _first_of(report)
    columns = [
        (f"{sequences} x {tokens:,}", f"x {base.partition(' ')[0]}")
        for sequences, tokens in report.places
    ]
    table = _table(title, "", *(column for pair in columns for column in pair))
    for backend, dtype in report.groups:
        table.add_row(Text(f"{backend} {dtype}", style="bold"))
        for name, timings in report.contestants(backend, dtype).items():
            table.add_row(*_step_row(report, name, timings), style="dim" if name == base else "")
        table.add_section()
    return table


def _first_of(report: StepReport) -> str:
    """What the others are compared with."""
    names = {timing.contestant for timing in report.timings}
    return next((name for name in report.against if name in names), RAW)


def _step_row(report: StepReport, name: str, timings: list[StepTiming]) -> Iterator[str]:
    base = _first_of(report)
    yield f" {name}"
    at = {timing.place: timing for timing in timings}
    for place in report.places:
        yield figure(at[place].us) if place in at else ""
        ratio = report.ratio(at[place], base) if place in at and name != base else None
        yield "" if ratio is None else figure(ratio)


def _recipes(report: DiffusionReport) -> Table:
    title = (
        f"Sampling {report.samples} at once in {report.steps} steps: work skipped, time saved,\n"
        "error against no cache, how far samples are off what they should show"
    )
    table = _table(title, "", "", "skip %", "saved %", "error", "off", "ms")
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
                figure(timing.us / 1000),
                style="" if timing.ours else "dim",
            )
        table.add_section()
    return table


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


def _verdicts(verdicts: Sequence[Judged], where: str) -> Table:
    held = sum(verdict.passed for verdict in verdicts)
    title = f"Targets: {held} of {len(verdicts)} hold{where}"
    table = _table(title, "", "bound", "is", "at", "")
    for heading, group in groupby(verdicts, lambda verdict: verdict.heading):
        table.add_row(Text(heading, style="bold"))
        for verdict in group:
            mark = Text("pass", "green") if verdict.passed else Text("MISS", "bold red")
            measured = figure(verdict.measured)
            table.add_row(f" {verdict.rule}", verdict.bound, measured, verdict.at, mark)
        table.add_section()
    return table


def _missing(skipped: Sequence[Skipped]) -> Iterator[Text]:
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for skip in skipped:
        reasons.setdefault((skip.contestant, skip.backend, skip.reason), []).append(skip.dtype)
    for (contestant, backend, reason), dtypes in reasons.items():
        where = f"{backend} {', '.join(dtypes)}"
        yield Text(f"Not measured: {contestant or 'everyone'} on {where}: {reason}.", style="dim")


def _circumstances(report: Report) -> Iterator[Text]:
    libraries = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield Text(f"Medians of {report.rounds} interleaved rounds. {libraries}.", style="dim")
    yield Text(report.machine, style="dim")
