"""The cells of a pool as such: how often each is referenced, and which are free."""

from __future__ import annotations

import numpy as np

from kvcache._types import Bools, Indices, Int32s


class CellAllocator:
    """Refcounts and free cells of a pool of `cells` cells. A cell without references is free.

    Free cells lie on a stack; some on it may have been claimed since, and are passed over when
    they come up. So claiming a cell by its number costs nothing but its refcount.
    """

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self.free = cells
        self.refcounts = np.zeros(cells, np.int32)
        # The lowest cell on top.
        self._stack = np.arange(cells - 1, -1, -1, dtype=np.int32)
        self._top = cells
        self._stacked = np.ones(cells, bool)
        self._claims = np.zeros(cells, np.int64)

    def claim(self, cells: Indices) -> Bools:
        """Reference those of `cells` that are free, each once; return which.

        The caller takes them off :attr:`free`, with others that it takes.
        """
        order = np.arange(cells.size)
        self._claims[cells] = order  # where two want one cell, the last claim stands
        claimed: Bools = (self.refcounts[cells] == 0) & (self._claims[cells] == order)
        self.refcounts[cells[claimed]] = 1
        return claimed

    def pop(self, count: int) -> Int32s:
        """Return any free cells, neighbours if possible, not yet referenced."""
        popped: list[Int32s] = [np.empty(0, np.int32)]
        while count and self._top:
            # Many at a time, because most may have been claimed since they were stacked.
            cells = self._stack[max(0, self._top - max(count, 256)) : self._top][::-1]
            free = np.flatnonzero(self.refcounts[cells] == 0)[:count]
            seen = cells.size if free.size < count else int(free[-1]) + 1
            self._stacked[cells[:seen]] = False
            self._top -= seen
            popped.append(cells[free])
            count -= free.size
        return np.concatenate(popped)

    def decref(self, cells: Int32s) -> None:
        """Drop one reference to each of `cells`, and free those that have none left."""
        if (self.refcounts[cells] == 1).all():  # nobody shares any, so each is named once
            self.refcounts[cells] = 0
            freed = cells
        else:
            np.subtract.at(self.refcounts, cells, 1)
            freed = np.unique(cells[self.refcounts[cells] == 0])
        self.free += freed.size
        unstacked = np.sort(freed[~self._stacked[freed]])
        self._stacked[unstacked] = True
        # The lowest ends up on top, so that cells given out together are neighbours.
        self._stack[self._top : self._top + unstacked.size] = unstacked[::-1]
        self._top += unstacked.size

    def push(self, cell: int) -> None:
        """Stack one cell that has become free, and is counted as free elsewhere."""
        if not self._stacked[cell]:
            self._stacked[cell] = True
            self._stack[self._top] = cell
            self._top += 1

    def copy(self, cells: int) -> CellAllocator:
        """Return an independent allocator in the same state, of `cells` cells: no fewer."""
        clone, more = CellAllocator(cells), cells - self.cells
        clone.free += self.free - self.cells
        clone.refcounts[: self.cells] = self.refcounts
        clone._stacked[: self.cells] = self._stacked
        # The new cells, with the highest numbers, are stacked below: they are taken last.
        clone._top = more + self._top
        clone._stack[more : clone._top] = self._stack[: self._top]
        return clone
