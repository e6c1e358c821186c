"""Rows on their way into a pool: queued by any thread, written by the thread of the passes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kvcache._locks import Lock
from kvcache._types import Indices
from kvcache.backends import get_backend
from kvcache.snapshots.rows import LayerRows
from kvcache.storage.arrays import LayerArrays

from .layouts import HOST_LAYOUT


class PendingRows(NamedTuple):
    """Rows to write to some cells: the first arrays of each layer, or all of them."""

    cells: Indices
    write: Callable[[], None]
    """Write the rows; called again after a failure, so it must not matter how far it got."""
    to_host: Callable[[], LayerRows]
    """Return the rows in host memory, in the order of `cells`."""


class PendingWrites:
    """Queue of rows to write before the next access to the buffers.

    Every thread may restore a sequence, but only the thread of the passes may write to buffers: on
    some backends (JAX) a write consumes them.

    lock: held while buffers are replaced, and while another thread reads rows of them.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.queue: deque[PendingRows] = deque()
        """The oldest first; empty most of the time."""

    def enqueue(self, rows: PendingRows) -> None:
        """Queue `rows`; from any thread."""
        self.queue.append(rows)

    def discard(self, rows: PendingRows) -> None:
        """Take `rows` out of the queue, if they are in it."""
        with self.lock:
            for number, queued in enumerate(self.queue):
                if queued is rows:
                    del self.queue[number]
                    return

    def drain(self) -> None:
        """Write everything in order; in the thread of the passes."""
        with self.lock:
            while self.queue:
                self.queue[0].write()
                # Only once written: a reader finds the rows in the queue or in the buffers, and
                # rows whose write failed are written by the next access.
                self.queue.popleft()

    def overlay(self, rows: LayerRows, cells: Indices) -> None:
        """Replace `rows`, just read from the buffers, by pending ones for the same `cells`."""
        for pending in self.queue:
            _overlay(rows, cells, pending)

    def rows_of(self, layer: int) -> list[LayerArrays]:
        """Return the arrays of all pending rows of a layer, in host memory."""
        contents = [pending.to_host() for pending in list(self.queue)]
        return [rows[layer] for rows in contents if layer in rows]

    def clear(self) -> None:
        """Forget everything."""
        self.queue.clear()


def finite_rows(rows: LayerRows) -> LayerRows:
    """Return `rows` with finite numbers only, as a put would store them.

    They may come from a file, or from a cache of one sequence, which keeps NaN.
    """
    return {layer: _finite(arrays) for layer, arrays in rows.items()}


def _finite(arrays: LayerArrays) -> LayerArrays:
    numpy, axis = get_backend("numpy"), HOST_LAYOUT.token_axis
    finite = numpy.replace_nonfinite(tuple(array.data for array in arrays), axis)
    return tuple(
        array._replace(data=numpy.to_host(data)) for array, data in zip(arrays, finite, strict=True)
    )


def _overlay(rows: LayerRows, cells: Indices, pending: PendingRows) -> None:
    _, targets, sources = np.intersect1d(cells, pending.cells, return_indices=True)
    if not targets.size:  # a copy to the host is spared
        return
    for layer, arrays in pending.to_host().items():
        if layer not in rows:  # nothing was put to it yet
            rows[layer] = _zeros(arrays, cells.size)
        for array, pending_array in zip(rows[layer], arrays, strict=False):
            array.put(targets, pending_array, sources)


def _zeros(like: LayerArrays, tokens: int) -> LayerArrays:
    return tuple(array.zeros(tokens) for array in like)
