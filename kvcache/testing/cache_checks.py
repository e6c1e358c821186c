"""Checks of the caches on a backend, against a list of positions as the oracle."""

from __future__ import annotations

import numpy as np

from kvcache.backends import Backend
from kvcache.layers.growing import KVCache
from kvcache.layers.rotating import RotatingKVCache

from .backend_checks import check
from .coded import TOKENS, coded, same

KEYS, VALUES = (2, 3, 1, 4), (2, 3, 1, 5)
CHUNKS = (1, 6, 1, 1, 9, 2, 1, 1, 1, 4, 20, 1)


def _visible(query: int, cache: KVCache) -> list[int]:
    """Positions that the token at `query` may attend to."""
    everything = list(range(query + 1))
    if not isinstance(cache, RotatingKVCache):
        return everything
    oldest = query - (cache.max_size - cache.keep)
    return [position for position in everything if position < cache.keep or position > oldest]


def _run(backend: Backend, dtype: str, cache: KVCache) -> None:
    for tokens in CHUNKS:
        first = cache.offset
        keys = coded((*KEYS[:TOKENS], tokens, KEYS[3]), dtype, first)
        values = coded((*VALUES[:TOKENS], tokens, VALUES[3]), dtype, first)
        update = cache.update(backend.from_host(keys), backend.from_host(values))
        positions = cache.positions
        mask = cache.mask(tokens)
        allowed = np.ones((tokens, positions.size), bool)
        if mask is not None:
            # Booleans, or 0 and -inf: what the backend's config asks for.
            allowed = backend.to_host(mask) == (backend.config.mask_dtype == "bool")
        for got, shape in zip(update, (KEYS, VALUES), strict=True):
            columns = backend.to_host(got)
            for row, query in enumerate(range(first, cache.offset)):
                seen = np.flatnonzero(allowed[row])
                order = seen[np.argsort(positions[seen])]
                wanted = _visible(query, cache)
                expected = [coded(shape, dtype, position) for position in wanted]
                same(np.take(columns, order, TOKENS), np.concatenate(expected, TOKENS))


@check
def growing_cache_returns_everything(backend: Backend, dtype: str) -> None:
    """Whatever the chunks, every query sees all tokens up to itself, growth included."""
    _run(backend, dtype, KVCache(backend, step=4))


@check
def rotating_cache_returns_the_window(backend: Backend, dtype: str) -> None:
    """Whatever the chunks, every query sees its whole window and the sinks, nothing else."""
    _run(backend, dtype, RotatingKVCache(8, keep=0, backend=backend, step=4))
    _run(backend, dtype, RotatingKVCache(7, keep=3, backend=backend, step=4))
