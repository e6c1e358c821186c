"""The report of a comparison of appends."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcache.bench.harness.contest import RAW
from kvcache.bench.harness.report import ComparedTiming, Comparison, Skipped

from .case import MEMMOVE
from .targets import Verdict, judge

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Timing(ComparedTiming):
    """One contestant on one backend, dtype and capacity.

    rounds_us: microseconds per step, K and V, in every round. steps: steps of one round.
    """

    backend: str
    dtype: str
    capacity: int
    contestant: str
    steps: int
    rounds_us: tuple[float, ...]

    @property
    def place(self) -> int:
        """The capacity."""
        return self.capacity


@dataclass(frozen=True)
class AppendReport(Comparison[Timing]):
    """Cost of appending one token: ``[batch, heads, 1, head_dim]`` to K and to V.

    machine: on which this was measured. versions: of the libraries that took part.
    """

    format: ClassVar[str] = "kvcache.bench.append/1"
    timing: ClassVar[type[Timing]] = Timing
    against: ClassVar[tuple[str, ...]] = (RAW, MEMMOVE)

    batch: int
    heads: int
    head_dim: int
    rounds: int
    machine: str
    versions: dict[str, str]
    timings: tuple[Timing, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    @property
    def capacities(self) -> list[int]:
        """Capacities measured, ascending."""
        return sorted({timing.capacity for timing in self.timings})

    @property
    def verdicts(self) -> list[Verdict]:
        return judge(self)

    def to_table(self) -> RenderableType:
        from .tables import append_tables

        return append_tables(self)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a figure of cost over capacity; the suffix of `path` chooses the format.

        Raises: ImportError without matplotlib; says what installs it.
        """
        from .figure import draw

        draw(self, path)
