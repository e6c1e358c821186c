"""MLX on Apple GPUs, CUDA and CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import repeat
from types import SimpleNamespace
from typing import ClassVar, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from kvcache.errors import BackendNotAvailableError

from ._mlx_rows import ElementIndex, equally_spaced, is_run, put_rows, take_rows
from .arrays import (
    DType,
    HostArray,
    Namespace,
    NativeArray,
    NativeArrays,
    RowIndex,
    TracedIndex,
)
from .base import Backend
from .blocks import (
    BlockReads,
    Sums,
    add_block,
    begin_sums,
    end_sums,
    read_columns,
    visible_columns,
)
from .dtypes import HOST_DTYPES
from .indexing import FULL_SLICES, Axes, axes_of, set_items, set_slices
from .nonfinite import replace_floats
from .products import NEVER, ReadCosts, Result, Scoring, VisibleColumns

_NAMES = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "int8": mx.int8,
    "uint8": mx.uint8,
    "int32": mx.int32,
    "bool": mx.bool_,
}
_FLOATS = frozenset({mx.float32, mx.float16, mx.bfloat16})


class MlxBackend(Backend):
    """Writes are lazy, and in place when evaluated unless an older view is still alive.

    Evaluate once per step (:meth:`sync`, or reading the result), not once per write. MLX
    has no float8 dtypes, and runs everything on its default device.
    """

    name: ClassVar[str] = "mlx"
    assignment_rebinds: ClassVar[bool] = True
    # mlx.core serves as array-API namespace, but calls `bool` `bool_`.
    xp = cast(Namespace, SimpleNamespace(**{**vars(mx), "bool": mx.bool_}))

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device, *_ = self.devices()
        if self.device == "cpu":  # bound by arithmetic there, so that fewer reads gain nothing
            self.read_costs = ReadCosts(shared=NEVER, run=512)
        if device not in (None, self.device):
            raise BackendNotAvailableError(
                f"MLX computes on its default device, {self.device!r}; got {device!r}. "
                "Change it with mlx.core.set_default_device."
            )

    # Results to be merged come from a slower product than the kernel.
    read_costs = ReadCosts(shared=4096, run=512)

    @staticmethod
    def devices() -> list[str]:
        return [mx.default_device().type.name]

    @property
    def in_host_memory(self) -> bool:
        return True  # the GPU of Apple silicon has no other

    @staticmethod
    def device_of(array: NativeArray) -> str:
        return str(mx.default_device().type.name)

    def _framework_dtypes(self) -> dict[str, DType]:
        return _NAMES

    def alloc(self, shape: Sequence[int], dtype: str) -> NativeArray:
        buffer = mx.zeros(tuple(shape), self.dtype(dtype))
        mx.eval(buffer)  # so that running out of memory raises here, not at a later write
        return buffer

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
        if is_run(index):
            first = int(index[0])
            return self.write_slice(buffer, rows, first, first + index.size, axis)
        return put_rows(buffer, rows, mx.array(index), axis)

    def write_slices(
        self, buffers: NativeArrays, updates: NativeArrays, start: int, stop: int, axis: Axes
    ) -> NativeArrays:
        first = axis if isinstance(axis, int) else axis[0]
        if stop - start == buffers[0].shape[first]:
            # The whole buffer becomes the update, strides included, and reading would stay slow.
            updates = tuple([mx.contiguous(update) for update in updates])
        return set_slices(buffers, updates, start, stop, axis)

    def write_row_sets(
        self, buffers: NativeArrays, rows: NativeArrays, index: HostArray, axis: Axes
    ) -> NativeArrays:
        if is_run(index):
            first = int(index[0])
            return self.write_slices(buffers, rows, first, first + index.size, axis)
        # Unlike an assignment this makes new arrays, so a failure half-way has changed none.
        axes, positions = axes_of(buffers, axis), repeat(mx.array(index))
        return tuple(map(put_rows, buffers, rows, positions, axes))

    def row_index(self, index: HostArray) -> RowIndex:
        return equally_spaced(index) or ElementIndex(index)

    def write_finite_row_sets(
        self, buffers: NativeArrays, rows: NativeArrays, index: RowIndex, axis: Axes
    ) -> NativeArrays:
        finite = self.replace_nonfinite(rows, axis)
        if isinstance(index, slice):
            places = [(*FULL_SLICES[own], index) for own in axes_of(buffers, axis)]
            return set_items(buffers, places, finite)
        return tuple(map(index.put, buffers, finite, axes_of(buffers, axis)))

    def replace_nonfinite(self, arrays: NativeArrays, axis: Axes) -> NativeArrays:
        same = isinstance(axis, int) and arrays[0].shape == arrays[-1].shape
        if same and arrays[0].dtype in _FLOATS and _compiles(self.device):
            return _replace_pairs(*arrays)
        return self.traced_replace_nonfinite(arrays, axis)

    @classmethod
    def traced_replace_nonfinite(cls, arrays: NativeArrays, axis: Axes) -> NativeArrays:
        return replace_floats(cls.xp, arrays, axis, _is_finite)

    def owned(self, arrays: NativeArrays) -> NativeArrays:
        return tuple([array[...] for array in arrays])  # an assignment rebinds the given objects

    def shared(self, arrays: NativeArrays) -> NativeArrays:
        return tuple([array[...] for array in arrays])

    def evaluate(self, *arrays: NativeArray) -> None:
        async_eval: Callable[..., None] = mx.async_eval
        async_eval(*arrays)

    def read_rows(self, buffer: NativeArray, index: HostArray, axis: int) -> NativeArray:
        return take_rows(buffer, mx.array(index), axis)

    def read_slice(self, buffer: NativeArray, start: int, stop: int, axis: int) -> NativeArray:
        return buffer[(*FULL_SLICES[axis], slice(start, stop))]

    def read_slices(self, buffers: NativeArrays, start: int, stop: int, axis: Axes) -> NativeArrays:
        if axis == 1:  # pools: a literal index is the cheapest
            return tuple([buffer[:, start:stop] for buffer in buffers])
        return super().read_slices(buffers, start, stop, axis)

    def concat(self, arrays: Sequence[NativeArray], axis: int) -> NativeArray:
        return mx.concatenate(list(arrays), axis=axis)

    def from_host(self, array: npt.ArrayLike, dtype: str | None = None) -> NativeArray:
        return mx.array(self._host(array, dtype))

    def to_host(self, array: NativeArray) -> HostArray:
        name = self.dtype_name(array)
        if name == "bfloat16":
            # NumPy has no bfloat16 of its own to convert to, so the bits cross as integers.
            array = mx.contiguous(array).view(mx.uint16)
        return np.array(array).view(HOST_DTYPES[name])

    def import_dlpack(self, array: NativeArray) -> NativeArray:
        return array if isinstance(array, mx.array) else mx.from_dlpack(array)

    @classmethod
    def is_traced(cls, array: NativeArray) -> bool:
        # An element of no array: evaluated for free unless `array` is traced, and then refused.
        part = array.reshape(-1)[:0]
        if not _inlined(part):
            return False
        try:
            mx.eval(part)
        except ValueError:
            return True
        return False  # inside of mx.grad, which follows caches, because their arrays are values

    def traced_index(self, start: int | list[int]) -> TracedIndex:
        return mx.array(start)

    @classmethod
    def traced_append(
        cls, buffer: NativeArray, rows: NativeArray, start: NativeArray, axis: int
    ) -> NativeArray:
        last = buffer.shape[axis] - rows.shape[axis]
        if last < 0:
            return buffer
        # MLX checks no start that is an array, and would write outside of the buffer. Rows that do
        # not fit are replaced by those present where they are clamped to.
        clamped = mx.minimum(start, last)
        present = mx.slice(buffer, clamped, [axis], rows.shape)
        return mx.slice_update(buffer, mx.where(start <= last, rows, present), clamped, [axis])

    @classmethod
    def traced_read(
        cls, buffer: NativeArray, start: NativeArray, length: int, axis: int, dtype: DType
    ) -> NativeArray:
        if length == buffer.shape[axis]:
            return buffer[...]  # another object: see assignment_rebinds
        size = list(buffer.shape)
        size[axis] = length
        return mx.slice(buffer, start, [axis], size)

    @classmethod
    def traced_read_rows(
        cls, buffer: NativeArray, index: NativeArray, axis: int, dtype: DType
    ) -> NativeArray:
        return mx.take(buffer, index, axis=axis)

    @classmethod
    def traced_attention(
        cls,
        q: NativeArray,
        buffers: NativeArrays,
        likes: NativeArrays,
        scoring: Scoring,
        reads: BlockReads,
    ) -> NativeArray:
        # A program has no loops and no values: every block is in it, those of padding, too.
        rows, sums = begin_sums(cls.xp, q, buffers, likes, scoring.scale, reads)
        for blocks in reads.blocks:
            numbers = mx.arange(blocks.cells.shape[1])
            for number in range(blocks.starts.shape[0]):
                start, cells, first, last = (array[number] for array in blocks)
                own = Sums(*(_rows_at(array, start, last.shape[0]) for array in sums))
                columns = read_columns(cls.xp, cls.traced_read_rows, buffers, likes, cells)
                visible = visible_columns(cls.xp, numbers, first, last)
                queries = _rows_at(rows, start, last.shape[0])
                new = add_block(cls.xp, own, queries, columns, visible, scoring.softcap)
                pairs = zip(sums, new, strict=True)
                sums = Sums(*(mx.slice_update(array, part, start, [2]) for array, part in pairs))
        return end_sums(cls.xp, sums, q, likes, scoring.sinks, reads)

    def attention_size(
        self,
        q: NativeArray,
        keys: NativeArray,
        values: NativeArray,
        scoring: Scoring,
        visible: VisibleColumns | None,
    ) -> int:
        if self.device == "cpu" or not _has_kernel(q, keys, scoring):
            return super().attention_size(q, keys, values, scoring, visible)
        return int(q.shape[1])  # the kernels of other devices hold no scores in memory

    def attention_block(
        self,
        q: NativeArray,
        keys: NativeArray,
        values: NativeArray,
        scoring: Scoring,
        visible: VisibleColumns | None,
    ) -> Result:
        if not _has_kernel(q, keys, scoring):
            return super().attention_block(q, keys, values, scoring, visible)
        mask: NativeArray = None
        if visible is not None:
            columns = int(keys.shape[1])
            mask = "causal" if visible.causal(columns) else mx.array(visible.mask(columns))
        sinks = None if scoring.sinks is None else scoring.sinks.astype(q.dtype)
        out = mx.fast.scaled_dot_product_attention(
            q[None], keys[None], values[None], scale=scoring.scale, mask=mask, sinks=sinks
        )
        return out[0], None

    def sync(self, *arrays: NativeArray) -> None:
        mx.eval(*arrays)


class _Counter(threading.local):
    """Number of times that MLX ran the Python of :data:`_counted`."""

    calls = 0


_counter = _Counter()


def _has_kernel(q: NativeArray, keys: NativeArray, scoring: Scoring) -> bool:
    """Return whether a kernel of MLX computes attention like this."""
    return scoring.softcap is None and not scoring.log_sum_exp and q.dtype == keys.dtype


def _rows_at(array: NativeArray, start: NativeArray, count: int) -> NativeArray:
    """Return `count` positions of the third axis from `start` on, an array."""
    heads, group, _, dim = array.shape
    return mx.slice(array, start, [2], [heads, group, count, dim])


def _is_finite(array: NativeArray) -> NativeArray:
    # inf - inf is NaN; half the operations of mx.isfinite. In float32, because a CPU would round
    # each difference of bfloat16 back to it.
    wide = array.astype(mx.float32)
    return wide - wide == 0


def _count(array: NativeArray) -> NativeArray:
    _counter.calls += 1
    return array


_counted = mx.compile(_count)


def _inlined(array: NativeArray) -> bool:
    """Return whether MLX traces `array`: it then runs the Python of a compiled function again.

    MLX has no call that says so without evaluating the array.
    """
    _counted(array)  # compiles, if the dtype is new
    before = _counter.calls
    _counted(array)
    return _counter.calls > before


# One operation instead of seven. Shapeless, because element-wise: compiled once for all lengths.
@partial(mx.compile, shapeless=True)
def _replace_pairs(*arrays: NativeArray) -> NativeArrays:
    return MlxBackend.traced_replace_nonfinite(arrays, 0)


@cache
def _compiles(device: str) -> bool:
    """Return whether MLX can compile for `device`: for CPU it calls the host's C++ compiler."""
    if device != "cpu":
        return True
    try:
        mx.eval(_replace_pairs(mx.zeros(1)))
    except RuntimeError:
        return False
    return True
