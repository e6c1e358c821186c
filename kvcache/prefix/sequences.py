"""Sequences of sessions: the contract of their supplier, and of one of them."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from kvcache.layers.base import LayerCache
from kvcache.layers.stack import LayerCaches
from kvcache.snapshots.snapshot import CacheSpec, Snapshot

from .known import KnownTokens


class SequenceHandle(ABC):
    """The sequence of one session, empty at first and owned by the session until released."""

    @property
    @abstractmethod
    def sequence(self) -> int:
        """Id of the sequence in its pool. Raises: KVCacheError over per-layer caches."""

    @property
    @abstractmethod
    def caches(self) -> LayerCaches[LayerCache]:
        """Caches of the sequence, one per layer. Raises: KVCacheError over a pool."""

    @abstractmethod
    def held(self, limit: int) -> int:
        """Return how many tokens, up to `limit`, the sequence has seen."""

    @abstractmethod
    def is_whole(self, stop: int) -> bool:
        """Return whether no position before `stop` was left out, as far as the sequence tells."""

    @property
    @abstractmethod
    def settled(self) -> bool:
        """Whether some pass is known to have gone through the whole model."""

    @abstractmethod
    def settle(self) -> None:
        """Note that the passes so far went through the whole model."""

    @abstractmethod
    def surely_held(self, held: int, restored: int) -> int:
        """Return how many of `held` tokens are complete, though the last pass may have been cut.

        restored: tokens that the sequence began with.
        """

    @abstractmethod
    def restore(self, snapshots: Sequence[Snapshot], stop: int) -> None:
        """Fill the empty sequence with contiguous `snapshots`, up to `stop` in the last one.

        Raises: CacheFullError.
        """

    @abstractmethod
    def track(self, known: KnownTokens) -> None:
        """Keep `known` true from now on: cut off the tokens whose rows go, or change."""

    @abstractmethod
    def update_known(self) -> None:
        """Bring the known tokens up to date, where nothing tells of changes when they are made."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Take back what the sequence holds from position `length` on.

        Raises: TrimError where per-layer caches cannot.
        """

    @abstractmethod
    def adopt(self, caches: LayerCaches[LayerCache]) -> None:
        """Have `caches` in place of its own from now on.

        Raises: KVCacheError over a pool, and for caches of another session.
        """

    @abstractmethod
    def schedule(self, positions: Iterable[int]) -> None:
        """Keep the rows needed to resume at `positions`, for snapshots taken later."""

    @abstractmethod
    def capture(self, start: int, stop: int) -> Snapshot:
        """Take a snapshot of positions ``[start, stop)``. The caller closes it."""

    @abstractmethod
    def release(self, keep: bool = False) -> None:
        """End the use of the sequence, and drop all tokens unless `keep`. Snapshots stay valid.

        keep: its caches stay as they are, the caller's. Of a pool, nothing is kept.
        """


class SequenceSource(ABC):
    """Supplier of sequences for the sessions of one prefix cache."""

    lock: threading.RLock
    """To be held around :meth:`acquire` and all calls of its handles."""
    medium: str
    """Memory in which captured rows are kept, for events, in the words of vLLM."""

    @property
    @abstractmethod
    def specs(self) -> list[CacheSpec]:
        """Specs of the caches, one for each part of a snapshot; a dtype is empty until known."""

    @property
    @abstractmethod
    def restorable(self) -> bool:
        """Whether its sequences can be filled with snapshots that come from elsewhere."""

    @abstractmethod
    def acquire(self) -> SequenceHandle:
        """Return an empty sequence, to be released. Raises: CacheFullError if none is free."""

    @abstractmethod
    def adopt(self, caches: Sequence[LayerCache], tokens: int) -> SequenceHandle:
        """Return a sequence that has `caches` with so many tokens, to be released.

        Raises: KVCacheError over a pool, and for caches of a session; ValueError, TypeError for
            other caches.
        """
