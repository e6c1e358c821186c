"""Sequences of sessions: in one pool, or in per-layer caches of each session's own."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

from kvcache._checks import as_indices, check_ids
from kvcache._locks import Lock
from kvcache.backends import Backend
from kvcache.errors import CacheFullError, KVCacheError
from kvcache.layers.growing import KVCache
from kvcache.layers.stack import LayerCaches
from kvcache.pool.base import Cache
from kvcache.snapshots.snapshot import Snapshot


class SequenceHandle(ABC):
    """The sequence of one session, empty at first and owned by the session until released."""

    @property
    @abstractmethod
    def sequence(self) -> int:
        """Id of the sequence in its pool. Raises: KVCacheError over per-layer caches."""

    @property
    @abstractmethod
    def caches(self) -> LayerCaches[KVCache]:
        """Caches of the sequence, one per layer. Raises: KVCacheError over a pool."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens the sequence has seen."""

    @abstractmethod
    def restore(self, snapshots: Sequence[Snapshot], stop: int) -> None:
        """Fill the empty sequence with contiguous `snapshots`, up to `stop` in the last one.

        Raises: CacheFullError.
        """

    @abstractmethod
    def schedule(self, positions: Iterable[int]) -> None:
        """Keep the rows needed to resume at `positions`, for snapshots taken later."""

    @abstractmethod
    def capture(self, start: int, stop: int) -> Snapshot:
        """Take a snapshot of positions ``[start, stop)``. The caller closes it."""

    @abstractmethod
    def release(self) -> None:
        """Drop all tokens and end the use of the sequence. Snapshots stay valid."""


class SequenceSource(ABC):
    """Supplier of sequences for the sessions of one prefix cache."""

    lock: threading.RLock
    """To be held around :meth:`acquire` and all calls of its handles."""

    @abstractmethod
    def acquire(self) -> SequenceHandle:
        """Return an empty sequence, to be released. Raises: CacheFullError if none is free."""


class PoolSequences(SequenceSource):
    """Sequences of one multi-sequence cache; snapshots share their cells.

    sequences: ids that may be used, None for all of the cache.
    """

    def __init__(self, cache: Cache, sequences: Iterable[int] | None) -> None:
        self.lock = cache.lock
        self._cache = cache
        chosen = range(cache.max_sequences) if sequences is None else sequences
        # Reversed: taken from the end, the first named is used first.
        self._free = as_indices(chosen, "sequences")[::-1]
        self._total = len(self._free)
        check_ids(cache.max_sequences, *self._free)
        if len(set(self._free)) < self._total:
            raise ValueError(f"sessions share no sequence; name each once, got {self._free[::-1]}.")

    def acquire(self) -> PoolHandle:
        if not self._free:
            raise CacheFullError(
                f"every session needs a sequence of its own; all {self._total} are in use. "
                "End a session, or init the cache with more max_sequences."
            )
        return PoolHandle(self._cache, self._free.pop(), on_release=self._free.append)


class PoolHandle(SequenceHandle):
    """One sequence of a multi-sequence cache. on_release: called with its id in the end."""

    def __init__(self, cache: Cache, sequence: int, on_release: Callable[[int], None]) -> None:
        self._cache, self._sequence, self._on_release = cache, sequence, on_release

    @property
    def sequence(self) -> int:
        return self._sequence

    @property
    def caches(self) -> LayerCaches[KVCache]:
        raise KVCacheError("sessions over a pool share its cache. Use sequence.")

    @property
    def length(self) -> int:
        return self._cache.next_position(self._sequence)

    def restore(self, snapshots: Sequence[Snapshot], stop: int) -> None:
        self._cache.restore(self._sequence, *snapshots, stop=stop)

    def schedule(self, positions: Iterable[int]) -> None:
        self._cache.schedule(self._sequence, positions)

    def capture(self, start: int, stop: int) -> Snapshot:
        return self._cache.snapshot(self._sequence, start, stop)

    def release(self) -> None:
        self._cache.remove(self._sequence, 0)
        self._on_release(self._sequence)


class LayerSequences(SequenceSource):
    """New per-layer caches for every session, with snapshots in host memory.

    caches: one per layer, empty; sessions get copies of them.
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        if not caches or any(cache.offset for cache in caches):
            raise ValueError(f"give one empty cache for every layer; got {list(caches)}.")
        self.lock = Lock()
        self.backend: Backend | None = None
        """Backend of the last snapshot, for restoring to caches that name none."""
        self._prototypes = LayerCaches(caches)

    def acquire(self) -> LayerHandle:
        return LayerHandle(self._prototypes.copy(), self)


class LayerHandle(SequenceHandle):
    """The per-layer caches of one session."""

    def __init__(self, caches: LayerCaches[KVCache], source: LayerSequences) -> None:
        self._caches, self._source = caches, source

    @property
    def sequence(self) -> int:
        raise KVCacheError("sessions over per-layer caches have no sequence id. Use caches.")

    @property
    def caches(self) -> LayerCaches[KVCache]:
        return self._caches

    @property
    def length(self) -> int:
        return min(cache.offset for cache in self._caches)

    def restore(self, snapshots: Sequence[Snapshot], stop: int) -> None:
        self._caches.restore(*snapshots, stop=stop, backend=self._source.backend)

    def schedule(self, positions: Iterable[int]) -> None:
        self._caches.schedule(positions)

    def capture(self, start: int, stop: int) -> Snapshot:
        # Known only now: caches that name no backend take that of their first tokens.
        self._source.backend = self._caches[0].backend
        # To the host at once: the caches, where it would be resident, end with the session.
        return self._caches.snapshot(start, stop).to_host()

    def release(self) -> None:
        self._caches.reset()
