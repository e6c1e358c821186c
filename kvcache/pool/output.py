"""Encoder output of one sequence: an entry of an encoder cache, and a row of a snapshot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from kvcache.backends import Backend, transfer
from kvcache.errors import ShapeError
from kvcache.storage.arrays import LayerArrays, NamedArray, check_layer_form

from .layouts import ArrayLayout, Arrays

FRAME_AXES = "thd"
"""Axes of encoder output on the host, without the row axis: frames, kv_heads, head_dim."""

ROW_AXES = 4
"""Number of axes of a row on the host."""


class Entry(NamedTuple):
    """Encoder output of one sequence by layer, and its position in the sequence; never changed."""

    position: int
    layers: Mapping[int, Arrays]


Entries: TypeAlias = Mapping[int, Entry]
"""Entries by sequence: replaced, not changed, so that a pass keeps those it began with."""


def position_after(position: int, start: int, stop: int | None) -> int | None:
    """Return `position` once ``[start, stop)`` is removed; None if it lies in there."""
    if position < start:
        return position
    return None if stop is None or position < stop else position - (stop - start)


def transferred(entries: Entries, source: Backend, target: Backend) -> Entries:
    """Return `entries` on `target`, sharing memory where possible: it is never written to."""
    layers = [arrays for entry in entries.values() for arrays in entry.layers.values()]
    # By identity, so that sequences with a common output still share it afterwards.
    distinct = {id(array): array for arrays in layers for array in arrays}
    moved = {key: transfer(array, source, target) for key, array in distinct.items()}
    return {
        sequence: Entry(
            entry.position,
            {
                layer: tuple(moved[id(array)] for array in arrays)
                for layer, arrays in entry.layers.items()
            },
        )
        for sequence, entry in entries.items()
    }


def to_row(backend: Backend, layouts: Sequence[ArrayLayout], arrays: Arrays) -> LayerArrays:
    """Return all frames as one row on the host: ``[frames, kv_heads, 1, head_dim]`` arrays."""
    row = []
    for layout, array in zip(layouts, arrays, strict=True):
        order = [layout.axes.index(axis) for axis in FRAME_AXES]
        frames = np.array(backend.to_host(array).transpose(order), order="C")
        # The axis of length 1 is the token axis: the frames count as one token.
        row.append(NamedArray(layout.name, frames[:, :, None]))
    return tuple(row)


def from_row(
    backend: Backend, layouts: Sequence[ArrayLayout], row: LayerArrays, dtype: str
) -> Arrays:
    """Undo :func:`to_row`, with finite numbers only.

    Raises: ShapeError for a row without values, or with another number of frames than keys;
        SnapshotMismatchError for one of another form or dtype.
    """
    if len(row) != len(layouts):
        raise ShapeError("an encoder's output has values in every layer.")
    check_layer_form([row], [layout.name for layout in layouts], ROW_AXES, dtype)
    if len({array.data.shape[0] for array in row}) > 1:
        shapes = [array.data.shape for array in row]
        raise ShapeError(f"an encoder's keys and values are of the same frames; got {shapes}.")
    arrays = tuple(
        backend.from_host(
            array.data[:, :, 0].transpose([FRAME_AXES.index(axis) for axis in layout.axes])
        )
        for layout, array in zip(layouts, row, strict=True)
    )
    return finite_output(backend, layouts, arrays)


def finite_output(backend: Backend, layouts: Sequence[ArrayLayout], arrays: Arrays) -> Arrays:
    """Return output with finite numbers only: sequences beside this one read it, too."""
    return backend.replace_nonfinite(arrays, tuple(layout.token_axis for layout in layouts))
