"""Lengths rounded for the backend, because each new length may compile another program."""

from __future__ import annotations

import numpy as np

from kvcache._types import Indices, Int32s
from kvcache.backends import Backend


def ceil_div(count: int, unit: int) -> int:
    """Return the number of units needed to hold `count`."""
    return -(-count // unit)


def round_up(count: int, unit: int) -> int:
    """Round `count` up to a multiple of `unit`."""
    return ceil_div(count, unit) * unit


def padded_range(
    backend: Backend, start: int, stop: int, padding: int, length: int
) -> tuple[int, int]:
    """Return a range of ``[0, length)`` around ``[start, stop)``, rounded for the backend."""
    start = start // padding * padding
    if backend.slices_are_views:
        return start, min(length, ceil_div(stop, padding) * padding)
    # Each length compiles a program: powers of two only, or all beyond half of it.
    size = padding
    while size < stop - start:
        size *= 2
    if 2 * size > length:
        return 0, length
    start = min(start, length - size)
    return start, start + size


def padded_index(backend: Backend, index: Indices) -> Indices:
    """Pad `index` to a power of two by repeating its last element, where lengths are compiled.

    A gather or scatter is then compiled for few lengths. Rows to scatter are padded likewise
    (:meth:`NamedArray.pad`): writing the same row several times changes nothing.
    """
    if backend.slices_are_views or not index.size:
        return index
    length = 1 << (index.size - 1).bit_length()
    return np.pad(index, (0, length - index.size), "edge")


def padded_positions(positions: Int32s, width: int) -> Int32s:
    """Pad `positions` with -1 (no token) to `width` elements."""
    padding = np.full(width - positions.size, -1, dtype=np.int32)
    return np.concatenate([positions, padding])
