"""Checks of the hooks behind pools: all arrays of a layer at once, in every layout."""

from __future__ import annotations

import numpy as np

from kvcache.backends import HOST_DTYPES, Backend, HostArray
from kvcache.backends.arrays import Arrays
from kvcache.backends.indexing import Axes

from .checks import check
from .coded import same

_LAYERS: tuple[tuple[tuple[int, ...], Axes], ...] = (
    ((1, 1), 1),
    ((0, 0), 0),
    ((2, 2), 2),
    ((1, 2), (1, 2)),
    ((1,), 1),
)
"""Layers: the axis of the cells of each array, and the same as the hooks are given it."""
_ORDERS = ((1, 0, 2), (0, 1, 2), (0, 2, 1))
"""By the axis of the cells, the axes of an array among heads, cells, dim."""


def _numbers(heads: int, tokens: int, dtype: str, first: int) -> HostArray:
    """Return ``[heads, tokens, dim]`` of small numbers, finite in every dtype; dim is heads + 3."""
    shape = heads, tokens, heads + 3
    numbers = (np.arange(heads * tokens * (heads + 3)) * 3 + first) % 7
    return numbers.reshape(shape).astype(HOST_DTYPES[dtype])


def _buffers(backend: Backend, hosts: list[HostArray], axes: tuple[int, ...]) -> Arrays:
    orders = (_ORDERS[axis] for axis in axes)
    return tuple(backend.from_host(h.transpose(o)) for h, o in zip(hosts, orders, strict=True))


@check
def pools_write_scattered_cells(backend: Backend, dtype: str) -> None:
    """Write rows to the same cells of layers of every layout and size, all by one index."""
    cells = np.array([5, 0, 3], np.int32)
    index = backend.row_index(cells)
    for heads, (axes, axis) in enumerate(_LAYERS, 2):
        hosts = [_numbers(heads, 8, dtype, first) for first in range(len(axes))]
        rows = [_numbers(heads, 3, dtype, first) for first in range(3, 3 + len(axes))]
        # As most models have them: views of ``[tokens, heads, dim]``.
        views = tuple(
            backend.xp.permute_dims(
                backend.from_host(own.transpose(1, 0, 2)),
                tuple((1, 0, 2)[letter] for letter in _ORDERS[place]),
            )
            for own, place in zip(rows, axes, strict=True)
        )
        written = backend.write_finite_row_sets(_buffers(backend, hosts, axes), views, index, axis)
        for host, own, place, array in zip(hosts, rows, axes, written, strict=True):
            host[:, cells] = own
            same(backend.to_host(array), host.transpose(_ORDERS[place]))


@check
def read_slices_reads_all(backend: Backend, dtype: str) -> None:
    """Read a range of every array of a layer, at its beginning or behind that."""
    for heads, (axes, axis) in enumerate(_LAYERS, 2):
        hosts = [_numbers(heads, 8, dtype, first) for first in range(len(axes))]
        for start, stop in ((0, 2), (3, 5)):  # of one length: some compile a program for each
            parts = backend.read_slices(_buffers(backend, hosts, axes), start, stop, axis)
            for host, place, part in zip(hosts, axes, parts, strict=True):
                same(backend.to_host(part), host[:, start:stop].transpose(_ORDERS[place]))
