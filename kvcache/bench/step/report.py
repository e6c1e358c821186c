"""The report of decode steps of a whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcache.bench.harness.contest import RAW
from kvcache.bench.harness.report import ComparedTiming, Comparison, Skipped

from .case import ATTEND

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class StepTiming(ComparedTiming):
    """One contestant on one backend and dtype, with `sequences` of `tokens` each.

    rounds_us: microseconds per step, all layers, in every round. steps: steps of one round.
    """

    backend: str
    dtype: str
    sequences: int
    tokens: int
    contestant: str
    steps: int
    rounds_us: tuple[float, ...]

    @property
    def place(self) -> tuple[int, int]:
        """Sequences, and tokens of each."""
        return self.sequences, self.tokens


@dataclass(frozen=True)
class StepReport(Comparison[StepTiming]):
    """Cost of planning a pass, and of put and get in all layers.

    machine: on which this was measured. versions: of the libraries that took part.
    """

    format: ClassVar[str] = "kvcache.bench.step/1"
    timing: ClassVar[type[StepTiming]] = StepTiming
    against: ClassVar[tuple[str, ...]] = (RAW, ATTEND)

    layers: int
    heads: int
    head_dim: int
    rounds: int
    machine: str
    versions: dict[str, str]
    timings: tuple[StepTiming, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    @property
    def places(self) -> list[tuple[int, int]]:
        """Sequences, and tokens of each, as they were measured, ascending."""
        return sorted({timing.place for timing in self.timings})

    def to_table(self) -> RenderableType:
        from .tables import step_tables

        return step_tables(self)
