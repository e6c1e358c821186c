"""Encoder output as it arrives: which sequences it is of, and how many frames each has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcache._checks import as_indices
from kvcache.backends import Array, Backend
from kvcache.errors import ShapeError

from .batch import Batch
from .checks import check_dtype, check_sizes_of
from .layouts import ArrayLayout


def sequences_of(batch: Batch) -> list[int]:
    """Return the sequences of a batch, in order of appearance."""
    return list(dict.fromkeys(batch.sequences.tolist()))


def arriving_in(batch: Batch) -> dict[int, int]:
    """Return the sequences with new encoder output in a pass, and the position of each."""
    sequences = sequences_of(batch)
    # With one sequence there is no doubt, so its batch need not name a token.
    if not batch.multimodal and len(sequences) == 1:
        return {sequences[0]: 0}
    return {int(batch.sequences[i]): int(batch.positions[i]) for i in batch.multimodal}


def frame_counts(
    layout: ArrayLayout, keys: Array, sequences: int, frames: Sequence[int] | None
) -> list[int]:
    """Return the number of frames in `keys` of each of so many sequences.

    Raises: ShapeError, ValueError.
    """
    if not sequences:
        raise ShapeError(
            "output is of sequences with multimodal tokens in the batch, which names none. "
            "Name them: Batch(..., multimodal=[...])."
        )
    if frames is None and sequences == 1 and len(keys.shape) == 3:
        return [keys.shape[layout.token_axis]]
    lengths = as_indices(frames or (), "frames")
    if len(lengths) != sequences:
        raise ShapeError(
            f"{sequences} sequences bring output in this pass, and each has a number of "
            f"frames; got frames={frames}. Say them: put(keys, values, frames=[...])."
        )
    if min(lengths) < 1:
        raise ValueError(f"every sequence has at least one frame; got {lengths}.")
    return lengths


def split_frames(
    backend: Backend, dtype: str, layout: ArrayLayout, array: Array, lengths: Sequence[int]
) -> list[Array]:
    """Return copies of the frames in `array`, cut into arrays of `lengths` frames.

    Raises: ShapeError, DTypeError.
    """
    axis = layout.token_axis
    check_dtype(backend, dtype, layout.name, array)
    if len(array.shape) != 3 or array.shape[axis] != sum(lengths):
        raise ShapeError(
            f"{layout.name} hold {' + '.join(map(str, lengths))} frames in layout "
            f"{layout.axes!r} (h kv_heads, t frames, d head_dim), as many as the keys; got "
            f"{tuple(array.shape)}."
        )
    check_sizes_of(layout, tuple(array.shape))
    stops = np.cumsum(lengths).tolist()
    pieces = [
        backend.slice(array, stop - length, stop, axis)
        for stop, length in zip(stops, lengths, strict=True)
    ]
    # concat copies even a single array, where a slice may be a view of the caller's memory.
    return [backend.concat([piece], axis) for piece in pieces]
