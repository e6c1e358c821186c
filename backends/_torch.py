"""torch on CPU, CUDA, or any other accelerator of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import array_api_compat.torch
import numpy as np
import numpy.typing as npt
import torch

from kvcache.errors import NotSupportedError, UnknownBackendError

from ._torch_attention import (
    MASKED,
    attend,
    attend_in_blocks,
    attend_to_all_runs,
    attend_to_runs,
    attend_with_logarithm,
    gives_logarithm,
    is_square,
    serves_all_runs,
)
from ._torch_rows import (
    CARRIERS,
    FLOAT8,
    RowCopier,
    TorchRowIndex,
    all_finite,
    as_copied,
    copy_rows,
    is_finite,
    write_on_host,
)
from .arguments import checked_device
from .arrays import DType, HostArray, Namespace, NativeArray, NativeArrays, RowIndex
from .base import Backend, FastKey
from .blocks import BlockReads
from .dtypes import HOST_DTYPES
from .indexing import FULL_SLICES, Axes, set_slices
from .nonfinite import replaced, substitutes
from .products import NEVER, ReadCosts, Result, Scoring, VisibleColumns

# By dtype, for keys alone and for keys with values: a compiler of programs cannot trace how they
# are made.
_SUBSTITUTES = {
    getattr(torch, name): (substitutes(name, 1), substitutes(name, 2)) for name in HOST_DTYPES
}


class TorchBackend(Backend):
    """Buffers are plain tensors outside autograd, written in place."""

    name: ClassVar[str] = "torch"
    array_types: ClassVar[tuple[type, ...]] = (torch.Tensor,)
    xp = cast(Namespace, array_api_compat.torch)

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        usable = self.devices()
        if device and f"{device}:0" in usable:
            device = f"{device}:0"
        elif device == "cpu:0":
            device = "cpu"
        self.device = checked_device(self.name, device, usable)
        if self.device != "cpu":  # a call costs more there than what it reads
            self.read_costs = ReadCosts(shared=NEVER, run=NEVER, packed=True)

    @staticmethod
    def devices() -> list[str]:
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None or not torch.accelerator.is_available():
            return ["cpu"]
        return [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())] + [
            "cpu"
        ]

    @classmethod
    def check_type(cls, kind: type) -> None:
        # By name: importing its module takes a tenth of a second, for nearly nobody.
        names = [(base.__name__, base.__module__.partition(".")[0]) for base in kind.__mro__]
        if ("DTensor", "torch") in names:
            raise UnknownBackendError(
                "a cache holds tensors of one device, which its writes change in place; got a "
                "DTensor, whose writes are collective calls. Keep a cache in every process, of the "
                "local part: cache.update(keys.to_local(), values.to_local())."
            )

    @property
    def in_host_memory(self) -> bool:
        return self.device == "cpu"

    @staticmethod
    def device_of(array: NativeArray) -> str:
        TorchBackend.check_type(type(array))
        return "cpu" if array.device.type == "cpu" else str(array.device)

    def _framework_dtypes(self) -> dict[str, DType]:
        return {name: getattr(torch, name) for name in HOST_DTYPES}

    def fast_key(self, array: NativeArray) -> FastKey:
        # The device, too, because torch would silently copy from any other one.
        # Gradients, too, because they take another path.
        gradients = array.requires_grad and torch.is_grad_enabled()
        return type(array), array.shape, array.dtype, array.device, gradients

    def alloc(self, shape: Sequence[int], dtype: str) -> NativeArray:
        # A tensor made under inference_mode could not be written outside of it.
        with torch.inference_mode(False):
            return torch.zeros(tuple(shape), dtype=self.dtype(dtype), device=self.device)

    def write_slice(
        self, buffer: NativeArray, update: NativeArray, start: int, stop: int, axis: int
    ) -> NativeArray:
        if update.requires_grad:  # else the buffer would join the graph and keep updates alive
            update = update.detach()
        if axis == 2:  # the token axis of per-layer caches: a literal index is the cheapest
            buffer[:, :, start:stop] = update
        else:
            buffer[(*FULL_SLICES[axis], slice(start, stop))] = update
        return buffer

    def write_rows(
        self, buffer: NativeArray, rows: NativeArray, index: HostArray, axis: int
    ) -> NativeArray:
        if rows.requires_grad:  # as in write_slice
            rows = rows.detach()
        return self.traced_write(buffer, rows, self._index(index), axis)

    def write_slices(
        self, buffers: NativeArrays, updates: NativeArrays, start: int, stop: int, axis: Axes
    ) -> NativeArrays:
        updates = tuple([array.detach() if array.requires_grad else array for array in updates])
        return set_slices(buffers, updates, start, stop, axis)

    def write_finite_slices(
        self, buffers: NativeArrays, updates: NativeArrays, start: int, stop: int, axis: Axes
    ) -> NativeArrays:
        # The usual step in few calls: each costs as much as the bytes of a token.
        if axis == 1 and len(buffers) == 2 and self.device == "cpu" and all_finite(updates):
            (keys, values), (k, v) = buffers, updates
            if not (k.requires_grad or v.requires_grad):
                keys[:, start:stop], values[:, start:stop] = k, v
                return buffers
        return super().write_finite_slices(buffers, updates, start, stop, axis)

    def row_index(self, index: HostArray) -> RowIndex:
        return TorchRowIndex(index, self._index)

    def write_finite_row_sets(
        self, buffers: NativeArrays, rows: NativeArrays, index: RowIndex, axis: Axes
    ) -> NativeArrays:
        if axis == 1 and self.device == "cpu":
            written = write_on_host(buffers, rows, index.on_host)
            if written is not None:
                return written
        return copy_rows(buffers, self.replace_nonfinite(rows, axis), index.on_device, axis)

    def write_row_sets(
        self, buffers: NativeArrays, rows: NativeArrays, index: HostArray, axis: Axes
    ) -> NativeArrays:
        return copy_rows(buffers, rows, self._index(index), axis)

    def read_rows(self, buffer: NativeArray, index: HostArray, axis: int) -> NativeArray:
        return torch.index_select(buffer.detach(), axis, self._index(index))

    def read_slice(self, buffer: NativeArray, start: int, stop: int, axis: int) -> NativeArray:
        size, strides = list(buffer.shape), buffer.stride()
        size[axis] = stop - start
        if not start:
            return buffer.as_strided(size, strides)  # takes half the time of narrow
        return buffer.as_strided(size, strides, buffer.storage_offset() + start * strides[axis])

    def read_slices(self, buffers: NativeArrays, start: int, stop: int, axis: Axes) -> NativeArrays:
        first, last = buffers[0], buffers[-1]
        strides = first.stride()
        alike = last.shape == first.shape and last.stride() == strides
        if start or len(buffers) != 2 or isinstance(axis, tuple) or not alike:
            return super().read_slices(buffers, start, stop, axis)
        size = list(first.shape)
        size[axis] = stop
        return first.as_strided(size, strides), last.as_strided(size, strides)

    def concat(self, arrays: Sequence[NativeArray], axis: int) -> NativeArray:
        return torch.cat([array.detach() for array in arrays], dim=axis)

    def owned(self, arrays: NativeArrays) -> NativeArrays:
        if torch.is_inference_mode_enabled():  # see alloc; entering the context costs a microsecond
            with torch.inference_mode(False):
                return _cloned(arrays)
        return _cloned(arrays)

    def free(self, buffer: NativeArray) -> None:
        # Empties this handle only. Resizing the storage would free it under views as well.
        buffer.set_()

    @classmethod
    def is_traced(cls, array: NativeArray) -> bool:
        return bool(torch._C._functorch.is_functorch_wrapped_tensor(array))

    def requires_grad(self, array: NativeArray) -> bool:
        return _requires_grad(array)

    def with_gradients(
        self, columns: NativeArray, update: NativeArray, start: int, axis: int
    ) -> NativeArray:
        if not _requires_grad(update):
            return columns
        stop, length = start + update.shape[axis], columns.shape[axis]
        parts = columns.narrow(axis, 0, start), update, columns.narrow(axis, stop, length - stop)
        return torch.cat(parts, dim=axis)

    def detached(self, array: NativeArray) -> NativeArray:
        return array.detach()

    def from_host(self, array: npt.ArrayLike, dtype: str | None = None) -> NativeArray:
        host = self._host(array, dtype)
        kind = self.dtype(host.dtype.name)
        carrier = CARRIERS.get(kind)
        bits = host if carrier is None else host.view(str(carrier).removeprefix("torch."))
        return torch.tensor(bits, device=self.device).view(kind)

    def to_host(self, array: NativeArray) -> HostArray:
        name = self.dtype_name(array)
        carrier = CARRIERS.get(array.dtype, array.dtype)
        bits: HostArray = array.detach().contiguous().view(carrier).cpu().numpy()
        return np.array(bits.view(HOST_DTYPES[name]))

    def import_dlpack(self, array: object) -> NativeArray:
        tensor = array if isinstance(array, torch.Tensor) else torch.from_dlpack(array)
        return tensor.to(self.device)  # itself if it is there

    def replace_nonfinite(self, arrays: NativeArrays, axis: Axes) -> NativeArrays:
        # On CPU a look is cheap. Elsewhere it would wait for the device.
        if self.device == "cpu" and all_finite(arrays):
            return arrays
        return self.traced_replace_nonfinite(arrays, axis)

    @classmethod
    def traced_replace_nonfinite(cls, arrays: NativeArrays, axis: Axes) -> NativeArrays:
        kind = arrays[0].dtype
        detached = [array.detach() for array in arrays]
        numbers = _SUBSTITUTES[kind][min(len(arrays), 2) - 1]
        numbers += numbers[1:] * (len(arrays) - 2)  # further arrays are like values
        if not numbers:
            return tuple(detached)
        if kind not in FLOAT8:
            return replaced(cls.xp, tuple(detached), axis, numbers, is_finite)
        # torch has no arithmetic on these dtypes, but float32 holds all their numbers. Not on their
        # bits, which the compiler of torch would convert to float8 as if they were numbers.
        wide = tuple([array.float() for array in detached])
        return tuple([array.to(kind) for array in replaced(cls.xp, wide, axis, numbers, is_finite)])

    @classmethod
    def traced_write(
        cls, buffer: NativeArray, rows: NativeArray, index: NativeArray, axis: int
    ) -> NativeArray:
        # index_copy_ takes half the time of an assignment, but only int64 indices and no float8.
        index = index.long()
        if _requires_grad(rows) or _requires_grad(buffer):
            return buffer.index_copy(axis, index, rows)  # a copy, which gradients go through
        target, source = as_copied(buffer, rows)
        target.index_copy_(axis, index, source)
        return buffer

    @classmethod
    def traced_append(
        cls, buffer: NativeArray, rows: NativeArray, start: NativeArray, axis: int
    ) -> NativeArray:
        # Indices beyond the end are clamped to the last slot; if `rows` do not fit, all slots are
        # rewritten with their present content. A program cannot branch on the value of `start`.
        last = buffer.shape[axis] - 1
        index = (start + torch.arange(rows.shape[axis], device=buffer.device)).clamp(max=last)
        present = buffer.index_select(axis, index)
        fits = start + rows.shape[axis] <= buffer.shape[axis]
        return cls.traced_write(buffer, torch.where(fits, rows, present), index, axis)

    @classmethod
    def traced_read_rows(
        cls, buffer: NativeArray, index: NativeArray, axis: int, dtype: DType
    ) -> NativeArray:
        return torch.index_select(buffer, axis, index.long())

    @classmethod
    def traced_attention(
        cls,
        q: NativeArray,
        buffers: NativeArrays,
        likes: NativeArrays,
        scoring: Scoring,
        reads: BlockReads,
    ) -> NativeArray:
        if _requires_grad(q):
            raise NotSupportedError(
                "gradients do not flow through attend; the queries ask for them. Run the program "
                "without gradients, or compute attention of what functional.get returns."
            )
        return attend_in_blocks(q, buffers, likes, scoring, reads)

    def from_traced(self, buffer: NativeArray, dtype: str) -> NativeArray:
        return buffer.detach() if buffer.requires_grad else buffer

    def traced_range(self, stop: int) -> NativeArray:
        return torch.arange(stop, dtype=torch.int32, device=self.device)

    def row_copier(self) -> RowCopier:
        return RowCopier(self._index)

    def attention_of_runs(
        self,
        q: NativeArray,
        keys: NativeArray,
        values: NativeArray,
        scoring: Scoring,
        runs: Sequence[tuple[int, int]],
    ) -> NativeArray:
        if scoring.sinks is None and self._has_kernel(q, keys, values, scoring, None):
            at_once = serves_all_runs(q, keys, values)
            attend_to = attend_to_all_runs if at_once else attend_to_runs
            return attend_to(q, keys, values, scoring.scale, runs)
        return super().attention_of_runs(q, keys, values, scoring, runs)

    def attention_size(
        self,
        q: NativeArray,
        keys: NativeArray,
        values: NativeArray,
        scoring: Scoring,
        visible: VisibleColumns | None,
    ) -> int:
        tokens = int(q.shape[1])
        if not self._has_kernel(q, keys, values, scoring, visible):
            return super().attention_size(q, keys, values, scoring, visible)
        return tokens if visible is None or is_square(tokens, keys, visible) else MASKED

    def attention_block(
        self,
        q: NativeArray,
        keys: NativeArray,
        values: NativeArray,
        scoring: Scoring,
        visible: VisibleColumns | None,
    ) -> Result:
        if not self._has_kernel(q, keys, values, scoring, visible):
            return super().attention_block(q, keys, values, scoring, visible)
        if scoring.log_sum_exp or scoring.sinks is not None:
            return attend_with_logarithm(q, keys, values, scoring, visible)
        return attend(q, keys, values, scoring.scale, visible), None

    def _has_kernel(
        self,
        q: NativeArray,
        keys: NativeArray,
        values: NativeArray,
        scoring: Scoring,
        visible: VisibleColumns | None,
    ) -> bool:
        """Return whether a kernel of torch serves, which never holds all scores in memory."""
        if scoring.softcap is not None or q.dtype != keys.dtype:
            return False
        if keys.shape[-1] != values.shape[-1]:
            return False
        plain = scoring.sinks is None and not scoring.log_sum_exp
        return plain or gives_logarithm(q, visible)

    def sync(self, *arrays: NativeArray) -> None:
        if not self.device.startswith("cpu"):
            torch.accelerator.synchronize(self.device)

    def _index(self, index: HostArray) -> NativeArray:
        # A copy that shares its memory with no array of the caller takes a third of torch.tensor.
        return torch.from_numpy(index.astype(np.int64)).to(self.device)


def _requires_grad(array: NativeArray) -> bool:
    """Return whether gradients go through what is computed from `array`."""
    return bool(array.requires_grad) and torch.is_grad_enabled()


def _cloned(arrays: NativeArrays) -> NativeArrays:
    return tuple([(a.detach() if a.requires_grad else a).clone() for a in arrays])
