"""What a decode step of a whole model costs in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcache.bench.harness.contest import RAW
from kvcache.bench.harness.report import Comparison, Placed, Skipped

if TYPE_CHECKING:
    from rich.console import RenderableType

CAUSAL = "CausalCache"
ATTEND = "attention alone"
PROGRAM = "with put"


@dataclass(frozen=True)
class StepTiming(Placed):
    """One contestant on one backend and dtype, with so many sequences of so many tokens each.

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

    machine: where this was measured. versions: of the libraries that took part.
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

    def to_table(self) -> RenderableType:
        from kvcache.bench.harness.tables import step_tables

        return step_tables(self)
