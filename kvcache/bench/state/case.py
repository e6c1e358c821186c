"""The case of recurrent states, and the names of its contestants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvcache.backends.arrays import NativeArrays
from kvcache.bench.harness.contest import RAW, Case

RAW_COPIES = "raw copies"
ADVANCE = "StateCache.advance"
POOL = "RecurrentCache"
FORK = "copy_prefix"
RAW_HOST = "raw, by the host"
RESTORE = "snapshot + restore"
BASES = {ADVANCE: RAW_COPIES, POOL: RAW, RESTORE: RAW_HOST}
"""Contestants with a counterpart in the framework's own calls, by name, and that counterpart."""


@dataclass(frozen=True)
class StateCase(Case):
    """States of `batch` sequences in every one of `layers`.

    A state is a matrix ``[heads, head_dim, head_dim]`` and the last `kernel` - 1 inputs of a
    convolution over `channels`, which have the narrow dtype of activations.
    """

    layers: int
    channels: int
    kernel: int

    longest_block: ClassVar[int] = 16

    @property
    def narrow(self) -> str:
        """Dtype of activations."""
        return "bfloat16" if "bfloat16" in self.backend.dtypes else self.dtype

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the arrays of one state."""
        return (self.heads, self.head_dim, self.head_dim), (self.channels, self.kernel - 1)

    def buffers(self, slots: int) -> NativeArrays:
        """Return buffers of so many states of a layer, zeros."""
        dtypes = self.dtype, self.narrow
        pairs = zip(self.shapes, dtypes, strict=True)
        return tuple(self.backend.alloc((slots, *shape), dtype) for shape, dtype in pairs)

    def states(self) -> NativeArrays:
        """Return the states of one layer behind a step, ``[batch, ...]``, ones."""
        matrix, conv = self.shapes
        narrow = self.backend.from_host(np.ones((self.batch, *conv), np.float32), self.narrow)
        return self.ones((self.batch, *matrix)), narrow
