"""The report of planning passes, and the promises of this project about its cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from kvcache.bench.harness.report import MeasuredTiming, Report

if TYPE_CHECKING:
    from rich.console import RenderableType

POOL_LIMIT = 1.2
"""Times as much as planning may cost in a pool of ten times as many cells."""


class Load(NamedTuple):
    """Sequences of one pass: `capacity` cells for each, `used` of them in use."""

    sequences: int
    capacity: int
    used: int

    @property
    def label(self) -> str:
        """The load in words."""
        return f"{self.sequences} x {self.capacity:,} cells, {self.used:,} used"


class Bounds(NamedTuple):
    """Most microseconds for planning a pass, without and with the mask.

    None: not judged.
    """

    plan: float
    mask: float | None

    def limit(self, mask: bool) -> float | None:
        """Return the bound with or without the mask."""
        return self.mask if mask else self.plan


BOUNDS = {
    Load(1, 8192, 8000): Bounds(plan=30, mask=None),
    Load(64, 2048, 1500): Bounds(plan=150, mask=3_000),
    Load(256, 2048, 1500): Bounds(plan=600, mask=60_000),
}
LOADS = tuple(BOUNDS)


@dataclass(frozen=True)
class PlanTiming(MeasuredTiming):
    """Planning one pass. pool: cells of the pool, as a multiple of its sequences' capacity.

    rounds_us: microseconds per pass in every round. steps: passes of one round.
    """

    sequences: int
    capacity: int
    used: int
    window: int | None
    pool: int
    mask: bool
    steps: int
    rounds_us: tuple[float, ...]

    @property
    def load(self) -> Load:
        """The load planned for."""
        return Load(self.sequences, self.capacity, self.used)

    @property
    def visibility(self) -> str:
        """The window, in words."""
        return "all tokens" if self.window is None else f"window {self.window:,}"


@dataclass(frozen=True)
class PlanVerdict:
    """A bound on planning for `load`, and the figure measured `at` some window and mask."""

    load: str
    rule: str
    at: str
    measured: float
    bound: str
    passed: bool

    @property
    def heading(self) -> str:
        """The load."""
        return self.load


@dataclass(frozen=True)
class PlanReport(Report[PlanTiming]):
    """Cost of planning one pass on the host, ``Batch`` included.

    machine: on which this was measured. versions: of the libraries that took part.
    """

    format: ClassVar[str] = "kvcache.bench.plan/1"
    timing: ClassVar[type[PlanTiming]] = PlanTiming

    rounds: int
    machine: str
    versions: dict[str, str]
    timings: tuple[PlanTiming, ...] = ()

    @cached_property
    def _index(self) -> dict[tuple[Load, int | None, int, bool], PlanTiming]:
        return {(t.load, t.window, t.pool, t.mask): t for t in self.timings}

    def find(self, load: Load, window: int | None, pool: int, mask: bool) -> PlanTiming | None:
        """Return one timing; None if it was not measured."""
        return self._index.get((load, window, pool, mask))

    @property
    def loads(self) -> list[Load]:
        """The loads in the order of measurement."""
        return list(dict.fromkeys(timing.load for timing in self.timings))

    @property
    def verdicts(self) -> list[PlanVerdict]:
        return [
            verdict
            for load in self.loads
            for verdict in (*self._bounded(load), *self._independent_of_pool(load))
        ]

    def _bounded(self, load: Load) -> Iterator[PlanVerdict]:
        """Judge the planners of a load, in the small pool, by its bounds."""
        for timing in self.timings:
            limit = BOUNDS[load].limit(timing.mask) if load in BOUNDS else None
            if (timing.load, timing.pool) == (load, 1) and limit is not None:
                rule = "with mask" if timing.mask else "without mask"
                passed = timing.us <= limit
                yield PlanVerdict(
                    load.label, rule, timing.visibility, timing.us, f"<= {limit:,g}us", passed
                )

    def _independent_of_pool(self, load: Load) -> Iterator[PlanVerdict]:
        """Judge the planner with the steepest cost, from the small pool to the large one."""
        figures = []
        for timing in self.timings:
            small = self.find(load, timing.window, 1, timing.mask)
            # Against the same window and mask: these change the cost by themselves.
            if timing.load == load and timing.pool > 1 and small:
                at = f"{timing.visibility}{', mask' if timing.mask else ''}"
                figures.append((timing.us / small.us, timing.pool, at))
        if figures:
            figure, pool, at = max(figures)
            bound, passed = f"<= {POOL_LIMIT:g}x", figure <= POOL_LIMIT
            yield PlanVerdict(load.label, f"{pool}x the cells", at, figure, bound, passed)

    def to_table(self) -> RenderableType:
        from .tables import plan_tables

        return plan_tables(self)
