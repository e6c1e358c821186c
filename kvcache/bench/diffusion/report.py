"""The report of caches across denoising steps: savings, and their cost in quality."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from kvcache.bench.harness.report import Judgement, MeasuredTiming, Report, Skipped

if TYPE_CHECKING:
    from rich.console import RenderableType

UNCACHED = "uncached"


@dataclass(frozen=True)
class DiffusionTiming(MeasuredTiming):
    """One recipe at work.

    place: backend, or the model of another library. family, setting: the recipe. skipped: share
    of the network's work that was not done. error: distance of the samples from those without a
    cache, relative (L2). quality: mean distance of the samples from the shapes that their prompts
    ask for; None where prompts ask for none. rounds_us: microseconds per sampling in every round.
    ours: whether the cache is of kvcache.
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
class DiffusionReport(Report[DiffusionTiming]):
    """Time saved and error, recipe by recipe.

    machine: on which this was measured. versions: of the libraries that took part.
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
        """Return the share of the uncached wall time saved; negative if the recipe takes longer."""
        return 1 - timing.us / self._uncached[timing.place].us

    def at(self, place: str) -> list[DiffusionTiming]:
        """Return the timings of one place."""
        return [timing for timing in self.timings if timing.place == place]

    @property
    def verdicts(self) -> Sequence[Judgement]:
        """For each peer, the most saved by a recipe of ours at no greater error."""
        return [
            verdict
            for timing in self.timings
            if not timing.ours
            for verdict in self._judged(timing)
        ]

    def _judged(self, other: DiffusionTiming) -> list[Judgement]:
        """Judge the work and the time saved by a peer against the best of ours."""
        ours = [
            timing
            for timing in self.at(other.place)
            if timing.ours
            and timing.family != UNCACHED
            and timing.error <= other.error * (1 + ROUNDING)
        ]
        at = f"{other.family} {other.setting}"
        verdicts = []
        for rule, share, slack in (
            ("% of work saved", lambda timing: timing.skipped, ROUNDING),
            ("% of time saved", self.saved, NOISE),
        ):
            theirs, best = share(other), max(map(share, ours), default=0.0)
            passed, bound = best >= theirs - slack, f">= {100 * theirs:.1f}"
            verdicts.append(Judgement(other.place, rule, at, 100 * best, bound, passed))
        return verdicts

    def to_table(self) -> RenderableType:
        from .tables import diffusion_tables

        return diffusion_tables(self)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write error over time saved to `path`: one panel per place, one line per family.

        Raises: ImportError without matplotlib; says what installs it.
        """
        from .figure import draw_diffusion

        draw_diffusion(self, path)


ROUNDING = 1e-3
"""Relative difference below which two errors are the same: sums were taken in another order."""
NOISE = 0.02
"""Difference allowed between two medians of one thing, as a share of the uncached time."""
