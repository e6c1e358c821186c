"""Statistics: hits and misses, and the fate of each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .streams import Stream


class HitStats(NamedTuple):
    """Hits and misses of a cache since it was made.

    Of a :class:`StepCache`, reads that found an array, and reads of an empty slot. Of a
    :class:`TeaCache`, steps skipped and steps computed.
    """

    hits: int
    misses: int


class StepRecord(NamedTuple):
    """Record of one step of one stream.

    computed: whether any of it was; in a skipped step, what has nothing to go by is.
    change: as the signal measured it; NaN in the first step of a run, 0 if nothing is measured.
    """

    step: int
    stream: Stream
    computed: bool
    change: float


@dataclass(frozen=True)
class DiffusionStats:
    """Records of the steps of a run; of a DiffusionCache since it was last reset."""

    steps: tuple[StepRecord, ...]

    @property
    def computed(self) -> int:
        """Steps computed, each stream counted."""
        return sum(record.computed for record in self.steps)

    @property
    def skipped(self) -> int:
        """Steps predicted, each stream counted."""
        return len(self.steps) - self.computed

    @property
    def skip_rate(self) -> float:
        """Share of predicted steps, 0 to 1."""
        return self.skipped / max(1, len(self.steps))
