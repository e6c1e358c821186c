"""NumPy: the reference that every other backend is checked against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import array_api_compat.numpy
import numpy as np
import numpy.typing as npt

from .base import FULL_SLICES, HOST_DTYPES, Array, Backend, HostArray


class NumpyBackend(Backend):
    """Buffers are ndarrays, written in place; bfloat16 and float8 come from ``ml_dtypes``."""

    name: ClassVar[str] = "numpy"
    xp = array_api_compat.numpy

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = self._check_device(device, self.devices())

    @staticmethod
    def devices() -> list[str]:
        return ["cpu"]

    @staticmethod
    def device_of(array: Array) -> str:
        return "cpu"

    def _framework_dtypes(self) -> dict[str, Any]:
        return HOST_DTYPES

    def alloc(self, shape: Sequence[int], dtype: str) -> Array:
        return np.zeros(shape, self.dtype(dtype))

    def write_slice(self, buffer: Array, update: Array, start: int, stop: int, axis: int) -> Array:
        if axis == 2:  # the tokens of every cache: a literal index is the cheapest
            buffer[:, :, start:stop] = update
        else:
            buffer[(*FULL_SLICES[axis], slice(start, stop))] = update
        return buffer

    def write_rows(self, buffer: Array, rows: Array, index: HostArray, axis: int) -> Array:
        buffer[(*FULL_SLICES[axis], index)] = rows
        return buffer

    def read_rows(self, buffer: Array, index: HostArray, axis: int) -> Array:
        return np.take(buffer, index, axis=axis)

    def read_slice(self, buffer: Array, start: int, stop: int, axis: int) -> Array:
        return buffer[(*FULL_SLICES[axis], slice(start, stop))]

    def concat(self, arrays: Sequence[Array], axis: int) -> Array:
        return np.concatenate(arrays, axis=axis)

    def from_host(self, array: npt.ArrayLike, dtype: str | None = None) -> Array:
        return self._host(array, dtype).copy()

    def to_host(self, array: Array) -> HostArray:
        return np.array(array)

    def import_dlpack(self, array: Any) -> Array:
        return array if isinstance(array, np.ndarray) else np.from_dlpack(array)
