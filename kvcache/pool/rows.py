"""Rows on their way into a pool: brought by any thread, written by the thread of the passes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import numpy as np

from kvcache._types import Indices
from kvcache.snapshots.rows import LayerRows
from kvcache.storage.arrays import LayerArrays


class PendingWrites:
    """A queue of rows to be written before anything is read or written.

    Threads other than that of the passes may restore a sequence, and must not touch the buffers:
    on some backends a pass consumes them.

    lock: held while buffers are replaced, and by those who read rows of them in another thread.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.queue: deque[tuple[Indices, LayerRows]] = deque()
        """Cells and rows, the oldest first; empty most of the time."""

    def enqueue(self, cells: Indices, layers: LayerRows) -> None:
        """Have `layers` written to `cells`; from any thread."""
        if layers:
            self.queue.append((cells, layers))

    def drain(self, write: Callable[[Indices, LayerRows], None]) -> None:
        """Write everything, in order; in the thread of the passes."""
        with self.lock:
            while self.queue:
                write(*self.queue[0])
                self.queue.popleft()  # after it is written: a reader finds it in either place

    def overlay(self, rows: LayerRows, cells: Indices) -> None:
        """Put what is pending for `cells` over `rows`, which were read from the buffers."""
        for pending_cells, layers in self.queue:
            _overlay(rows, cells, pending_cells, layers)

    def clear(self) -> None:
        """Forget everything."""
        self.queue.clear()


def _overlay(rows: LayerRows, cells: Indices, pending_cells: Indices, layers: LayerRows) -> None:
    _, targets, sources = np.intersect1d(cells, pending_cells, return_indices=True)
    for layer, pending in layers.items() if targets.size else ():
        if layer not in rows:  # nothing was put to it yet
            rows[layer] = _zeros(pending, cells.size)
        for array, pending_array in zip(rows[layer], pending, strict=False):
            array.put(targets, pending_array, sources)


def _zeros(like: LayerArrays, tokens: int) -> LayerArrays:
    return tuple(array.zeros(tokens) for array in like)
