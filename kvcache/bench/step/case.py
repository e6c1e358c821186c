"""What all contestants of one decode step have in common."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvcache.backends import Array, Backend
from kvcache.backends.arrays import NativeArray

MAX_STEPS = 64


@dataclass(frozen=True)
class Decoding:
    """`sequences` of `tokens` each in every one of `layers`; a step adds one token to each."""

    backend: Backend
    dtype: str
    sequences: int
    tokens: int
    layers: int
    heads: int
    head_dim: int

    @property
    def max_steps(self) -> int:
        """Longest block of steps: a quarter of what short sequences hold."""
        return max(1, min(MAX_STEPS, self.tokens // 4))

    def history(self) -> list[tuple[NativeArray, NativeArray]]:
        """New keys and values of every layer, ``[sequences, heads, tokens, head_dim]``."""
        shape = self.sequences, self.heads, self.tokens, self.head_dim
        alloc = self.backend.alloc
        return [(alloc(shape, self.dtype), alloc(shape, self.dtype)) for _ in range(self.layers)]

    def token(self) -> Array:
        """Keys or values that go into :meth:`history`: one token of each sequence."""
        return self._ones((self.sequences, self.heads, 1, self.head_dim))

    def row(self) -> Array:
        """The same for ``Cache.put``: ``[heads, sequences, head_dim]``."""
        return self._ones((self.heads, self.sequences, self.head_dim))

    def _ones(self, shape: tuple[int, ...]) -> Array:
        return self.backend.from_host(np.ones(shape, np.float32), self.dtype)
