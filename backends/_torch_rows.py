"""Writes of rows on torch, and the look at numbers that comes first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import repeat

import torch
from torch.autograd.graph import increment_version

from . import _host_rows
from ._host_rows import HostLayer, HostRowIndex
from .arrays import HostArray, NativeArray, NativeArrays
from .dtypes import HOST_DTYPES
from .indexing import Axes, axes_of
from .nonfinite import dtype_label

FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
CARRIERS = {
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}
"""Integers of equal width, as which dtypes cross for which torch and NumPy have no conversion."""
_OF_NUMPY = {kind: HOST_DTYPES[dtype_label(kind)] for kind in CARRIERS}


def seen_by_numpy(array: NativeArray) -> HostArray:
    """Return an array of the host as NumPy's, in the same memory."""
    if array.requires_grad:
        array = array.detach()
    carrier = CARRIERS.get(array.dtype)
    seen: HostArray = (array if carrier is None else array.view(carrier)).numpy()
    return seen if carrier is None else seen.view(_OF_NUMPY[array.dtype])


def all_finite(arrays: NativeArrays) -> bool:
    """Return whether all numbers are finite; False also for some that are, but very large."""
    if arrays[0].dtype == torch.bfloat16:  # sums take less time than it takes to cross
        return math.isfinite(sum([array.sum().item() for array in arrays]))  # inf - inf is NaN
    return _host_rows.all_finite([*map(seen_by_numpy, arrays)])


def is_finite(array: NativeArray) -> NativeArray:
    """Return whether each number is finite."""
    return array - array == 0  # inf - inf is NaN; torch.isfinite launches twice as many kernels


class TorchRowIndex:
    """Positions of rows, for host memory and for the device.

    as_index: makes an index array of the device.
    """

    def __init__(self, positions: HostArray, as_index: Callable[[HostArray], NativeArray]) -> None:
        self.on_host = HostRowIndex(positions)
        self._as_index = as_index

    @cached_property
    def on_device(self) -> NativeArray:
        return self._as_index(self.on_host.positions)


def write_on_host(
    buffers: NativeArrays, rows: NativeArrays, index: HostRowIndex
) -> HostLayer | None:
    """Write `rows` to axis 1 of their `buffers` by NumPy, and return these.

    Return None, and nothing is written, where gradients go through rows, where these may not be
    finite, or where buffers are not compact.
    """
    if True in [array.requires_grad for array in rows]:
        return None
    new = [*map(seen_by_numpy, rows)]
    if not _host_rows.all_finite(new):
        return None
    if type(buffers) is HostLayer:
        layer: HostLayer | None = buffers
    else:
        layer = HostLayer.of(buffers, [*map(seen_by_numpy, buffers)])
    if layer is not None:
        for buffer in buffers:  # autograd refuses to go back over what was read before this write
            increment_version(buffer)
        index.write(layer, new)
    return layer


def copy_rows(
    buffers: NativeArrays, rows: NativeArrays, index: NativeArray, axis: Axes
) -> NativeArrays:
    """Write `rows` to positions `index`, int64, of `axis` of their `buffers`, and return these."""
    # Everything that may fail comes first; the writes are one expression, as in set_items.
    own = [array.detach() if array.requires_grad else array for array in rows]
    words = None if isinstance(axis, tuple) or axis > 1 else _as_words([*buffers, *own])
    if words is None:
        pairs = map(as_copied, buffers, own)
        words = [array for parts in zip(*pairs, strict=True) for array in parts]
    targets, sources = words[: len(own)], words[len(own) :]
    _ = [*map(torch.Tensor.index_copy_, targets, axes_of(buffers, axis), repeat(index), sources)]
    return buffers


def _as_words(arrays: Sequence[NativeArray]) -> Sequence[NativeArray] | None:
    """Return views of the largest elements that there are, None if these do not divide the rows.

    On a CPU index_copy_ goes from row to row for each element, so that few large ones are faster.
    """
    if not arrays[0].is_cpu:
        return None
    try:
        return [array.view(torch.complex128) for array in arrays]
    except RuntimeError:
        return None


def as_copied(buffer: NativeArray, rows: NativeArray) -> tuple[NativeArray, NativeArray]:
    """Return views of both that index_copy_ takes: it knows no float8."""
    if buffer.dtype in FLOAT8:
        return buffer.view(torch.uint8), rows.detach().view(torch.uint8)
    return buffer, rows.detach()


class RowCopier:
    """Copies rows to memory that it keeps, by the number of their array in a layer.

    New memory comes from the system page by page, which takes longer than the copy.

    as_index: makes an index array of the device.
    """

    def __init__(self, as_index: Callable[[HostArray], NativeArray]) -> None:
        self._as_index = as_index
        self._memory: dict[int, NativeArray] = {}

    def __call__(
        self, number: int, buffer: NativeArray, index: HostArray, axis: int
    ) -> NativeArray:
        shape = [*buffer.shape[:axis], index.size, *buffer.shape[axis + 1 :]]
        count, memory = math.prod(shape), self._memory.get(number)
        if memory is None or memory.dtype != buffer.dtype or memory.numel() < count:
            with torch.inference_mode(False):  # else it could not be written to outside of it
                memory = torch.empty(count, dtype=buffer.dtype, device=buffer.device)
            self._memory[number] = memory
        out = memory[:count].view(shape)
        return torch.index_select(buffer, axis, self._as_index(index), out=out)
