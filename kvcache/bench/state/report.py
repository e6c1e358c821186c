"""The report of the cost of recurrent states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcache.bench.harness.report import ComparedTiming, Comparison, Judgement, Skipped

from .case import ADVANCE, BASES, POOL

if TYPE_CHECKING:
    from rich.console import RenderableType

LIMIT = 1.2
"""Times the framework's own calls that a cache of states may cost."""


@dataclass(frozen=True)
class StateTiming(ComparedTiming):
    """One contestant on one backend, with `sequences` states in every layer.

    dtype: of matrices; convolutions have a narrow one. rounds_us: microseconds per step, all
    layers, in every round. steps: steps of one round.
    """

    backend: str
    dtype: str
    sequences: int
    contestant: str
    steps: int
    rounds_us: tuple[float, ...]

    @property
    def place(self) -> int:
        """Number of sequences."""
        return self.sequences


@dataclass(frozen=True)
class StateReport(Comparison[StateTiming]):
    """Cost of recurrent states, per layer and in a pool.

    machine: on which this was measured. versions: of the libraries that took part.
    """

    format: ClassVar[str] = "kvcache.bench.state/1"
    timing: ClassVar[type[StateTiming]] = StateTiming
    against: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys(BASES.values()))

    layers: int
    heads: int
    head_dim: int
    channels: int
    kernel: int
    rounds: int
    machine: str
    versions: dict[str, str]
    timings: tuple[StateTiming, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    @property
    def places(self) -> list[int]:
        """Numbers of sequences as they were measured, ascending."""
        return sorted({timing.sequences for timing in self.timings})

    @property
    def verdicts(self) -> list[Judgement]:
        return [
            verdict
            for backend, dtype in self.groups
            for name in (ADVANCE, POOL)
            for verdict in self._judged(backend, dtype, name)
        ]

    def _judged(self, backend: str, dtype: str, name: str) -> Iterator[Judgement]:
        """Judge a contestant at the number of sequences where it is furthest off."""
        ratios = [
            (ratio, timing.sequences)
            for timing in self.contestants(backend, dtype).get(name, ())
            if (ratio := self.ratio(timing, BASES[name])) is not None
        ]
        if ratios:
            worst, sequences = max(ratios)
            rule, at = f"{name} / {BASES[name]}", f"{sequences} sequences"
            heading, passed = f"{backend} {dtype}", worst <= LIMIT
            yield Judgement(heading, rule, at, worst, f"<= {LIMIT:g}x", passed)

    def to_table(self) -> RenderableType:
        from .tables import state_tables

        return state_tables(self)
