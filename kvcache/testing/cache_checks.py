"""Checks of the caches on a backend; the oracle is a list of positions.

They find faults that show only in a chain of updates, growth and masks.
"""

from __future__ import annotations

import numpy as np

from kvcache.backends import HOST_DTYPES, Backend, HostArray
from kvcache.backends.arrays import Arrays
from kvcache.backends.nonfinite import largest_power
from kvcache.layers.growing import KVCache
from kvcache.layers.rotating import RotatingKVCache
from kvcache.pool.batch import Batch
from kvcache.pool.causal import CausalCache
from kvcache.storage.layout import TOKENS

from .checks import check
from .coded import coded, same

KEYS, VALUES = (2, 3, 1, 4), (2, 3, 1, 5)
"""Shapes of one token. Keys and values differ in head_dim, as in some models."""
CHUNKS = (1, 6, 1, 1, 9, 6, 1, 1, 1, 6, 20, 1)
"""Tokens per update: single ones before and after chunks shorter and longer than the rings.

Few different numbers, as some frameworks compile a program for each.
"""


def visible_positions(query: int, cache: KVCache) -> list[int]:
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
                expected = [
                    coded(shape, dtype, position) for position in visible_positions(query, cache)
                ]
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


@check
def pools_store_finite_numbers(backend: Backend, dtype: str) -> None:
    """Replace NaN and infinity that are put in a pool, and nothing else, slices and rows alike."""
    if "float" not in dtype:
        return
    host = HOST_DTYPES[dtype]
    for cells in (range(4), (3, 0, 2, 1)):
        keys, values = np.ones((2, 4, 3), host), np.ones((2, 4, 3), host)
        keys[1, 1, 2], values[0, 2, 0] = np.nan, -np.nan
        if dtype != "float8_e4m3fn":  # which has no infinity
            keys[0, 3, 1], values[1, 0, 1] = np.inf, -np.inf
        stored_keys, stored_values = keys.copy(), values.copy()
        wrong = ~(np.isfinite(keys) & np.isfinite(values))
        stored_keys[wrong], stored_values[wrong] = 0, largest_power(dtype)
        pair = backend.from_host(keys), backend.from_host(values)
        for stored, expected in zip(
            _stored(backend, pair, list(cells)), (stored_keys, stored_values), strict=True
        ):
            same(stored, expected[:, np.argsort(cells)])


def _stored(backend: Backend, pair: Arrays, cells: list[int]) -> list[HostArray]:
    """Return what is in ``[2, 4, 3]`` buffers after `pair` was written to their `cells`."""
    name = backend.dtype_name(pair[0])
    buffers: Arrays = tuple(backend.alloc((2, 4, 3), name) for _ in pair)
    if cells == [0, 1, 2, 3]:
        buffers = backend.write_finite_slices(buffers, pair, 0, 4, (1, 1))
    else:
        index = backend.row_index(np.array(cells, np.int32))
        buffers = backend.write_finite_row_sets(buffers, pair, index, (1, 1))
    return [backend.to_host(buffer) for buffer in buffers]


@check
def programs_store_finite_numbers(backend: Backend, dtype: str) -> None:
    """Replace in a program what a put replaces, whatever the layout and number of arrays."""
    keys = np.ones((2, 4, 3), HOST_DTYPES[dtype])
    if "float" in dtype:
        keys[1, 2, 0] = np.nan
    for axes in ((1,), (1, 1), (1, 2), (1, 1, 1)):
        others = [np.ones((2, 4, 3) if axis == 1 else (2, 3, 4), keys.dtype) for axis in axes[1:]]
        arrays = tuple(map(backend.from_host, [keys, *others]))
        expected = backend.replace_nonfinite(arrays, axes)
        for array, replaced in zip(
            backend.traced_replace_nonfinite(arrays, axes), expected, strict=True
        ):
            host = backend.to_host(array)
            same(host, backend.to_host(replaced))
            if not np.isfinite(host.astype(np.float64)).all():
                raise AssertionError("NaN is left")


@check
def a_neighbour_cannot_pass_on_nan(backend: Backend, dtype: str) -> None:
    """Attend to a sequence beside one that put NaN: in one pass with it, and after its removal."""
    if "float" not in dtype:
        return
    cache = CausalCache()
    cache.init(backend, dtype, max_sequences=2, capacity=8, max_batch=8)
    for position in range(3):
        cache.start_forward(Batch([position] * 2, [0, 1]))
        rows = np.ones((1, 2, 4), HOST_DTYPES[dtype])
        rows[:, 1] = np.nan
        cache.put(backend.from_host(rows), backend.from_host(rows))
        _check_ones(backend, cache, row=0)
    cache.remove(1, 0)
    cache.start_forward(Batch([3], [0]))
    ones = np.ones((1, 1, 4), HOST_DTYPES[dtype])
    cache.put(backend.from_host(ones), backend.from_host(ones))
    _check_ones(backend, cache, row=0)


def _check_ones(backend: Backend, cache: CausalCache, row: int) -> None:
    """Raise AssertionError unless token `row` of the pass attends to values of 1 only."""
    keys, values, mask = cache.get()
    hidden = backend.to_host(mask)[row].astype(np.float64)
    # A kernel adds the mask, even one of booleans: hidden scores stay in the sum.
    bias = hidden if backend.config.mask_dtype != "bool" else np.where(hidden, 0, -np.inf)
    scores = backend.to_host(keys).astype(np.float64).sum(-1) + bias
    weights = np.exp(scores - scores.max())
    assert values is not None
    out = (weights / weights.sum()) @ backend.to_host(values)[0].astype(np.float64)
    if not np.allclose(out, 1):
        raise AssertionError(f"expected ones, got {out}")
