"""Where the sequences of sessions live: in a pool, or in per-layer caches of their own."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from kvcache.backends import Backend
from kvcache.errors import CacheFullError
from kvcache.layers.growing import KVCache, restore, snapshot
from kvcache.pool.base import Cache, check_ids
from kvcache.snapshots.rows import Rows
from kvcache.snapshots.snapshot import Part, Snapshot


class Host(ABC):
    """Gives a session a place and takes snapshots of it."""

    lock: threading.RLock

    @abstractmethod
    def begin(self) -> Any:
        """An empty place. Raises: CacheFullError if there is none."""

    @abstractmethod
    def restore(self, place: Any, chain: Sequence[Snapshot]) -> None:
        """Let an empty place hold what `chain` does. Raises: CacheFullError."""

    @abstractmethod
    def schedule(self, place: Any, positions: Iterable[int]) -> None:
        """Let its snapshots hold what going on at `positions` needs."""

    @abstractmethod
    def held(self, place: Any) -> int:
        """Tokens that its sequence has seen."""

    @abstractmethod
    def capture(self, place: Any, start: int, stop: int) -> Snapshot:
        """What it holds of positions ``[start, stop)``."""

    @abstractmethod
    def end(self, place: Any) -> None:
        """The end of :meth:`begin`."""


class PoolHost(Host):
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

    def begin(self) -> int:
        if not self._free:
            raise CacheFullError(
                f"every session needs a sequence of its own; all {self._all} are in use. "
                "End a session, or init the cache with more max_sequences."
            )
        return self._free.pop()

    def restore(self, place: int, chain: Sequence[Snapshot]) -> None:
        self.cache.restore(place, *chain)

    def schedule(self, place: int, positions: Iterable[int]) -> None:
        self.cache.schedule(place, positions)

    def held(self, place: int) -> int:
        return self.cache.next_position(place)

    def capture(self, place: int, start: int, stop: int) -> Snapshot:
        return self.cache.snapshot(place, start, stop)

    def end(self, place: int) -> None:
        self.cache.remove(place, 0)
        self._free.append(place)


class LayersHost(Host):
    """New per-layer caches for every session; their snapshots are in host memory.

    caches: one per layer, empty; those of sessions are made like them.
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        if not caches or any(cache.offset for cache in caches):
            raise ValueError(f"give one empty cache for every layer; got {list(caches)}.")
        self._like = list(caches)
        self._backend: Backend | None = None
        self.lock = threading.RLock()

    def begin(self) -> list[KVCache]:
        return [cache.copy() for cache in self._like]

    def restore(self, place: list[KVCache], chain: Sequence[Snapshot]) -> None:
        restore(place, *chain, backend=self._backend)

    def schedule(self, place: list[KVCache], positions: Iterable[int]) -> None:
        wanted = list(positions)
        for cache in place:
            cache.schedule(wanted)

    def held(self, place: list[KVCache]) -> int:
        return min(cache.offset for cache in place)

    def capture(self, place: list[KVCache], start: int, stop: int) -> Snapshot:
        self._backend = place[0].backend
        return snapshot(place, start, stop).to_host()

    def end(self, place: list[KVCache]) -> None:
        for cache in place:
            cache.reset()


def nothing(start: int, stop: int, like: Snapshot) -> Snapshot:
    """A snapshot of a span of which nothing is held."""
    parts = [Part(p.kind, p.sight, Rows(p.rows.positions[:0]), p.dtype) for p in like.parts]
    return Snapshot(start, stop, parts)
