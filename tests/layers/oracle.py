"""A cache that is slow and obviously right, and what compares a real one with it.

The oracle is a list: token p, as the bytes of its key and of its value, is at index p. What a
rotating cache holds of it, and what a query may see, is a list comprehension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvcache import RotatingKVCache
from kvcache.storage.layout import TOKENS
from kvcache.testing.coded import coded


class Token(NamedTuple):
    """One token: the bytes of its key ``[B, kv_heads, head_dim]``, and those of its value."""

    key: bytes
    value: bytes


@dataclass
class Oracle:
    """Every token since the last reset. max_size None: a cache that only grows."""

    max_size: int | None = None
    keep: int = 0
    tokens: list[Token] = field(default_factory=list)

    @property
    def offset(self):
        return len(self.tokens)

    def visible(self, query, window=None):
        """Positions that the token at `query` sees: its window, itself included, and the sinks."""
        widths = [window or query + 1, query + 1]
        if self.max_size is not None:
            widths.append(self.max_size - self.keep)
        oldest = query - min(widths) + 1
        return [p for p in range(query + 1) if p >= oldest or p < self.keep]

    def held(self):
        """Positions still stored: what a query at the last position would see."""
        return self.visible(self.offset - 1) if self.tokens else []

    def can_trim(self, tokens):
        displaced = len(self.held()) < self.offset
        return tokens == 0 or (0 <= tokens <= self.offset and not displaced)

    def cut(self, offset):
        """Forgets the tokens from position `offset` on."""
        del self.tokens[offset:]

    def copy(self):
        return Oracle(self.max_size, self.keep, list(self.tokens))


def oracle_for(cache):
    """An empty oracle with the limits of `cache`."""
    if isinstance(cache, RotatingKVCache):
        return Oracle(cache.max_size, cache.keep)
    return Oracle()


class Shape(NamedTuple):
    """What the updates of one cache have in common."""

    batch: int = 1
    kv_heads: int = 2
    key_dim: int = 4
    value_dim: int = 3
    dtype: str = "float32"

    def keys(self, tokens, stamp):
        return coded((self.batch, self.kv_heads, tokens, self.key_dim), self.dtype, stamp)

    def values(self, tokens, stamp):
        # Others than the keys, also where the head_dims agree.
        return coded((self.batch, self.kv_heads, tokens, self.value_dim), self.dtype, stamp + 5000)


SHAPE = Shape()


def rows(array):
    """The bytes of each token of ``[B, kv_heads, tokens, head_dim]``."""
    return [np.ascontiguousarray(row).tobytes() for row in np.moveaxis(array, TOKENS, 0)]


def host_rows(backend, arrays):
    """Keys and values on a backend as tokens."""
    return [Token(*row) for row in zip(*(rows(backend.to_host(a)) for a in arrays), strict=True)]


def push(cache, oracle, tokens, shape=SHAPE, stamp=None):
    """Updates both with `tokens` new tokens and compares what came back; returns the columns."""
    backend = cache.backend
    assert backend is not None, "push needs a cache that was given its backend"
    stamp = oracle.offset if stamp is None else stamp
    keys, values = shape.keys(tokens, stamp), shape.values(tokens, stamp)
    device = backend.from_host(keys), backend.from_host(values)
    columns = host_rows(backend, cache.update(*device))
    oracle.tokens += map(Token, rows(keys), rows(values))
    assert host_rows(backend, device) == oracle.tokens[-tokens:], "the update was altered"
    check_columns(cache, oracle, columns, tokens)
    check_state(cache, oracle)
    return columns


def check_columns(cache, oracle, columns, tokens, window=None):
    """The last `tokens` queries see exactly what they should, in `columns`, through the mask."""
    positions = cache.positions
    assert positions.dtype == np.int32
    assert positions.size == len(columns)
    queries = range(oracle.offset - tokens, oracle.offset)
    for query, allowed in zip(queries, _mask_rows(cache, tokens, window), strict=True):
        seen = [(int(positions[column]), columns[column]) for column in np.flatnonzero(allowed)]
        wanted = [(p, oracle.tokens[p]) for p in oracle.visible(query, window)]
        assert sorted(seen) == wanted, f"query {query} of {cache!r}: {_difference(seen, wanted)}"


def _difference(seen, wanted):
    """For reading: byte strings tell nobody where they come from."""
    got, expected = sorted(position for position, _ in seen), [position for position, _ in wanted]
    return f"sees {got}, not {expected}" if got != expected else "a position holds another token"


def _mask_rows(cache, tokens, window):
    mask = cache.mask(tokens, window)
    if mask is None:
        return np.ones((tokens, cache.positions.size), bool)
    assert cache.backend is not None
    allowed = cache.backend.to_host(mask)
    if allowed.dtype != bool:
        assert np.isin(allowed.astype(np.float64), [0, -np.inf]).all()
        allowed = allowed == 0
    assert allowed.shape == (tokens, cache.positions.size)
    assert not allowed.all(), "a mask that hides nothing should be None"
    return allowed


def check_state(cache, oracle):
    """Counters, and the tokens held in whatever order."""
    assert cache.offset == oracle.offset
    assert type(cache.offset) is int
    assert cache.len == len(oracle.held())
    assert type(cache.len) is int
    if not oracle.offset:
        assert cache.state == ()
        return
    assert cache.backend is not None
    held = host_rows(cache.backend, cache.state)
    assert len(held) == cache.len
    assert sorted(held) == sorted(oracle.tokens[position] for position in oracle.held())


def check_whole(cache, oracle):
    """`check_state`, and that every column of a copy is where its position says."""
    check_state(cache, oracle)
    if oracle.offset:
        twin = cache.copy()
        assert twin.backend is not None
        check_columns(twin, oracle, held_columns(twin), 1)


def held_columns(cache):
    """The tokens held, and nothing for each column of padding that an update would return."""
    held = iter(host_rows(cache.backend, cache.state))
    columns = [next(held) if position >= 0 else None for position in cache.positions.tolist()]
    assert not list(held), "a token held has no column"
    return columns


def fingerprint(cache):
    """Everything that can be seen of a cache, every byte it holds included."""
    return tuple(_seen(cache))


def _seen(cache):
    yield cache.offset, cache.len, cache.dtype, cache.nbytes, cache.growths, repr(cache)
    yield cache.backend
    yield cache.positions.tobytes()
    yield [cache.can_trim(tokens) for tokens in range(-1, cache.offset + 2)]
    if cache.offset:
        assert cache.backend is not None
        yield [cache.backend.to_host(part).tobytes() for part in cache.state]
        mask = cache.mask(1)
        yield None if mask is None else cache.backend.to_host(mask).tobytes()
