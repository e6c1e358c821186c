"""The state that a rollback of a per-layer cache returns to."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvcache._types import Int32s

from .buffers import Arrays


@dataclass(frozen=True)
class Update:
    """One update since a checkpoint: the arrays that came, and the rows that they displaced."""

    arrays: Arrays
    slots: Int32s
    displaced: Arrays


@dataclass
class Checkpoint:
    """The state that a rollback returns to.

    updates, scheduled: for caches that displace tokens; updates since, and resume points then.
    """

    offset: int
    updates: list[Update] = field(default_factory=list)
    scheduled: set[int] = field(default_factory=set)
