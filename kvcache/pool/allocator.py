"""Refcounts and free cells of a pool."""

from __future__ import annotations

import numpy as np

from kvcache._reductions import all_of
from kvcache._types import Bools, Indices, Int32s


class CellAllocator:
    """Refcounts of a pool of `cells` cells, and a stack of its free ones.

    A cell without references is free. Cells on the stack may have been claimed since they were
    pushed, and :meth:`pop` skips these: claiming a cell by its number need not search the stack.
    """

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self.free = cells
        self.refcounts = np.zeros(cells, np.int32)
        # The lowest cell on top, so that cells popped together are ascending neighbours.
        self._stack = np.arange(cells - 1, -1, -1, dtype=np.int32)
        self._top = cells
        self._stacked = np.ones(cells, bool)
        # Scratch space of `claim`, kept so that a call costs as much as its batch, not the pool.
        self._claims = np.zeros(cells, np.int64)

    def claim(self, cells: Indices | Int32s) -> Bools:
        """Reference the free ones among `cells`, once each; return a mask of those claimed.

        The caller counts them by :meth:`take`, together with cells from :meth:`pop`.
        """
        order = np.arange(cells.size)
        self._claims[cells] = order  # if a cell is wanted twice, the last claim stands
        claimed: Bools = (self.refcounts[cells] == 0) & (self._claims[cells] == order)
        self.refcounts[cells[claimed]] = 1
        return claimed

    def pop(self, count: int) -> Int32s:
        """Take up to `count` free cells off the stack, neighbours if possible.

        The caller references them by :meth:`take` or :meth:`incref`.
        """
        popped: list[Int32s] = [np.empty(0, np.int32)]
        while count and self._top:
            # Many at a time, because most may have been claimed since they were pushed.
            cells = self._stack[max(0, self._top - max(count, 256)) : self._top][::-1]
            free = np.flatnonzero(self.refcounts[cells] == 0)[:count]
            seen = cells.size if free.size < count else int(free[-1]) + 1
            self._stacked[cells[:seen]] = False
            self._top -= seen
            popped.append(cells[free])
            count -= free.size
        return np.concatenate(popped)

    def take(self, cells: Indices | Int32s) -> None:
        """Reference `cells` once each: free ones that differ, claimed or popped."""
        self.refcounts[cells] = 1
        self.free -= cells.size

    def incref(self, cells: Indices | Int32s) -> None:
        """Add one reference to each of `cells`, which differ, free or not."""
        self.free -= int(np.count_nonzero(self.refcounts[cells] == 0))
        self.refcounts[cells] += 1

    def step(self, cell: int, dropped: int | None) -> None:
        """Reference the free cell `cell`; free `dropped`, which has one reference.

        Both may be the same cell, which stays referenced.
        """
        self.refcounts[cell] = 1
        if dropped is None:
            self.free -= 1
            return
        # One cell taken, one freed: the number of free cells stays.
        if dropped != cell:
            self.refcounts[dropped] = 0
        self.push(dropped)

    def decref(self, cells: Int32s) -> None:
        """Drop one reference per element of `cells`, and free cells without any left."""
        self._put_back(self._drop(cells))

    def _drop(self, cells: Int32s) -> Int32s:
        """Drop one reference per element of `cells`; return those without any left."""
        if all_of(self.refcounts[cells] == 1):  # none is shared, so none occurs twice
            self.refcounts[cells] = 0
            return cells
        np.subtract.at(self.refcounts, cells, 1)  # `-=` would count a repeated cell once
        return np.unique(cells[self.refcounts[cells] == 0])

    def _put_back(self, freed: Int32s) -> None:
        """Count and stack cells that have lost their last reference."""
        self.free += freed.size
        unstacked = np.sort(freed[~self._stacked[freed]])
        self._stacked[unstacked] = True
        # The lowest ends up on top, so that cells popped together are neighbours.
        self._stack[self._top : self._top + unstacked.size] = unstacked[::-1]
        self._top += unstacked.size

    def push(self, cell: int) -> None:
        """Stack one freed cell, counted in :attr:`free` already."""
        if not self._stacked[cell]:
            self._stacked[cell] = True
            self._stack[self._top] = cell
            self._top += 1

    def reset(self, refcounts: Int32s) -> None:
        """Take over `refcounts`, int32 [cells], and count and stack the free cells anew."""
        free = np.flatnonzero(refcounts == 0).astype(np.int32)
        self.refcounts = refcounts
        self._stacked = refcounts == 0
        self._stack[: free.size] = free[::-1]  # the lowest on top
        self.free = self._top = free.size

    def copy(self, cells: int) -> CellAllocator:
        """Return an independent allocator in the same state. cells: at least as many as here."""
        clone, more = CellAllocator(cells), cells - self.cells
        clone.free += self.free - self.cells
        clone.refcounts[: self.cells] = self.refcounts
        clone._stacked[: self.cells] = self._stacked
        # New cells, which have the highest numbers, go to the bottom: they are taken last.
        clone._top = more + self._top
        clone._stack[more : clone._top] = self._stack[: self._top]
        return clone
