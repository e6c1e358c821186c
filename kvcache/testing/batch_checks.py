"""Checks of the rows of a batch in the caches of layers; the oracle is a list of tokens per row."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvcache.backends import Backend, HostArray
from kvcache.backends.arrays import Arrays
from kvcache.layers.growing import KVCache
from kvcache.layers.recurrent import StateCache
from kvcache.layers.rotating import RotatingKVCache
from kvcache.storage.layout import TOKENS

from .cache_checks import visible_positions
from .checks import check
from .coded import coded, same

HEADS, DIMS = 2, (3, 2)
"""Heads of keys and values, and the head_dim of each."""


class Batch:
    """A cache, and the codes of the tokens of each row, padding included.

    codes: by row and column. padding: columns of each row before its first token.
    """

    def __init__(self, cache: KVCache, backend: Backend, dtype: str, padding: list[int]) -> None:
        self.cache, self.backend, self.dtype = cache, backend, dtype
        self.codes: list[list[int]] = [[] for _ in padding]
        self.padding = padding
        cache.pad(padding)

    def push(self, tokens: int) -> None:
        """Update the cache, and compare what the queries of each row see."""
        first = 40 * self.cache.offset
        for row, codes in enumerate(self.codes):
            codes.extend(range(first + 20 * row, first + 20 * row + tokens))
        update = [codes[-tokens:] for codes in self.codes]
        keys, values = (
            self.backend.from_host(np.concatenate([self._row(own, dim) for own in update]))
            for dim in DIMS
        )
        columns = self.cache.update(keys, values)
        for row in range(len(self.codes)):
            self._check_row(row, tokens, columns)

    def _row(self, codes: list[int], dim: int) -> HostArray:
        """Return the tokens of these codes, ``[1, heads, tokens, dim]``."""
        tokens = [coded((1, HEADS, 1, dim), self.dtype, code) for code in codes]
        return np.concatenate(tokens, TOKENS)

    def _check_row(self, row: int, tokens: int, columns: Arrays) -> None:
        codes, padding = self.codes[row], self.padding[row]
        shown = self._shown(row, tokens)
        for query, seen in enumerate(shown, self.cache.offset - tokens - padding):
            # A query of padding sees itself, and no token.
            wanted = visible_positions(query, self.cache) if query >= 0 else [query]
            expected = [codes[position + padding] for position in wanted]
            for array, dim in zip(columns, DIMS, strict=True):
                host = self.backend.to_host(array)[row : row + 1]
                same(np.compress(seen, host, TOKENS), self._row(expected, dim))

    def _shown(self, row: int, tokens: int) -> HostArray:
        """Return the mask of the latest queries of a row as bools."""
        mask = self.cache.mask(tokens)
        if mask is None:
            return np.ones((tokens, self.cache.positions.shape[-1]), bool)
        host = self.backend.to_host(mask)
        own = host if host.ndim == 2 else host[row, 0]  # of all rows, or of each
        # Booleans, or 0 and -inf: what the backend's config asks for.
        return np.asarray(own == (self.backend.config.mask_dtype == "bool"))

    def take(self, cache: KVCache, rows: list[int]) -> None:
        """Go on with `cache`, which has some of the rows."""
        self.cache = cache
        self.codes = [[*self.codes[row]] for row in rows]
        self.padding = [self.padding[row] for row in rows]


def _batches(backend: Backend, dtype: str, padding: list[int]) -> Iterator[Batch]:
    for cache in (KVCache(backend, step=4), RotatingKVCache(6, 2, backend, step=4)):
        yield Batch(cache, backend, dtype, padding)


@check
def padding_of_rows_is_hidden(backend: Backend, dtype: str) -> None:
    """Begin the rows of a batch at several tokens: each sees its own, by its own positions."""
    for batch in _batches(backend, dtype, [0, 3]):
        for tokens in (6, 1, 1, 6):
            batch.push(tokens)


@check
def rows_of_a_batch_are_selected(backend: Backend, dtype: str) -> None:
    """Reorder and repeat rows: each goes on with its own tokens, and states with theirs."""
    for batch in _batches(backend, dtype, [0, 3]):
        batch.push(6)
        for rows in ([1, 0], [0, 1, 0]):
            batch.cache.select(rows)
            batch.take(batch.cache, rows)
            batch.push(1)
    states, host = StateCache(backend), coded((3, 2, 1, 4), dtype)[:, :, 0]
    states.advance(1, backend.from_host(host))
    states.select([2, 0, 2])
    same(backend.to_host(states.state[0]), host[[2, 0, 2]])


@check
def rows_of_a_batch_are_split_and_joined(backend: Backend, dtype: str) -> None:
    """Make a cache of each row, and one of all again: rows keep their tokens, at one end."""
    batch = Batch(KVCache(backend, step=4), backend, dtype, [0, 3])
    batch.push(6)
    one, other = batch.cache.split()
    batch.take(KVCache.concat([other, one]), [1, 0])
    batch.push(1)
    states, host = StateCache(backend), coded((2, 2, 1, 4), dtype)[:, :, 0]
    states.advance(1, backend.from_host(host))
    first, second = states.split()
    joined = StateCache.concat([second, first])
    same(backend.to_host(joined.state[0]), host[[1, 0]])
