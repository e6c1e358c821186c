"""Sequences of sessions: in one pool, or in per-layer caches of each session's own."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Container, Hashable, Iterable, Sequence

from kvcache._checks import as_indices, check_ids
from kvcache._locks import Lock
from kvcache.backends import Backend
from kvcache.errors import CacheFullError, KVCacheError
from kvcache.layers.base import LayerCache, kind_of
from kvcache.layers.stack import LayerCaches
from kvcache.pool.base import Cache
from kvcache.snapshots.snapshot import CacheSpec, Snapshot

from .arguments import as_layers, check_layers
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
        """Have `caches` in place of its own from now on. Raises: KVCacheError over a pool."""

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

        Raises: KVCacheError over a pool, ValueError, TypeError for other caches.
        """


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
        self._known: dict[int, KnownTokens] = {}  # by sequence of an open session
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

    def release(self, sequence: int) -> None:
        """Empty a sequence, for another session to use."""
        self._known.pop(sequence, None)
        try:
            self._cache.remove(sequence, 0)
        finally:  # a pool that was closed meanwhile may be initialised again
            self._free.append(sequence)

    # As the owner of sequences.

    @property
    def recorded(self) -> Container[int]:
        return self._known

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
        self._cache.schedule(self._sequence, positions)

    def capture(self, start: int, stop: int) -> Snapshot:
        return self._cache.snapshot(self._sequence, start, stop)

    def release(self) -> None:
        self._source.release(self._sequence)


class LayerSequences(SequenceSource):
    """New per-layer caches for every session, with snapshots that depend on none of them.

    caches: one per layer, empty; sessions get copies of them.
    """

    medium = "CPU"  # snapshots are detached

    def __init__(self, caches: Sequence[LayerCache]) -> None:
        layers = as_layers(
            caches, "a prefix cache is over one cache of several sequences, or per-layer caches"
        )
        if not layers or any(cache.offset for cache in layers):
            raise ValueError(f"give one empty cache for every layer; got {layers}.")
        self.lock = Lock()
        self.backend: Backend | None = None
        """Backend of the last snapshot, for restoring to caches that name none."""
        # Copies: the caller may go on with its own.
        self._prototypes = LayerCaches(layers).copy()

    @property
    def specs(self) -> list[CacheSpec]:
        return [
            CacheSpec(kind_of(type(cache)), cache.visibility, cache.dtype or "")
            for cache in self._prototypes
        ]

    @property
    def restorable(self) -> bool:
        # Caches that name no backend have none before the first tokens.
        return all((cache.backend or self.backend) is not None for cache in self._prototypes)

    def acquire(self) -> LayerHandle:
        return LayerHandle(self._prototypes.copy(), self)

    def adopt(self, caches: Sequence[LayerCache], tokens: int) -> LayerHandle:
        layers = as_layers(caches, "what is stored are the per-layer caches of one sequence")
        offsets = [cache.offset for cache in layers]
        kinds = [(kind_of(type(cache)), cache.visibility) for cache in layers]
        wanted = [(kind_of(type(cache)), cache.visibility) for cache in self._prototypes]
        padded = any(cache.padding is not None for cache in layers)
        if kinds != wanted or {*offsets} != {tokens} or padded:
            raise ValueError(
                "what is stored are caches of the kinds given to the prefix cache, without "
                f"padding, that hold as many tokens as are named; got {layers} for {tokens} "
                "tokens. Take the caches of a row by split()."
            )
        for cache in layers:
            cache.check_not_exported()
        return LayerHandle(LayerCaches(layers), self)


class LayerHandle(SequenceHandle):
    """The per-layer caches of one session."""

    def __init__(self, caches: LayerCaches[LayerCache], source: LayerSequences) -> None:
        self._caches, self._source = caches, source
        self._known: KnownTokens | None = None

    @property
    def sequence(self) -> int:
        raise KVCacheError("sessions over per-layer caches have no sequence id. Use caches.")

    @property
    def caches(self) -> LayerCaches[LayerCache]:
        return self._caches

    def held(self, limit: int) -> int:
        return min(limit, *(cache.offset for cache in self._caches))

    def is_whole(self, stop: int) -> bool:
        return True  # positions of updates follow one another

    @property
    def settled(self) -> bool:
        return True

    def settle(self) -> None:
        """Do nothing: every layer counts its tokens."""

    def surely_held(self, held: int, restored: int) -> int:
        return held

    def restore(self, snapshots: Sequence[Snapshot], stop: int) -> None:
        self._caches.restore(*snapshots, stop=stop, backend=self._source.backend)

    def track(self, known: KnownTokens) -> None:
        self._forget_rewinds()
        self._known = known

    def update_known(self) -> None:
        rewinds = [cache.rewound for cache in self._caches if cache.rewound is not None]
        if not rewinds or self._known is None:
            return
        if any(rewind.refilled for rewind in rewinds):
            self._known.invalidate(0)
        else:
            self._known.truncate(min(rewind.length for rewind in rewinds))
        # Last: if this is interrupted, the same is done once more.
        self._forget_rewinds()

    def _forget_rewinds(self) -> None:
        for cache in self._caches:
            cache.rewound = None

    def truncate(self, length: int) -> None:
        self._caches.trim(max(0, self._caches.offset - length))
        self.update_known()

    def adopt(self, caches: LayerCaches[LayerCache]) -> None:
        check_layers(caches, self._caches)
        self._caches = caches
        self._forget_rewinds()

    def schedule(self, positions: Iterable[int]) -> None:
        self._caches.schedule(positions)

    def capture(self, start: int, stop: int) -> Snapshot:
        # Known only now: caches that name no backend take that of their first tokens.
        self._source.backend = self._caches[0].backend
        # At once: the caches, where it would be resident, end with the session.
        snapshot = self._caches.snapshot(start, stop)
        try:
            return snapshot.detach()
        except BaseException:
            snapshot.close()
            raise

    def release(self) -> None:
        self._caches.reset()


def sequences_of(
    cache: Cache | Sequence[LayerCache], sequences: Iterable[int] | None
) -> SequenceSource:
    """Return the sequences for sessions over a cache. sequences: of a pool, None for all.

    Raises: as :class:`PoolSequences` and :class:`LayerSequences`.
    """
    if isinstance(cache, Cache):
        return PoolSequences(cache, sequences)
    return LayerSequences(cache)
