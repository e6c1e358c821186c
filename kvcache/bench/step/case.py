"""The case of a decode step, and the names of its contestants."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.backends.arrays import NativeArray
from kvcache.bench.harness.contest import Case

CAUSAL = "CausalCache"
ATTEND = "attention alone"
PROGRAM = "with put"


@dataclass(frozen=True)
class DecodeCase(Case):
    """A batch of sequences of `tokens` each, in every one of `layers`; a step adds one to each."""

    layers: int

    def histories(self) -> list[tuple[NativeArray, NativeArray]]:
        """Return new keys and values of every layer."""
        return [self.history() for _ in range(self.layers)]

    def rows(self) -> NativeArray:
        """Return keys or values of one step for ``Cache.put``: ``[heads, batch, head_dim]``."""
        return self.ones((self.heads, self.batch, self.head_dim))
