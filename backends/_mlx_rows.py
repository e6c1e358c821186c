"""Scattered rows on MLX, written and read."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from .arrays import HostArray, NativeArray


def put_rows(buffer: NativeArray, rows: NativeArray, index: NativeArray, axis: int) -> NativeArray:
    """Return `buffer` with rows at `index`, in half the time of an assignment by an index array."""
    return mx.put_along_axis(buffer, _positions(index, rows.shape, axis), rows, axis)


def _positions(index: NativeArray, shape: tuple[int, ...], axis: int) -> NativeArray:
    """Return the position on `axis` of every element of rows of this shape."""
    lead = [1] * len(shape)
    lead[axis] = -1
    return mx.broadcast_to(index.reshape(lead), shape)


class ElementIndex:
    """Positions of rows, and those of all their elements, for every shape that rows have."""

    def __init__(self, index: HostArray) -> None:
        self._index = mx.array(index)
        self._by_shape: dict[tuple[tuple[int, ...], int], NativeArray] = {}

    def put(self, buffer: NativeArray, rows: NativeArray, axis: int) -> NativeArray:
        """Return `buffer` with `rows` at these positions of `axis`."""
        key = rows.shape, axis
        positions = self._by_shape.get(key)
        if positions is None:
            positions = self._by_shape[key] = _positions(self._index, *key)
        return mx.put_along_axis(buffer, positions, rows, axis)


def take_rows(buffer: NativeArray, index: NativeArray, axis: int) -> NativeArray:
    """Return the rows at `index` of `axis`, compact: MLX would put that axis first in memory.

    Attention over such an array takes five times as long.
    """
    if not axis:
        return mx.take(buffer, index, axis=0)
    lead, rest = buffer.shape[:axis], buffer.shape[axis + 1 :]
    starts = mx.arange(math.prod(lead))[:, None] * buffer.shape[axis]
    rows = mx.take(buffer.reshape(-1, *rest), (starts + index).reshape(-1), axis=0)
    return rows.reshape(*lead, index.shape[0], *rest)


def is_run(index: HostArray) -> bool:
    """Return whether positions follow each other: a slice update is cheaper than a scatter."""
    return np.array_equal(index, np.arange(index[0], index[0] + index.size))


def equally_spaced(index: HostArray) -> slice | None:
    """Return the slice of positions at equal distances, ascending; None for others.

    Sequences of one length lie so: a batch, or samples of one prompt. A slice with a step is
    written in two thirds of the time of a scatter.
    """
    first, size = int(index[0]), index.size
    step = int(index[1]) - first if size > 1 else 1
    if step < 1 or not np.array_equal(index, np.arange(first, first + size * step, step)):
        return None
    return slice(first, first + (size - 1) * step + 1, step)
