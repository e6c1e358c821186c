"""Writes of rows on torch, and the look at numbers that comes first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import repeat

import torch
from torch.autograd.graph import increment_version

from . import _host_rows
from ._host_rows import HostRowIndex
from .arrays import HostArray, NativeArray, NativeArrays
from .indexing import Axes, axes_of

FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
# What NumPy has, too; others would cross as integers, in the time that NumPy saves.
_OF_NUMPY = frozenset({torch.float32, torch.float16})


def all_finite(arrays: NativeArrays) -> bool:
    """Return whether all numbers are finite; False also for some that are, but very large."""
    host = _seen_by_numpy(arrays)
    if host is not None:  # it takes half the time of torch
        return _host_rows.all_finite(host)
    kind = arrays[0].dtype
    if not kind.is_floating_point or kind in FLOAT8:  # torch has no arithmetic on the latter
        return not kind.is_floating_point
    return math.isfinite(sum([array.sum().item() for array in arrays]))  # inf - inf is NaN


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


def write_on_host(buffers: NativeArrays, rows: NativeArrays, index: HostRowIndex) -> bool:
    """Write `rows`, all finite, to axis 1 of their `buffers` by NumPy, and return True.

    Return False, and nothing is written, for rows that NumPy does not see as they are, or that may
    not be finite.
    """
    new = _seen_by_numpy(rows)
    if new is None or not _host_rows.all_finite(new):
        return False
    for buffer in buffers:  # autograd refuses to go back over what was read before this write
        increment_version(buffer)
    return index.write([buffer.numpy() for buffer in buffers], new)


def _seen_by_numpy(arrays: NativeArrays) -> list[HostArray] | None:
    """Return arrays of the host as NumPy's, in the same memory; None where that takes longer."""
    if arrays[0].dtype not in _OF_NUMPY or True in [array.requires_grad for array in arrays]:
        return None
    return [array.numpy() for array in arrays]


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
