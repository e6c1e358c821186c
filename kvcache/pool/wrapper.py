"""Several caches behind one: models whose layers differ in what they keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from typing import Self

from kvcache.backends import Array, Backend, CacheConfig
from kvcache.snapshots.snapshot import CacheSpec, Part

from .base import Cache, Commit
from .batch import Batch


class WrapperCache(Cache):
    """`caches`, which see the same passes; the model says which one a layer uses.

    ::

        cache = WrapperCache(CausalCache(window=512), CausalCache())
        cache.set_layer_type(layer % 2)
        cache.set_layer(layer)
        cache.put(k, v)
    """

    def __init__(self, *caches: Cache) -> None:
        if not caches:
            raise ValueError("a wrapper needs at least one cache; got none.")
        self.caches = caches
        self._type = 0
        self._share_lock()

    def _share_lock(self) -> None:
        """What changes one of the caches changes this one."""
        for cache in self.caches:
            cache.share_lock(self.lock)

    def set_layer_type(self, index: int) -> None:
        """Choose the cache that `set_layer`, `put`, `get` and `set_causal` are about."""
        if not 0 <= index < len(self.caches):
            raise ValueError(f"layer types here are 0 to {len(self.caches) - 1}; got {index}.")
        self._type = index

    @property
    def underlying_cache(self) -> Cache:
        """The cache chosen last."""
        return self.caches[self._type]

    def set_config(self, config: CacheConfig) -> None:
        for cache in self.caches:
            cache.set_config(config)

    def init(
        self,
        backend: str | Backend,
        dtype: str = "float32",
        *,
        max_sequences: int = 1,
        capacity: int,
        max_batch: int,
    ) -> None:
        sizes = {"max_sequences": max_sequences, "capacity": capacity, "max_batch": max_batch}
        try:
            for cache in self.caches:
                cache.init(backend, dtype, **sizes)
        except Exception:
            self.close()  # none of them has begun
            raise

    def prepare_forward(self, batch: Batch, reserve: bool) -> Commit:
        return self._all(lambda cache: cache.prepare_forward(batch, reserve))

    def prepare_copy_prefix(self, source: int, target: int, length: int) -> Commit:
        return self._all(lambda cache: cache.prepare_copy_prefix(source, target, length))

    def prepare_remove(self, sequence: int, start: int, stop: int | None) -> Commit:
        return self._all(lambda cache: cache.prepare_remove(sequence, start, stop))

    def _all(self, prepare: Callable[[Cache], Commit]) -> Commit:
        return _together([prepare(cache) for cache in self.caches])

    def set_layer(self, layer: int) -> None:
        self.underlying_cache.set_layer(layer)

    def put(self, keys: Array, values: Array | None = None) -> None:
        self.underlying_cache.put(keys, values)

    def get(self) -> tuple[Array, Array | None, Array | None]:
        return self.underlying_cache.get()

    def set_causal(self, except_: Sequence[int] = ()) -> None:
        self.underlying_cache.set_causal(except_)

    def can_resume(self, sequence: int, position: int) -> bool:
        return all(cache.can_resume(sequence, position) for cache in self.caches)

    # Snapshots.

    @property
    def max_sequences(self) -> int:
        return self.caches[0].max_sequences

    @property
    def specs(self) -> list[CacheSpec]:
        return [each for cache in self.caches for each in cache.specs]

    def next_position(self, sequence: int) -> int:
        return max(cache.next_position(sequence) for cache in self.caches)

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        places = list(positions)
        for cache in self.caches:
            cache.schedule(sequence, places)

    def capture(self, sequence: int, start: int, stop: int) -> list[Part]:
        return [part for cache in self.caches for part in cache.capture(sequence, start, stop)]

    def prepare_restore(
        self, sequence: int, parts: Sequence[Sequence[Part]], position: int
    ) -> Commit:
        commits, first = [], 0
        for cache in self.caches:
            last = first + len(cache.specs)
            mine = [each[first:last] for each in parts]
            commits.append(cache.prepare_restore(sequence, mine, position))
            first = last
        return _together(commits)

    def to_backend(self, backend: str | Backend) -> Self:
        twin = copy(self)
        vars(twin).pop("lock", None)
        twin.caches = tuple(cache.to_backend(backend) for cache in self.caches)
        twin._share_lock()
        return twin

    def close(self) -> None:
        for cache in self.caches:
            cache.close()


def _together(commits: Sequence[Commit]) -> Commit:
    def commit() -> None:
        for each in commits:
            each()

    return commit
