"""Any library with the Python array API standard, for example CuPy or array-api-strict.

The standard guarantees item assignment as the only write in place, and no float dtype smaller than
float32. Further dtypes (CuPy's float16) are used if the namespace of the library has them. A
library of immutable arrays, such as JAX, needs an adapter of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import ClassVar

import array_api_compat
import numpy as np
import numpy.typing as npt

from kvcache.errors import BackendNotAvailableError

from .arguments import root_modules
from .arrays import DType, HostArray, NativeArray, NativeArrays
from .base import Backend
from .blocks import BlockReads, attend_eagerly
from .dtypes import HOST_DTYPES
from .indexing import FULL_SLICES, Axes, axes_of, set_items, slice_keys
from .nonfinite import replace_floats
from .products import Scoring

# Libraries known to work; any other with the standard may be named as well.
_LIBRARIES = ("numpy", "cupy", "array_api_strict")


class ArrayApiBackend(Backend):
    """Backend of an array-API library, named in place of a device: ``"array_api:cupy"``.

    Arrays live on the default device of the library. The name is that of a module to import:
    whoever chooses it chooses code to run.
    """

    name: ClassVar[str] = "array_api"

    def __init__(self, device: str | None = None) -> None:
        self.device = device or "numpy"
        try:
            probe = import_module(self.device).zeros(1)
            self.xp = array_api_compat.array_namespace(probe)
            super().__init__()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the module named may do anything, and exit
            raise BackendNotAvailableError(
                f"array_api:{self.device} needs {self.device!r} to be an installed array-API "
                f"library ({error}). Name one, for example array_api:cupy."
            ) from error

    @staticmethod
    def devices() -> list[str]:
        return [library for library in _LIBRARIES if find_spec(library)]

    @staticmethod
    def device_of(array: NativeArray) -> str:
        return type(array).__module__.partition(".")[0]

    def owns(self, array: NativeArray) -> bool:
        kind: type = type(array)
        return self.device in root_modules(kind)

    def _framework_dtypes(self) -> dict[str, DType]:
        names = [name for name in HOST_DTYPES if hasattr(self.xp, name)]
        # As arrays have them: `numpy.float32`, and CuPy's, is a type, and equal to the dtype of an
        # array, but has another hash.
        return {name: self.xp.zeros(0, dtype=getattr(self.xp, name)).dtype for name in names}

    def alloc(self, shape: Sequence[int], dtype: str) -> NativeArray:
        return self.xp.zeros(tuple(shape), dtype=self.dtype(dtype))

    def write_slice(
        self, buffer: NativeArray, update: NativeArray, start: int, stop: int, axis: int
    ) -> NativeArray:
        buffer[(*FULL_SLICES[axis], slice(start, stop), ...)] = update
        return buffer

    def write_rows(
        self, buffer: NativeArray, rows: NativeArray, index: HostArray, axis: int
    ) -> NativeArray:
        return self.write_row_sets((buffer,), (rows,), index, axis)[0]

    def write_slices(
        self, buffers: NativeArrays, updates: NativeArrays, start: int, stop: int, axis: Axes
    ) -> NativeArrays:
        keys = [(*key, ...) for key in slice_keys(buffers, start, stop, axis)]
        return set_items(buffers, keys, updates)

    def write_row_sets(
        self, buffers: NativeArrays, rows: NativeArrays, index: HostArray, axis: Axes
    ) -> NativeArrays:
        # The standard assigns to slices only, so each run of consecutive positions is one write.
        runs = [
            (buffer, (*FULL_SLICES[own], target, ...), array[(*FULL_SLICES[own], source, ...)])
            for buffer, array, own in zip(buffers, rows, axes_of(buffers, axis), strict=True)
            for source, target in _runs(index)
        ]
        set_items(*zip(*runs, strict=True))
        return buffers

    def read_rows(self, buffer: NativeArray, index: HostArray, axis: int) -> NativeArray:
        return self.xp.take(buffer, self.xp.asarray(index), axis=axis)

    def read_slice(self, buffer: NativeArray, start: int, stop: int, axis: int) -> NativeArray:
        return buffer[(*FULL_SLICES[axis], slice(start, stop), ...)]

    def concat(self, arrays: Sequence[NativeArray], axis: int) -> NativeArray:
        return self.xp.concat(list(arrays), axis=axis)

    def owned(self, arrays: NativeArrays) -> NativeArrays:
        return tuple([self.xp.asarray(array, copy=True) for array in arrays])

    def from_host(self, array: npt.ArrayLike, dtype: str | None = None) -> NativeArray:
        # A copy first, because asarray may share the memory of the caller's array.
        return self.xp.asarray(self._host(array, dtype).copy())

    def to_host(self, array: NativeArray) -> HostArray:
        self.dtype_name(array)  # raises for a dtype without a name here
        return np.array(np.from_dlpack(array, device="cpu"))

    @classmethod
    def traced_replace_nonfinite(cls, arrays: NativeArrays, axis: Axes) -> NativeArrays:
        xp = array_api_compat.array_namespace(*arrays)
        return replace_floats(xp, arrays, axis, xp.isfinite)

    @classmethod
    def traced_write(
        cls, buffer: NativeArray, rows: NativeArray, index: NativeArray, axis: int
    ) -> NativeArray:
        # Row by row, because the standard has no assignment by an index array.
        for i in range(rows.shape[axis]):
            row = rows[(*FULL_SLICES[axis], slice(i, i + 1), ...)]
            buffer = cls.traced_append(buffer, row, int(index[i]), axis)
        return buffer

    @classmethod
    def traced_append(
        cls, buffer: NativeArray, rows: NativeArray, start: NativeArray, axis: int
    ) -> NativeArray:
        stop = start + rows.shape[axis]
        if stop <= buffer.shape[axis]:
            buffer[(*FULL_SLICES[axis], slice(start, stop), ...)] = rows
        return buffer

    @classmethod
    def traced_read(
        cls, buffer: NativeArray, start: NativeArray, length: int, axis: int, dtype: DType
    ) -> NativeArray:
        return buffer[(*FULL_SLICES[axis], slice(start, start + length), ...)]

    @classmethod
    def traced_read_rows(
        cls, buffer: NativeArray, index: NativeArray, axis: int, dtype: DType
    ) -> NativeArray:
        return array_api_compat.array_namespace(buffer).take(buffer, index, axis=axis)

    @classmethod
    def traced_attention(
        cls,
        q: NativeArray,
        buffers: NativeArrays,
        likes: NativeArrays,
        scoring: Scoring,
        reads: BlockReads,
    ) -> NativeArray:
        xp = array_api_compat.array_namespace(q)
        return attend_eagerly(xp, cls.traced_read_rows, q, buffers, likes, scoring, reads)

    def import_dlpack(self, array: object) -> NativeArray:
        try:
            return self.xp.from_dlpack(array)
        except TypeError:  # CuPy takes none from the host
            if not isinstance(array, np.ndarray):
                raise
            return self.xp.asarray(array)


def _runs(index: HostArray) -> Iterator[tuple[slice, slice]]:
    """Yield the runs of consecutive positions in `index`: where in it, and which positions."""
    ends = [*(np.flatnonzero(np.diff(index) != 1) + 1).tolist(), index.size]
    for first, last in zip([0, *ends], ends, strict=False):
        start = int(index[first])
        yield slice(first, last), slice(start, start + last - first)
