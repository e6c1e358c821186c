"""Where the sequences of sessions live: in a pool, or in per-layer caches of their own."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from kvcache._checks import check_ids
from kvcache.backends import Backend
from kvcache.errors import CacheFullError
from kvcache.layers.growing import KVCache
from kvcache.layers.stack import LayerCaches
from kvcache.pool.base import Cache
from kvcache.snapshots.snapshot import Snapshot


class SequenceSource(ABC):
    """Gives a session a handle and takes snapshots of it."""

    lock: threading.RLock

    @abstractmethod
    def acquire(self) -> Any:
        """An empty handle. Raises: CacheFullError if there is none."""

    @abstractmethod
    def restore(self, handle: Any, snapshots: Sequence[Snapshot]) -> None:
        """Let an empty handle hold what `snapshots` does. Raises: CacheFullError."""

    @abstractmethod
    def schedule(self, handle: Any, positions: Iterable[int]) -> None:
        """Let its snapshots hold what going on at `positions` needs."""

    @abstractmethod
    def length(self, handle: Any) -> int:
        """Tokens that its sequence has seen."""

    @abstractmethod
    def capture(self, handle: Any, start: int, stop: int) -> Snapshot:
        """What it holds of positions ``[start, stop)``."""

    @abstractmethod
    def release(self, handle: Any) -> None:
        """The release of :meth:`acquire`."""


class PoolSequences(SequenceSource):
    """Sequences of one multi-sequence cache: snapshots share cells with them."""

    def __init__(self, cache: Cache, sequences: Iterable[int] | None) -> None:
        self.cache = cache
        self.lock = cache.lock
        chosen = range(cache.max_sequences) if sequences is None else sequences
        self._free = list(chosen)[::-1]
        self._all = len(self._free)
        check_ids(cache.max_sequences, *self._free)
        if len(set(self._free)) < self._all:
            raise ValueError(f"sessions share no sequence; name each once, got {self._free[::-1]}.")

    def acquire(self) -> int:
        if not self._free:
            raise CacheFullError(
                f"every session needs a sequence of its own; all {self._all} are in use. "
                "End a session, or init the cache with more max_sequences."
            )
        return self._free.pop()

    def restore(self, handle: int, snapshots: Sequence[Snapshot]) -> None:
        self.cache.restore(handle, *snapshots)

    def schedule(self, handle: int, positions: Iterable[int]) -> None:
        self.cache.schedule(handle, positions)

    def length(self, handle: int) -> int:
        return self.cache.next_position(handle)

    def capture(self, handle: int, start: int, stop: int) -> Snapshot:
        return self.cache.snapshot(handle, start, stop)

    def release(self, handle: int) -> None:
        self.cache.remove(handle, 0)
        self._free.append(handle)


class LayerSequences(SequenceSource):
    """New per-layer caches for every session; their snapshots are in host memory.

    caches: one per layer, empty; those of sessions are made like them.
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        if not caches or any(cache.offset for cache in caches):
            raise ValueError(f"give one empty cache for every layer; got {list(caches)}.")
        self._like = list(caches)
        self._backend: Backend | None = None
        self.lock = threading.RLock()

    def acquire(self) -> list[KVCache]:
        return [cache.copy() for cache in self._like]

    def restore(self, handle: list[KVCache], snapshots: Sequence[Snapshot]) -> None:
        LayerCaches(handle).restore(*snapshots, backend=self._backend)

    def schedule(self, handle: list[KVCache], positions: Iterable[int]) -> None:
        wanted = list(positions)
        for cache in handle:
            cache.schedule(wanted)

    def length(self, handle: list[KVCache]) -> int:
        return min(cache.offset for cache in handle)

    def capture(self, handle: list[KVCache], start: int, stop: int) -> Snapshot:
        self._backend = handle[0].backend
        return LayerCaches(handle).snapshot(start, stop).to_host()

    def release(self, handle: list[KVCache]) -> None:
        for cache in handle:
            cache.reset()
