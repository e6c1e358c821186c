"""The report of attention of a decode pass."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcache.bench.harness.report import ComparedTiming, Comparison, Judgement, Skipped

from .case import IDEAL
from .targets import judge

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class AttendTiming(ComparedTiming):
    """One contestant on one backend and dtype, with one load of some sequences.

    rounds_us: microseconds per pass, one layer, in every round. steps: passes of one round.
    """

    backend: str
    dtype: str
    load: str
    sequences: int
    contestant: str
    steps: int
    rounds_us: tuple[float, ...]

    @property
    def place(self) -> tuple[str, int]:
        """The load, and the number of sequences."""
        return self.load, self.sequences


@dataclass(frozen=True)
class AttendReport(Comparison[AttendTiming]):
    """Cost of attention of one token of each sequence, in one layer.

    machine: on which this was measured. versions: of the libraries that took part.
    """

    format: ClassVar[str] = "kvcache.bench.attend/1"
    timing: ClassVar[type[AttendTiming]] = AttendTiming
    against: ClassVar[tuple[str, ...]] = (IDEAL,)

    tokens: int
    heads: int
    query_heads: int
    head_dim: int
    rounds: int
    machine: str
    versions: dict[str, str]
    timings: tuple[AttendTiming, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    @property
    def places(self) -> list[tuple[str, int]]:
        """Loads and numbers of sequences, as they were measured, ascending."""
        return sorted({timing.place for timing in self.timings})

    @property
    def verdicts(self) -> list[Judgement]:
        return judge(self)

    def to_table(self) -> RenderableType:
        from .tables import attend_tables

        return attend_tables(self)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a figure of cost over sequences; the suffix of `path` chooses the format.

        Raises: ImportError without matplotlib; says what installs it.
        """
        from .figure import draw

        draw(self, path)
