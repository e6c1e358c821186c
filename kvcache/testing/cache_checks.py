"""Checks of the caches on a backend; the oracle is a list of positions.

They find faults that show only in a chain of updates, growth and masks.
"""

from __future__ import annotations

import numpy as np

from kvcache.backends import Backend
from kvcache.layers.growing import KVCache
from kvcache.layers.rotating import RotatingKVCache
from kvcache.storage.layout import TOKENS

from .checks import check
from .coded import coded, same

KEYS, VALUES = (2, 3, 1, 4), (2, 3, 1, 5)
"""Shapes of one token. Keys and values differ in head_dim, as in some models."""
CHUNKS = (1, 6, 1, 1, 9, 6, 1, 1, 1, 6, 20, 1)
"""Tokens per update: single ones before and after chunks shorter and longer than the rings.

Few different numbers, as some frameworks compile a program for each.
"""


def _visible(query: int, cache: KVCache) -> list[int]:
    """Return the positions visible to the token at `query`."""
    positions = list(range(query + 1))
    if not isinstance(cache, RotatingKVCache):
        return positions
    oldest = query - (cache.max_size - cache.keep)
    return [position for position in positions if position < cache.keep or position > oldest]


def _check_chunks(backend: Backend, dtype: str, cache: KVCache) -> None:
    """Update `cache` chunk by chunk; compare the columns visible to each query with the oracle."""
    for tokens in CHUNKS:
        first = cache.offset
        keys = coded((*KEYS[:TOKENS], tokens, KEYS[3]), dtype, first)
        values = coded((*VALUES[:TOKENS], tokens, VALUES[3]), dtype, first)
        held_arrays = cache.update(backend.from_host(keys), backend.from_host(values))
        positions = cache.positions
        mask = cache.mask(tokens)
        allowed = np.ones((tokens, positions.size), bool)
        if mask is not None:
            # Booleans, or 0 and -inf: what the backend's config asks for.
            allowed = backend.to_host(mask) == (backend.config.mask_dtype == "bool")
        for held, shape in zip(held_arrays, (KEYS, VALUES), strict=True):
            columns = backend.to_host(held)
            for row, query in enumerate(range(first, cache.offset)):
                visible = np.flatnonzero(allowed[row])
                # Columns of a ring come in any order; attention does not mind, the oracle does.
                order = visible[np.argsort(positions[visible])]
                expected = [coded(shape, dtype, position) for position in _visible(query, cache)]
                same(np.take(columns, order, TOKENS), np.concatenate(expected, TOKENS))


@check
def growing_cache_returns_everything(backend: Backend, dtype: str) -> None:
    """Carry a growing cache: every query sees all tokens up to itself, whatever the chunks."""
    _check_chunks(backend, dtype, KVCache(backend, step=4))


@check
def rotating_cache_returns_the_window(backend: Backend, dtype: str) -> None:
    """Carry a rotating cache: every query sees its window and the sinks, whatever the chunks."""
    _check_chunks(backend, dtype, RotatingKVCache(8, keep=0, backend=backend, step=4))
    _check_chunks(backend, dtype, RotatingKVCache(7, keep=3, backend=backend, step=4))
