"""NumPy: the reference for all other backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import array_api_compat.numpy
import numpy as np
import numpy.typing as npt

from ._host_rows import HostLayer, HostRowIndex, all_finite
from .arguments import checked_device
from .arrays import DType, HostArray, Namespace, NativeArray, NativeArrays, RowIndex
from .base import Backend
from .dtypes import HOST_DTYPES
from .indexing import FULL_SLICES, Axes, axes_of, set_items, set_slices
from .nonfinite import finite_bits, replaced
from .products import Result, Scoring, VisibleColumns, product


class NumpyBackend(Backend):
    """Buffers are ndarrays, written in place; bfloat16 and float8 come from ``ml_dtypes``."""

    name: ClassVar[str] = "numpy"
    xp = cast(Namespace, array_api_compat.numpy)

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = checked_device(self.name, device, self.devices())

    @staticmethod
    def devices() -> list[str]:
        return ["cpu"]

    @staticmethod
    def device_of(array: NativeArray) -> str:
        return "cpu"

    @property
    def in_host_memory(self) -> bool:
        return True

    def _framework_dtypes(self) -> dict[str, DType]:
        return HOST_DTYPES

    def alloc(self, shape: Sequence[int], dtype: str) -> NativeArray:
        return np.zeros(shape, self.dtype(dtype))

    def write_slice(
        self, buffer: NativeArray, update: NativeArray, start: int, stop: int, axis: int
    ) -> NativeArray:
        if axis == 2:  # the token axis of per-layer caches: a literal index is the cheapest
            buffer[:, :, start:stop] = update
        else:
            buffer[(*FULL_SLICES[axis], slice(start, stop))] = update
        return buffer

    def write_rows(
        self, buffer: NativeArray, rows: NativeArray, index: HostArray, axis: int
    ) -> NativeArray:
        buffer[(*FULL_SLICES[axis], index)] = rows
        return buffer

    write_slices = staticmethod(set_slices)

    def write_row_sets(
        self, buffers: NativeArrays, rows: NativeArrays, index: HostArray, axis: Axes
    ) -> NativeArrays:
        if axis == 1 and len(buffers) == 2:  # pools: a literal index is the cheapest
            keys, values = buffers
            # In one statement, without a call: no signal handler runs between the two.
            keys[:, index], values[:, index] = rows
            return buffers
        places = [(*FULL_SLICES[own], index) for own in axes_of(buffers, axis)]
        return set_items(buffers, places, rows)

    def row_index(self, index: HostArray) -> RowIndex:
        return HostRowIndex(index)

    def write_finite_row_sets(
        self, buffers: NativeArrays, rows: NativeArrays, index: RowIndex, axis: Axes
    ) -> NativeArrays:
        finite: NativeArrays = rows if all_finite(rows) else self.replace_nonfinite(rows, axis)
        layer: NativeArrays | None = buffers
        if axis == 1 and type(buffers) is not HostLayer:
            layer = HostLayer.of(buffers, buffers)
        if type(layer) is HostLayer:
            index.write(layer, finite)
            return layer
        return self.write_row_sets(buffers, finite, index.positions, axis)

    def read_rows(self, buffer: NativeArray, index: HostArray, axis: int) -> NativeArray:
        return np.take(buffer, index, axis=axis)

    def read_slice(self, buffer: NativeArray, start: int, stop: int, axis: int) -> NativeArray:
        return buffer[(*FULL_SLICES[axis], slice(start, stop))]

    def read_slices(self, buffers: NativeArrays, start: int, stop: int, axis: Axes) -> NativeArrays:
        if axis == 1 and len(buffers) == 2:  # pools: a literal index is the cheapest
            keys, values = buffers
            return keys[:, start:stop], values[:, start:stop]
        return super().read_slices(buffers, start, stop, axis)

    def concat(self, arrays: Sequence[NativeArray], axis: int) -> NativeArray:
        return np.concatenate(arrays, axis=axis)

    @classmethod
    def traced_replace_nonfinite(cls, arrays: NativeArrays, axis: Axes) -> NativeArrays:
        # Nearly always everything is finite, and finding that out costs less than a replacement.
        if all_finite(arrays):
            return arrays
        kind = arrays[0].dtype
        is_finite, numbers = finite_bits(kind.name, len(arrays))
        bits = tuple(array.view(f"u{kind.itemsize}") for array in arrays)
        return tuple(array.view(kind) for array in replaced(cls.xp, bits, axis, numbers, is_finite))

    def owned(self, arrays: NativeArrays) -> NativeArrays:
        return tuple([np.array(array, order="C") for array in arrays])

    def attention_block(
        self,
        q: NativeArray,
        keys: NativeArray,
        values: NativeArray,
        scoring: Scoring,
        visible: VisibleColumns | None,
    ) -> Result:
        # Values that stand for NaN are so large that sums of them overflow, as they may.
        with np.errstate(over="ignore", invalid="ignore"):
            mask = None if visible is None else visible.mask(keys.shape[1])
            return product(self.xp, q, keys, values, scoring, mask, _dot_products)

    def from_host(self, array: npt.ArrayLike, dtype: str | None = None) -> NativeArray:
        return self._host(array, dtype).copy()

    def to_host(self, array: NativeArray) -> HostArray:
        return np.array(array)

    def import_dlpack(self, array: NativeArray) -> NativeArray:
        return array if isinstance(array, np.ndarray) else np.from_dlpack(array)


def _dot_products(rows: NativeArray, keys: NativeArray) -> NativeArray:
    """Multiply a few rows with few keys at a time, in half the time of one product or less."""
    heads, count, dim = rows.shape
    total, columns = keys.shape[1], _SMALL // (count * dim)
    turned = keys.transpose(0, 2, 1)
    if columns < _FEWEST or columns >= total:
        return np.matmul(rows, turned)
    scores = np.empty((heads, count, total), rows.dtype)
    for start in range(0, total, columns):
        piece = slice(start, start + columns)
        np.matmul(rows, turned[:, :, piece], out=scores[:, :, piece])
    return scores


_SMALL = 1 << 17
"""Multiplications up to which OpenBLAS has kernels that do not copy the factors first."""
_FEWEST = 64
"""Columns of a product below which calls cost more than that."""
