"""Lengths rounded for the backend: each new length may be a program of its own to compile."""

from __future__ import annotations

import numpy as np

from kvcache._types import Indices, Int32s
from kvcache.backends import Backend


def ceil_div(count: int, unit: int) -> int:
    """Return how many units hold `count`."""
    return -(-count // unit)


def round_up(count: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is at least `count`."""
    return ceil_div(count, unit) * unit


def padded_index(backend: Backend, index: Indices) -> Indices:
    """Return `index`, its last element repeated up to a power of two where slices are programs.

    A gather or scatter then compiles for few lengths; writing a row twice changes nothing.
    """
    if backend.slices_are_views or not index.size:
        return index
    length = 1 << (index.size - 1).bit_length()
    return np.pad(index, (0, length - index.size), "edge")


def padded_positions(positions: Int32s, width: int) -> Int32s:
    """Return `positions` with -1, which is no position, behind them: `width` in all."""
    padding = np.full(width - positions.size, -1, dtype=np.int32)
    return np.concatenate([positions, padding])
