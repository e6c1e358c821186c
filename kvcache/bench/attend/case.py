"""The case of a decode pass: how its sequences lie, and the names of its contestants."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvcache.backends.arrays import HostArray, NativeArray
from kvcache.bench.harness.contest import Case

ATTEND = "attend"
PROGRAM = "attend, compiled"
RANGE = "get, mask"
IDEAL = "ideal"
LOADS = ("even", "fragmented", "shared", "uneven", "window")
_PERIOD = 257
"""Tokens after which keys and values repeat: a prime, so that no length is a multiple."""


@dataclass(frozen=True)
class AttendCase(Case):
    """One decode token of each of `batch` sequences, in one layer.

    load: one of `LOADS`.
        even: `tokens` in each, in a row.
        fragmented: `tokens` in each, in pieces of 16 cells at most.
        shared: twice `tokens` that all of them share, and an eighth of `tokens` in each.
        uneven: a 64th to four times `tokens`, evenly spread on a logarithmic scale.
        window: `tokens` in each, of which a quarter is seen.
    query_heads: a multiple of `heads`.
    """

    query_heads: int
    load: str

    @property
    def shared(self) -> int:
        """Tokens that all sequences share."""
        return 2 * self.tokens if self.load == "shared" else 0

    @property
    def window(self) -> int | None:
        """Tokens that a token sees; None: all."""
        return max(1, self.tokens // 4) if self.load == "window" else None

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, with the one of the pass."""
        if self.load == "shared":
            return [self.shared + max(1, self.tokens // 8)] * self.batch
        if self.load != "uneven" or self.batch == 1:  # one alone is neither short nor long
            return [self.tokens] * self.batch
        spread = np.geomspace(max(1, self.tokens // 64), 4 * self.tokens, self.batch)
        # Shuffled, as requests come: neighbours of like length would be easier to read.
        return [int(length) for length in np.random.default_rng(0).permutation(spread)]

    def rows(self, sequence: int, start: int, stop: int) -> HostArray:
        """Return keys or values of positions ``[start, stop)``, ``[heads, tokens, head_dim]``."""
        owner = np.where(np.arange(start, stop) < self.shared, 0, sequence)
        return self._block[:, (np.arange(start, stop) + 31 * owner) % _PERIOD]

    def seen(self, sequence: int) -> NativeArray:
        """Return keys or values that the token of a sequence sees, in an array of their own."""
        length = self.lengths[sequence]
        start = 0 if self.window is None else max(0, length - self.window)
        return self.backend.from_host(self.rows(sequence, start, length), self.dtype)

    def queries(self) -> HostArray:
        """Return the queries of the pass, float32 ``[query_heads, batch, head_dim]``."""
        shape = self.query_heads, self.batch, self.head_dim
        return np.random.default_rng(1).normal(size=shape).astype(np.float32)

    @cached_property
    def _block(self) -> HostArray:
        shape = self.heads, _PERIOD, self.head_dim
        return np.random.default_rng(2).normal(size=shape).astype(np.float32)
