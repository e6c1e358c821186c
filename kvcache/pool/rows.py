"""Rows on their way into a pool: queued by any thread, written by the thread of the passes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import numpy as np

from kvcache._types import Indices
from kvcache.backends import get_backend
from kvcache.snapshots.rows import LayerRows
from kvcache.storage.arrays import LayerArrays


class PendingWrites:
    """Queue of rows to write before the next access to the buffers.

    Every thread may restore a sequence, but only the thread of the passes may write to buffers: on
    some backends (JAX) a write consumes them.

    lock: held while buffers are replaced, and while another thread reads rows of them.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.queue: deque[tuple[Indices, LayerRows]] = deque()
        """Cells and rows, the oldest first; empty most of the time."""

    def enqueue(self, cells: Indices, layers: LayerRows) -> None:
        """Queue `layers` to be written to `cells`; from any thread."""
        if layers:
            self.queue.append((cells, layers))

    def drain(self, write: Callable[[Indices, LayerRows], None]) -> None:
        """Write everything in order; in the thread of the passes."""
        with self.lock:
            while self.queue:
                write(*self.queue[0])
                # Only once written: a reader finds the rows in the queue or in the buffers.
                self.queue.popleft()

    def overlay(self, rows: LayerRows, cells: Indices) -> None:
        """Replace `rows`, just read from the buffers, by pending ones for the same `cells`."""
        for pending_cells, layers in self.queue:
            _overlay(rows, cells, pending_cells, layers)

    def clear(self) -> None:
        """Forget everything."""
        self.queue.clear()


def finite_rows(rows: LayerRows) -> LayerRows:
    """Return `rows` with finite numbers only, as a put would store them.

    They may come from a file, or from a cache of one sequence, which keeps NaN.
    """
    return {layer: _finite(arrays) for layer, arrays in rows.items()}


def _finite(arrays: LayerArrays) -> LayerArrays:
    axes = [array.data.ndim - 2 for array in arrays]  # "htd" with any axes in front
    numpy = get_backend("numpy")
    finite = numpy.replace_nonfinite(tuple(array.data for array in arrays), axes)
    return tuple(
        array._replace(data=numpy.to_host(data)) for array, data in zip(arrays, finite, strict=True)
    )


def _overlay(rows: LayerRows, cells: Indices, pending_cells: Indices, layers: LayerRows) -> None:
    _, targets, sources = np.intersect1d(cells, pending_cells, return_indices=True)
    for layer, pending in layers.items() if targets.size else ():
        if layer not in rows:  # nothing was put to it yet
            rows[layer] = _zeros(pending, cells.size)
        for array, pending_array in zip(rows[layer], pending, strict=False):
            array.put(targets, pending_array, sources)


def _zeros(like: LayerArrays, tokens: int) -> LayerArrays:
    return tuple(array.zeros(tokens) for array in like)
