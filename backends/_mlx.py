"""MLX on Apple GPUs, CUDA and CPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from kvcache.errors import BackendNotAvailableError

from .base import FULL_SLICES, HOST_DTYPES, Array, Backend, HostArray

_NAMES = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "int8": mx.int8,
    "uint8": mx.uint8,
    "int32": mx.int32,
    "bool": mx.bool_,
}


class MlxBackend(Backend):
    """Writes are lazy and land in place when evaluated, unless an older view is still alive.

    Evaluate once per step (:meth:`sync`, or reading the result), not once per write. MLX
    has no float8 dtypes, and runs everything on its default device.
    """

    name: ClassVar[str] = "mlx"
    # mlx.core is MLX's own array-API namespace, but for one name that Python shadows there.
    xp = SimpleNamespace(**{**vars(mx), "bool": mx.bool_})

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device, *_ = self.devices()
        if device not in (None, self.device):
            raise BackendNotAvailableError(
                f"MLX computes on its default device, {self.device!r}; got {device!r}. "
                "Change it with mlx.core.set_default_device."
            )

    @staticmethod
    def devices() -> list[str]:
        return [mx.default_device().type.name]

    @staticmethod
    def device_of(array: Array) -> str:
        return str(mx.default_device().type.name)

    def _framework_dtypes(self) -> dict[str, Any]:
        return _NAMES

    def alloc(self, shape: Sequence[int], dtype: str) -> Array:
        buffer = mx.zeros(tuple(shape), self.dtype(dtype))
        mx.eval(buffer)
        return buffer

    def write_slice(self, buffer: Array, update: Array, start: int, stop: int, axis: int) -> Array:
        if axis == 2:  # the tokens of every cache: a literal index is the cheapest
            buffer[:, :, start:stop] = update
        else:
            buffer[(*FULL_SLICES[axis], slice(start, stop))] = update
        return buffer

    def write_rows(self, buffer: Array, rows: Array, index: HostArray, axis: int) -> Array:
        first = int(index[0])
        if np.array_equal(index, np.arange(first, first + index.size)):
            return self.write_slice(buffer, rows, first, first + index.size, axis)
        buffer[(*FULL_SLICES[axis], mx.array(index))] = rows
        return buffer

    def read_rows(self, buffer: Array, index: HostArray, axis: int) -> Array:
        return mx.take(buffer, mx.array(index), axis=axis)

    def read_slice(self, buffer: Array, start: int, stop: int, axis: int) -> Array:
        return buffer[(*FULL_SLICES[axis], slice(start, stop))]

    def concat(self, arrays: Sequence[Array], axis: int) -> Array:
        return mx.concatenate(list(arrays), axis=axis)

    def from_host(self, array: npt.ArrayLike, dtype: str | None = None) -> Array:
        return mx.array(self._host(array, dtype))

    def to_host(self, array: Array) -> HostArray:
        name = self.dtype_name(array)
        if name == "bfloat16":
            array = mx.contiguous(array).view(mx.uint16)
        return np.array(array).view(HOST_DTYPES[name])

    def import_dlpack(self, array: Any) -> Array:
        return array if isinstance(array, mx.array) else mx.from_dlpack(array)

    def traced_index(self, start: int | list[int]) -> Any:
        return mx.array(start)

    @classmethod
    def traced_append(cls, buffer: Array, rows: Array, start: Any, axis: int) -> Array:
        # Beyond the end this would land on older tokens: those are written back.
        present = mx.slice(buffer, start, [axis], rows.shape)
        fits = start + rows.shape[axis] <= buffer.shape[axis]
        return mx.slice_update(buffer, mx.where(fits, rows, present), start, [axis])

    @classmethod
    def traced_read(cls, buffer: Array, start: Any, length: int, axis: int, dtype: Any) -> Array:
        if length == buffer.shape[axis]:
            return buffer
        size = list(buffer.shape)
        size[axis] = length
        return mx.slice(buffer, start, [axis], size)

    def sync(self, *arrays: Array) -> None:
        mx.eval(*arrays)
