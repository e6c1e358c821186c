"""Rows of unequal length in one batch: padding on their left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

from kvcache._checks import NO_LIMIT, as_indices
from kvcache._types import Int32s
from kvcache.errors import ShapeError, SnapshotMismatchError
from kvcache.storage.arrays import LayerArrays, NamedArray

if TYPE_CHECKING:
    from .row_selection import SelectableRows

NAME = "padding"
"""Name of the array in files."""


def as_padding(tokens: Iterable[SupportsIndex]) -> Int32s | None:
    """Return the padding of each row as int32; None if no row has any.

    Raises: TypeError for no list of integers; ValueError for negative ones.
    """
    padding = as_indices(tokens, "padding")
    if any(not 0 <= count <= NO_LIMIT for count in padding):
        raise ValueError(f"padding is 0 tokens or more in each row; got {padding}.")
    return np.array(padding, np.int32) if any(padding) else None


def selected(arrays: LayerArrays, rows: Int32s) -> LayerArrays:
    """Return some rows of the batch of what a cache holds of some tokens, batch first."""
    arrays = tuple([array._replace(data=array.data[rows]) for array in arrays])
    own, padding = without_padding(arrays)
    return own if padding is None else arrays


def joined_padding(caches: Sequence[SelectableRows]) -> tuple[int, list[int]]:
    """Return where the rows of all `caches` end in one batch, and the padding of each there.

    They end as soon as the longest allows, at 1 if no row has a token.
    """
    counts = [
        (cache.offset, [0] * (cache.rows or 0) if cache.padding is None else cache.padding.tolist())
        for cache in caches
    ]
    stop = max(1, *(offset - min(own) for offset, own in counts))
    return stop, [stop - offset + count for offset, own in counts for count in own]


def as_list(padding: Int32s | None) -> list[int]:
    """Return the padding of each row; none if no row has any."""
    return [] if padding is None else padding.tolist()


def check_padding(padding: Int32s | None, rows: int) -> None:
    """Raise ShapeError unless there is one number for each row of the batch."""
    if padding is not None and padding.size != rows:
        raise ShapeError(
            f"padding has one number for each row of the batch, {rows}; got {padding.size}."
        )


def check_empty(offset: int) -> None:
    """Raise ValueError for a cache with tokens."""
    if offset:
        raise ValueError(
            f"padding is declared before the first token; {offset} came. Use a new cache."
        )


def check_rows(rows: Iterable[SupportsIndex], count: int | None) -> Int32s:
    """Return `rows` of a batch as int32; none if there is no batch yet.

    Raises: ValueError for a row that is not there, or for no row; TypeError for no list of
        integers.
    """
    index = as_indices(rows, "rows")
    if count is not None and not (index and min(index) >= 0 and max(index) < count):
        raise ValueError(f"rows are 0 to {count - 1}, one or more of them; got {index}.")
    return np.array(index if count is not None else [], np.int32)


def padding_array(padding: Int32s) -> NamedArray:
    """Return the padding as it stands in files."""
    return NamedArray(NAME, padding, None)


def without_padding(arrays: LayerArrays) -> tuple[LayerArrays, Int32s | None]:
    """Return the arrays of a layer without its padding, and that.

    Raises: SnapshotMismatchError for padding that is none.
    """
    if not arrays or arrays[-1].name != NAME:
        return arrays, None
    data = arrays[-1].data
    if arrays[-1].token_axis is not None or data.ndim != 1 or data.dtype != np.int32:
        raise SnapshotMismatchError(
            f"padding is int32, one number per row; got {data.dtype} {data.shape}."
        )
    if (data < 0).any():
        raise SnapshotMismatchError(f"padding is 0 tokens or more; got {data.min()}.")
    return arrays[:-1], np.array(data) if data.any() else None


def common_padding(layers: Iterable[LayerArrays], declared: Int32s | None) -> Int32s | None:
    """Return the padding that rows of snapshots tell; `declared` is that of the cache.

    Raises: SnapshotMismatchError if they differ.
    """
    told = [without_padding(arrays)[1] for arrays in layers]
    given = [as_list(padding) for padding in told]
    wanted = given[0] if declared is None else as_list(declared)
    if any(padding != wanted for padding in given):
        raise SnapshotMismatchError(
            f"all rows of a batch are restored with one padding, {wanted} here; got {given}. "
            "Restore to a new cache."
        )
    return told[0]
