"""The owners of a cache's sequences, and its passes in a wrapper: the base of :class:`Cache`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Self, TypeAlias

from kvcache._checks import as_indices, check_ids
from kvcache._interrupts import uninterrupted
from kvcache._locks import Lock

from .latest import UNFINISHED, LatestPass, Progress
from .owners import Notice, Owners, SequenceOwner

Commit: TypeAlias = Callable[[], None]
"""A change, checked before, that can no longer fail."""


class OwnedCache(ABC):
    """A cache whose sequences can have owners, alone or as a part of a wrapper."""

    def __init__(self) -> None:
        self.lock = Lock()
        """Held during changes: other threads may change sequences while a pass runs."""
        self._enclosing: Self | None = None
        self._owners = Owners()

    def share_lock(self, lock: Lock) -> None:
        """Use `lock`, the lock of an enclosing cache, instead of its own."""
        self.lock = lock

    def enclose(self, wrapper: Self) -> None:
        """Become a part of `wrapper`, whose passes are then complete in all its parts or in none.

        Raises: ValueError for a part of another wrapper, or a cache whose sequences have an owner.
        """
        if self._enclosing not in (None, wrapper):
            raise ValueError("a cache is a part of one wrapper only. Make a cache for each.")
        if self._owners.any:
            raise ValueError(
                "a part of a wrapper has no owners of its own. Make the wrapper first, and the "
                "PrefixCache over it."
            )
        self._enclosing = wrapper
        self.share_lock(wrapper.lock)

    @property
    def owners(self) -> Owners:
        """Owners of sequences; of a part, those of the wrapper."""
        return self._owners if self._enclosing is None else self._enclosing.owners

    def claim(self, sequences: Iterable[int], owner: SequenceOwner) -> None:
        """Make `owner` the only user of `sequences`, empty ones, for as long as it lives.

        It learns of every change of them but tokens appended. Tokens that a former owner left,
        which is gone itself, are removed.

        Raises: ValueError for other ids, KVCacheError for a sequence that has an owner, or holds
            tokens; nothing has changed then.
        """
        ids = as_indices(sequences, "sequences")
        with self.lock:
            check_ids(self.max_sequences, *ids)
            for sequence in self.owners.check(ids, self):
                self.remove(sequence, 0)
            self.owners.claim(ids, owner)

    def _commit(self, commit: Commit, notice: Notice | None = None) -> None:
        """Carry out a change, and tell the owner of the sequence of it: both or neither."""
        with uninterrupted():
            commit()
            if notice is not None:
                notice()

    # The pass begun last, which is complete in all parts of a wrapper or in none.

    def is_unfinished(self) -> bool:
        """Return whether the last pass is not complete, here or elsewhere in the same wrapper."""
        if self._enclosing is not None:
            return self._enclosing.is_unfinished()
        return self.pass_progress() in UNFINISHED

    def pass_complete(self) -> bool:
        """Return whether nothing of the last pass is left to put in this cache."""
        return self.pass_progress() not in UNFINISHED

    def take_back_unfinished(self) -> None:
        """Take back the last pass if it is not complete, here or elsewhere in the same wrapper."""
        if self._enclosing is not None:
            self._enclosing.take_back_unfinished()
        elif self.is_unfinished():
            self._take_back()

    def _take_back(self) -> None:
        """Take back the last pass, complete or not, and tell the owners of its sequences."""
        with uninterrupted():
            self.drop_pass()
            if self._owners.any:
                self._owners.pass_dropped(self)

    def settle_pass(self) -> None:
        """Note that the last pass, if it is complete, went through the whole model."""
        with self.lock:
            if not self.is_unfinished():
                self.note_whole()

    def pass_progress(self) -> Progress:
        """Return how far the last pass has come in this cache."""
        return Progress.NOTHING

    def latest_pass(self, sequence: int) -> LatestPass:
        """Return what the pass begun last brings to `sequence`, and which layers were ever put."""
        return LatestPass()

    @abstractmethod
    def note_whole(self) -> None:
        """Count the layers that the last pass has put, a complete one, as all of the model."""

    @abstractmethod
    def drop_pass(self) -> None:
        """Take back the last pass, complete or not."""

    @property
    @abstractmethod
    def max_sequences(self) -> int:
        """Number of sequences."""

    @abstractmethod
    def next_position(self, sequence: int) -> int:
        """Return the position after the last one of a sequence; 0 for an empty one."""

    @abstractmethod
    def can_resume(self, sequence: int, position: int) -> bool:
        """Return whether every earlier token visible from `position` is still stored."""

    @abstractmethod
    def remove(self, sequence: int, start: int, stop: int | None = None) -> None:
        """Forget positions ``[start, stop)`` of a sequence."""

    @abstractmethod
    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        """Make `positions` resume points of a sequence."""
