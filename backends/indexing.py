"""Indices of several arrays: how they are made, and assigned to in place."""

from __future__ import annotations

from collections.abc import Iterable
from operator import setitem
from typing import TypeAlias

from .arrays import Arrays, NativeArrays

Axes: TypeAlias = int | tuple[int, ...]
"""The token axis of several arrays: one for all, or one for each."""
Key: TypeAlias = tuple[object, ...]
"""An index of the arrays of a framework that writes in place."""
FULL_SLICES = tuple((slice(None),) * axis for axis in range(8))
"""Full slices for the axes in front: ``(*FULL_SLICES[axis], key)`` indexes `axis` by key."""


def axes_of(arrays: Arrays, axis: Axes) -> tuple[int, ...]:
    """Return the axis of each of `arrays`."""
    return axis if isinstance(axis, tuple) else (axis,) * len(arrays)


def slice_keys(arrays: Arrays, start: int, stop: int, axis: Axes) -> list[Key]:
    """Return the index of ``[start, stop)`` of `axis` in each of `arrays`."""
    return [(*FULL_SLICES[own], slice(start, stop)) for own in axes_of(arrays, axis)]


def set_items(arrays: NativeArrays, keys: Iterable[Key], updates: NativeArrays) -> NativeArrays:
    """Assign each of `updates` at its key in one of `arrays`, in place, and return `arrays`.

    Python runs signal handlers after calls, not while a list is extended: none comes in between.
    """
    _ = [*map(setitem, arrays, keys, updates)]
    return arrays


def set_slices(
    buffers: NativeArrays, updates: NativeArrays, start: int, stop: int, axis: Axes
) -> NativeArrays:
    """Write each of `updates` to ``[start, stop)`` of its buffer, in place; return `buffers`."""
    if axis == 2 and len(buffers) == 2:  # per-layer caches: a literal index is the cheapest
        keys, values = buffers
        # In one statement, without a call: no signal handler runs between the two.
        keys[:, :, start:stop], values[:, :, start:stop] = updates
        return buffers
    if axis == 1 and len(buffers) == 2:  # pools
        keys, values = buffers
        keys[:, start:stop], values[:, start:stop] = updates
        return buffers
    return set_items(buffers, slice_keys(buffers, start, stop, axis), updates)
