"""What a cache across denoising steps saves, and what it costs in quality."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from kvcache.bench.harness.report import Judgement, Measured, Report, Skipped

if TYPE_CHECKING:
    from rich.console import RenderableType

UNCACHED = "uncached"


@dataclass(frozen=True)
class DiffusionTiming(Measured):
    """One recipe at work.

    place: backend, or the model of somebody else. family, setting: the recipe. skipped: share of
    the network's work that was not done. error: distance of the samples from those without
    a cache, relative (L2). quality: how far samples are from what they should show; None if
    nobody can tell. rounds_us: microseconds per sampling in every round.
    """

    place: str
    family: str
    setting: str
    skipped: float
    error: float
    quality: float | None
    rounds_us: tuple[float, ...]
    ours: bool = True


@dataclass(frozen=True)
class DiffusionReport(Report):
    """Time saved and error, recipe by recipe.

    machine: where this was measured. versions: of the libraries that took part.
    """

    format: ClassVar[str] = "kvcache.bench.diffusion/1"
    timing: ClassVar[type[DiffusionTiming]] = DiffusionTiming

    steps: int
    samples: int
    rounds: int
    machine: str
    versions: dict[str, str]
    timings: tuple[DiffusionTiming, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    @cached_property
    def _uncached(self) -> dict[str, DiffusionTiming]:
        return {timing.place: timing for timing in self.timings if timing.family == UNCACHED}

    @property
    def places(self) -> list[str]:
        """Backends and models, in the order of measurement."""
        return list(self._uncached)

    def saved(self, timing: DiffusionTiming) -> float:
        """Share of the wall time without a cache that is saved; negative if it takes longer."""
        return 1 - timing.us / self._uncached[timing.place].us

    def at(self, place: str) -> list[DiffusionTiming]:
        """Timings of one place."""
        return [timing for timing in self.timings if timing.place == place]

    @property
    def verdicts(self) -> Sequence[Judgement]:
        """For each cache of somebody else: what the best of ours saves at no greater error."""
        return [
            verdict
            for timing in self.timings
            if not timing.ours
            for verdict in self._judged(timing)
        ]

    def _judged(self, other: DiffusionTiming) -> list[Judgement]:
        ours = [
            timing
            for timing in self.at(other.place)
            if timing.ours
            and timing.family != UNCACHED
            and timing.error <= other.error * (1 + ROUNDING)
        ]
        at = f"{other.family} {other.setting}"
        found = []
        for rule, of, slack in (
            ("% of work saved", lambda timing: timing.skipped, ROUNDING),
            ("% of time saved", self.saved, NOISE),
        ):
            theirs, best = of(other), max(map(of, ours), default=0.0)
            passed, bound = best >= theirs - slack, f">= {100 * theirs:.1f}"
            found.append(Judgement(other.place, rule, at, 100 * best, bound, passed))
        return found

    def to_table(self) -> RenderableType:
        from kvcache.bench.harness.tables import diffusion_tables

        return diffusion_tables(self)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw error over time saved to `path`: one panel per place, one line per family."""
        from kvcache.bench.harness.figures import draw_diffusion

        draw_diffusion(self, path)


ROUNDING = 1e-3
"""Two errors nearer than that, relatively, are the same: sums were taken in another order."""
NOISE = 0.02
"""What two medians of the same thing may differ by, as a share of the time without a cache."""
