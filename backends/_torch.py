"""torch on CPU, CUDA, or any other accelerator it knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import array_api_compat.torch
import numpy as np
import numpy.typing as npt
import torch

from .arrays import DType, HostArray, Namespace, NativeArray
from .base import FULL_SLICES, Backend, FastKey
from .dtypes import HOST_DTYPES

# torch and NumPy share no name for these, so they cross as bits of the same width.
_CARRIERS = {
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}
_FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})


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
        self.device = self._check_device(device, usable)

    @staticmethod
    def devices() -> list[str]:
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None or not torch.accelerator.is_available():
            return ["cpu"]
        return [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())] + [
            "cpu"
        ]

    @staticmethod
    def device_of(array: NativeArray) -> str:
        return "cpu" if array.device.type == "cpu" else str(array.device)

    def _framework_dtypes(self) -> dict[str, DType]:
        return {name: getattr(torch, name) for name in HOST_DTYPES}

    def fast_key(self, array: NativeArray) -> FastKey:
        # torch would copy from any device without a word.
        return type(array), array.shape, array.dtype, array.device

    def alloc(self, shape: Sequence[int], dtype: str) -> NativeArray:
        # A tensor born under inference_mode could not be written outside of it.
        with torch.inference_mode(False):
            return torch.zeros(tuple(shape), dtype=self.dtype(dtype), device=self.device)

    def write_slice(
        self, buffer: NativeArray, update: NativeArray, start: int, stop: int, axis: int
    ) -> NativeArray:
        if update.requires_grad:
            update = update.detach()
        if axis == 2:  # the tokens of every cache: a literal index is the cheapest
            buffer[:, :, start:stop] = update
        else:
            buffer[(*FULL_SLICES[axis], slice(start, stop))] = update
        return buffer

    def write_rows(
        self, buffer: NativeArray, rows: NativeArray, index: HostArray, axis: int
    ) -> NativeArray:
        return self.traced_write(buffer, rows, self._index(index), axis)

    def read_rows(self, buffer: NativeArray, index: HostArray, axis: int) -> NativeArray:
        return torch.index_select(buffer.detach(), axis, self._index(index))

    def read_slice(self, buffer: NativeArray, start: int, stop: int, axis: int) -> NativeArray:
        if start:
            return buffer.narrow(axis, start, stop - start)
        size = list(buffer.shape)
        size[axis] = stop
        return buffer.as_strided(size, buffer.stride())  # takes half the time of narrow

    def concat(self, arrays: Sequence[NativeArray], axis: int) -> NativeArray:
        return torch.cat([array.detach() for array in arrays], dim=axis)

    def free(self, buffer: NativeArray) -> None:
        # Empties this handle. Resizing the storage would free more, and leave views dangling.
        buffer.set_()

    def detached(self, array: NativeArray) -> NativeArray:
        return array.detach()

    def from_host(self, array: npt.ArrayLike, dtype: str | None = None) -> NativeArray:
        host = self._host(array, dtype)
        kind = self.dtype(host.dtype.name)
        carrier = _CARRIERS.get(kind)
        bits = host if carrier is None else host.view(str(carrier).removeprefix("torch."))
        return torch.tensor(bits, device=self.device).view(kind)

    def to_host(self, array: NativeArray) -> HostArray:
        name = self.dtype_name(array)
        carrier = _CARRIERS.get(array.dtype, array.dtype)
        bits: HostArray = array.detach().contiguous().view(carrier).cpu().numpy()
        return np.array(bits.view(HOST_DTYPES[name]))

    def import_dlpack(self, array: object) -> NativeArray:
        return array if isinstance(array, torch.Tensor) else torch.from_dlpack(array)

    @classmethod
    def traced_write(
        cls, buffer: NativeArray, rows: NativeArray, index: NativeArray, axis: int
    ) -> NativeArray:
        index = index.long()  # all that index_copy_ takes; it takes half the time of assigning
        if buffer.dtype in _FLOAT8:
            # It has no float8.
            buffer.view(torch.uint8).index_copy_(axis, index, rows.detach().view(torch.uint8))
            return buffer
        return buffer.index_copy_(axis, index, rows.detach())

    @classmethod
    def traced_append(
        cls, buffer: NativeArray, rows: NativeArray, start: NativeArray, axis: int
    ) -> NativeArray:
        # Beyond the end indices stop at the last slot, which is given what it holds.
        last = buffer.shape[axis] - 1
        index = (start + torch.arange(rows.shape[axis], device=buffer.device)).clamp(max=last)
        present = buffer.index_select(axis, index)
        fits = start + rows.shape[axis] <= buffer.shape[axis]
        return cls.traced_write(buffer, torch.where(fits, rows, present), index, axis)

    def sync(self, *arrays: NativeArray) -> None:
        if not self.device.startswith("cpu"):
            torch.accelerator.synchronize(self.device)

    def _index(self, index: HostArray) -> NativeArray:
        return torch.tensor(index, dtype=torch.int64, device=self.device)
