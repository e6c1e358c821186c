"""Sequences of sessions in one pool."""

from __future__ import annotations

from collections.abc import Collection, Container, Hashable, Iterable, Sequence

from kvcache._checks import as_indices, check_ids
from kvcache.errors import CacheFullError, KVCacheError
from kvcache.layers.base import LayerCache
from kvcache.layers.stack import LayerCaches
from kvcache.pool.base import Cache
from kvcache.snapshots.snapshot import CacheSpec, Snapshot

from .known import KnownTokens
from .sequences import SequenceHandle, SequenceSource


class PoolSequences(SequenceSource):
    """Sequences of one multi-sequence cache, and their owner; snapshots share their cells.

    sequences: ids that may be used, None for all of the cache.

    Raises: KVCacheError for a sequence that has another owner, or holds tokens.
    """

    medium = "GPU"  # as vLLM calls it on every device

    def __init__(self, cache: Cache, sequences: Iterable[int] | None) -> None:
        self.lock = cache.lock
        self._cache = cache
        chosen = range(cache.max_sequences) if sequences is None else sequences
        # Reversed: taken from the end, the first named is used first.
        self._free = as_indices(chosen, "sequences")[::-1]
        if not self._free:
            raise ValueError("sessions need a sequence each; got none. Name some, or leave out.")
        self._total = len(self._free)
        check_ids(cache.max_sequences, *self._free)
        if len(set(self._free)) < self._total:
            raise ValueError(f"sessions share no sequence; name each once, got {self._free[::-1]}.")
        # By sequence of an open session.
        self._known: dict[int, KnownTokens] = {}
        self._points: dict[int, set[int]] = {}
        self.layers: frozenset[Hashable] = frozenset()
        """Layers that passes through the whole model have put."""
        cache.claim(self._free, self)

    @property
    def specs(self) -> list[CacheSpec]:
        return self._cache.specs

    @property
    def restorable(self) -> bool:
        return True

    def acquire(self) -> PoolHandle:
        if not self._free:
            raise CacheFullError(
                f"every session needs a sequence of its own; all {self._total} are in use. "
                "End a session, or init the cache with more max_sequences."
            )
        if tokens := self._cache.next_position(self._free[-1]):
            raise KVCacheError(
                f"a sequence of sessions is used by them alone; sequence {self._free[-1]} holds "
                f"{tokens} tokens of no session. Remove them, and name other sequences for them."
            )
        return PoolHandle(self._cache, self._free.pop(), self)

    def adopt(self, caches: Sequence[LayerCache], tokens: int) -> SequenceHandle:
        raise KVCacheError(
            "a prefix cache over a pool stores what its sessions put there. Use session(), or a "
            "prefix cache over per-layer caches."
        )

    def track(self, sequence: int, known: KnownTokens) -> None:
        """Keep `known` true of a sequence until it is released."""
        self._known[sequence] = known

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        """Make `positions` resume points of a sequence until it is released."""
        points = as_indices(positions, "positions")
        self._cache.schedule(sequence, points)
        self._points.setdefault(sequence, set()).update(points)

    def release(self, sequence: int) -> None:
        """Empty a sequence, for another session to use."""
        self._known.pop(sequence, None)
        self._points.pop(sequence, None)
        try:
            self._cache.remove(sequence, 0)
        finally:  # a pool that was closed meanwhile may be initialised again
            self._free.append(sequence)

    # As the owner of sequences.

    @property
    def recorded(self) -> Container[int]:
        return self._known

    def resume_points(self, sequence: int) -> Collection[int]:
        return self._points.get(sequence, ())

    def truncated(self, sequence: int, length: int) -> None:
        self._known[sequence].truncate(length)

    def invalidated(self, sequence: int, start: int) -> None:
        self._known[sequence].invalidate(start)

    def copied(self, source: int, target: int, length: int) -> None:
        self._known[target].replace(self._known.get(source), length)

    def looked_ahead(self, sequence: int, start: int, stop: int) -> None:
        self._known[sequence].look_ahead(start, stop)


class PoolHandle(SequenceHandle):
    """One sequence of a multi-sequence cache. source: gets it back in the end."""

    def __init__(self, cache: Cache, sequence: int, source: PoolSequences) -> None:
        self._cache, self._sequence, self._source = cache, sequence, source

    @property
    def sequence(self) -> int:
        return self._sequence

    @property
    def caches(self) -> LayerCaches[LayerCache]:
        raise KVCacheError("sessions over a pool share its cache. Use sequence.")

    def held(self, limit: int) -> int:
        return min(limit, self._cache.next_position(self._sequence))

    def is_whole(self, stop: int) -> bool:
        # At the end, because a window may have passed `stop`; or there, where it is the end of one
        # part of a wrapper.
        places = {self._cache.next_position(self._sequence), stop}
        return any(self._cache.can_resume(self._sequence, place) for place in places)

    @property
    def settled(self) -> bool:
        return bool(self._source.layers)

    def settle(self) -> None:
        self._source.layers |= self._cache.latest_pass(self._sequence).layers
        self._cache.settle_pass()

    def surely_held(self, held: int, restored: int) -> int:
        latest = self._cache.latest_pass(self._sequence)
        if latest.start is None:
            return held
        # A session goes on to another pass when one went through the whole model.
        if latest.start > restored and not latest.grew:
            self.settle()
        known = bool(latest.layers) and latest.layers <= self._source.layers
        return held if known else min(held, latest.start)

    def restore(self, snapshots: Sequence[Snapshot], stop: int) -> None:
        self._cache.restore(self._sequence, *snapshots, stop=stop)

    def track(self, known: KnownTokens) -> None:
        self._source.track(self._sequence, known)

    def update_known(self) -> None:
        """Do nothing: the pool tells of every change."""

    def truncate(self, length: int) -> None:
        self._cache.remove(self._sequence, length)

    def adopt(self, caches: LayerCaches[LayerCache]) -> None:
        raise KVCacheError("sessions over a pool share its cache. Batch their sequences.")

    def schedule(self, positions: Iterable[int]) -> None:
        self._source.schedule(self._sequence, positions)

    def capture(self, start: int, stop: int) -> Snapshot:
        return self._cache.snapshot(self._sequence, start, stop)

    def release(self, keep: bool = False) -> None:
        self._source.release(self._sequence)
