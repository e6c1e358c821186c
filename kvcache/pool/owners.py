"""Owners of sequences: they learn of every change of these but tokens appended."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from functools import partial
from typing import Protocol, TypeAlias

from kvcache._types import Int32s
from kvcache.errors import KVCacheError

Notice: TypeAlias = Callable[[], None]
"""A call of an owner, to follow a change; it cannot fail."""


class SequenceOwner(Protocol):
    """The only user of some sequences, with records of the tokens that these hold.

    Each method is called once a change is made, with the lock of the cache held. It neither raises
    nor changes the cache.
    """

    @property
    def recorded(self) -> Container[int]:
        """Sequences with records at present: only of these it learns anything."""

    def resume_points(self, sequence: int) -> Collection[int]:
        """Return the positions named for others to go on at, whether their tokens came or not."""

    def truncated(self, sequence: int, length: int) -> None:
        """Note that positions from `length` on are gone, and that the sequence can go on there."""

    def invalidated(self, sequence: int, start: int) -> None:
        """Note that rows from position `start` on are not those of a run of the tokens alone."""

    def copied(self, source: int, target: int, length: int) -> None:
        """Note that `target` holds just the positions of `source` below `length`."""

    def looked_ahead(self, sequence: int, start: int, stop: int) -> None:
        """Note that the token at `start` sees tokens behind it, all of them before `stop`."""


class HasSequences(Protocol):
    """A cache, as far as its owners look at it."""

    def next_position(self, sequence: int) -> int:
        """Return the position after the last one of a sequence."""

    def can_resume(self, sequence: int, position: int) -> bool:
        """Return whether every earlier token visible from `position` is still stored."""

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        """Make `positions` resume points of a sequence."""


class Owners:
    """The owners of the sequences of one cache, held weakly: one that is gone owns nothing."""

    def __init__(self) -> None:
        self._owners: dict[int, weakref.ref[SequenceOwner]] = {}

    def of(self, sequence: int) -> SequenceOwner | None:
        """Return the owner of a sequence, None if it has none."""
        owner = self._owners.get(sequence)
        return None if owner is None else owner()

    def recording(self, sequence: int) -> SequenceOwner | None:
        """Return the owner of a sequence if it has records of it, else None."""
        owner = self.of(sequence)
        return owner if owner is not None and sequence in owner.recorded else None

    @property
    def any(self) -> bool:
        """True if a sequence has an owner."""
        return any(owner() is not None for owner in self._owners.values())

    # Claiming.

    def check(self, sequences: Sequence[int], cache: HasSequences) -> list[int]:
        """Return those of `sequences` that hold what an owner left that is gone.

        Raises: KVCacheError for a sequence of another owner, or one that holds tokens of nobody.
        """
        left = [sequence for sequence in sequences if cache.next_position(sequence)]
        for sequence in sequences:
            if self.of(sequence) is not None:
                raise KVCacheError(
                    f"a sequence has one owner; sequence {sequence} is in use by another one, a "
                    "PrefixCache say. Name other sequences for each, or drop the first owner."
                )
        for sequence in left:
            if sequence not in self._owners:
                raise KVCacheError(
                    f"a sequence is empty when it gets an owner; sequence {sequence} holds "
                    f"{cache.next_position(sequence)} tokens. Remove them, or name other sequences."
                )
        return left

    def claim(self, sequences: Sequence[int], owner: SequenceOwner) -> None:
        """Make `owner` the owner of `sequences`, which were checked."""
        self._owners |= dict.fromkeys(sequences, weakref.ref(owner))

    # Notices, prepared before a change.

    def of_removal(
        self, cache: HasSequences, sequence: int, start: int, stop: int | None
    ) -> Notice | None:
        """Return the notice of the removal of positions ``[start, stop)``.

        The tokens behind `start` come again, and their resume points are scheduled again with it.
        """
        owner = self.recording(sequence)
        if owner is None or start == stop:
            return None
        end = cache.next_position(sequence)
        schedule = _scheduling(cache, owner, sequence, min(start, end))
        if start >= end:  # nothing is removed, but the schedule
            return schedule
        # Where a window has dropped tokens visible from `start`, what is computed there differs.
        if (stop is None or stop >= end) and cache.can_resume(sequence, start):
            return partial(_both, partial(owner.truncated, sequence, start), schedule)
        return partial(owner.invalidated, sequence, start)

    def of_copy(self, cache: HasSequences, source: int, target: int, length: int) -> Notice | None:
        """Return the notice of a copy of the first `length` positions of `source`."""
        if source == target:
            return self.of_removal(cache, source, length, None)
        owner = self.recording(target)
        if owner is None:
            return None
        # Names ahead of the tokens that are there belong to the source alone.
        length = min(length, cache.next_position(source))
        if cache.can_resume(source, length):
            schedule = _scheduling(cache, owner, target, length)
            return partial(_both, partial(owner.copied, source, target, length), schedule)
        return partial(owner.invalidated, target, 0)

    def of_restore(self, sequence: int) -> Notice | None:
        """Return the notice of a sequence that is filled from snapshots."""
        owner = self.recording(sequence)
        return None if owner is None else partial(owner.invalidated, sequence, 0)

    # Notices of what has happened.

    def all_gone(self) -> None:
        """Tell all owners that their sequences have lost all tokens."""
        for sequence in self._owners:
            if (owner := self.recording(sequence)) is not None:
                owner.truncated(sequence, 0)

    def inserted(self, cache: HasSequences, positions: Int32s, sequences: Int32s) -> None:
        """Tell the owners of tokens that come before others: these were computed without them.

        positions, sequences: of the batch that brings them, int32 [tokens].
        """
        for sequence in set(sequences.tolist()):
            owner, first = self.recording(sequence), int(positions[sequences == sequence].min())
            if owner is not None and first < cache.next_position(sequence):
                owner.invalidated(sequence, first)

    def pass_dropped(self, cache: HasSequences) -> None:
        """Tell the owners of sequences that cannot go on: a window dropped tokens for the pass."""
        for sequence in self._owners:
            owner = self.recording(sequence)
            if owner is not None:
                end = cache.next_position(sequence)
                if not cache.can_resume(sequence, end):
                    owner.invalidated(sequence, end)


def _scheduling(cache: HasSequences, owner: SequenceOwner, sequence: int, end: int) -> Notice:
    """Return the call that schedules resume points behind `end`, which a change has forgotten."""
    points = [point for point in owner.resume_points(sequence) if point > end]
    return partial(cache.schedule, sequence, points)


def _both(first: Notice, second: Notice) -> None:
    first()
    second()
