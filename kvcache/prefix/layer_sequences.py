"""Sequences of sessions in per-layer caches of each session's own."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

from kvcache._locks import Lock
from kvcache.backends import Backend
from kvcache.errors import KVCacheError
from kvcache.layers.base import LayerCache, kind_of
from kvcache.layers.stack import LayerCaches
from kvcache.snapshots.snapshot import CacheSpec, Snapshot

from .arguments import as_layers, check_layers
from .known import KnownTokens
from .sequences import SequenceHandle, SequenceSource


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
        self._in_use: weakref.WeakSet[LayerHandle] = weakref.WeakSet()

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
        handle = LayerHandle(self._prototypes.copy(), self)
        self._in_use.add(handle)
        return handle

    def check_free(self, caches: Iterable[LayerCache], user: LayerHandle | None = None) -> None:
        """Raise KVCacheError if any of `caches` belongs to a sequence in use, other than `user`.

        Of a change in them only one would hear.
        """
        others = {
            id(cache): cache for own in self._in_use if own is not user for cache in own.caches
        }
        for cache in caches:
            if id(cache) in others:
                raise KVCacheError(
                    f"a session is the only one that has its caches; got {cache} of another one. "
                    "Copy them, or close or detach that session first."
                )

    def leave(self, handle: LayerHandle) -> None:
        """Note that a sequence is not in use any more."""
        self._in_use.discard(handle)

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
        self.check_free(layers)
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
        self._source.check_free(caches, self)
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

    def release(self, keep: bool = False) -> None:
        self._source.leave(self)
        if not keep:
            self._caches.reset()
