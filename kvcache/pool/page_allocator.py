"""Refcounts and free pages of a pool."""

from __future__ import annotations

import numpy as np

from kvcache._reductions import all_of
from kvcache._types import Indices, Int32s

from .allocator import CellAllocator


class PageAllocator(CellAllocator):
    """Refcounts of `cells` cells, handed out in pages of `page` neighbours.

    A page is free while none of its cells has a reference, and :attr:`free` counts the cells of
    free pages. Single cells are never handed out: :meth:`claim` and :meth:`pop` find none.

    cells: a multiple of `page`, a power of two.
    """

    def __init__(self, cells: int, page: int) -> None:
        super().__init__(0)
        self.cells = self.free = cells
        self.refcounts = np.zeros(cells, np.int32)
        self.page = page
        self._shift = page.bit_length() - 1
        self.pages = CellAllocator(cells // page)
        """Its refcounts are the numbers of cells of each page that have references."""

    def claim_pages(self, wanted: Indices) -> Int32s:
        """Return a free page for each of `wanted`: that page if it is free, or another one.

        They stay free until their cells are taken. wanted: numbers of pages, also such as there
        are not.
        """
        pages, wanted = self.pages, wanted.copy()
        outside = (wanted < 0) | (wanted >= pages.cells)
        wanted[outside] = 0  # any page: if it is taken, another is popped
        claimed = pages.claim(wanted)
        if not all_of(claimed):
            wanted[~claimed] = pages.pop(int(np.count_nonzero(~claimed)))
        pages.refcounts[wanted] = 0  # counted, cell by cell, once they are taken
        return wanted.astype(np.int32)

    def pages_freed(self, references: Int32s, cells: Indices | Int32s) -> int:
        """Return the number of pages of `cells` that are free by `references`, int32 [cells]."""
        pages = np.unique(cells >> self._shift)
        return int(np.count_nonzero(~references.reshape(-1, self.page)[pages].any(1)))

    def take(self, cells: Indices | Int32s) -> None:
        self.refcounts[cells] = 1
        self._use(cells)

    def incref(self, cells: Indices | Int32s) -> None:
        fresh = cells[self.refcounts[cells] == 0]
        self.refcounts[cells] += 1
        self._use(fresh)

    def _use(self, cells: Indices | Int32s) -> None:
        """Count `cells`, which had no references, as cells of their pages."""
        pages, counts = cells >> self._shift, self.pages.refcounts
        unused = pages[counts[pages] == 0]
        np.add.at(counts, pages, 1)  # `+=` would count a repeated page once
        if unused.size:
            self.pages.free -= np.unique(unused).size
            self.free = self.pages.free << self._shift

    def step(self, cell: int, dropped: int | None) -> None:
        self.refcounts[cell] = 1
        pages = self.pages
        pages.refcounts[cell >> self._shift] += 1
        if dropped is None:
            return
        self.refcounts[dropped] = 0
        page = dropped >> self._shift
        pages.refcounts[page] -= 1
        if not pages.refcounts[page]:
            pages.free += 1
            self.free += self.page
            pages.push(page)

    def _put_back(self, freed: Int32s) -> None:
        if freed.size:
            self.pages.decref(freed >> self._shift)
            self.free = self.pages.free << self._shift

    def reset(self, refcounts: Int32s) -> None:
        self.refcounts = refcounts
        used = (refcounts > 0).reshape(-1, self.page).sum(1, dtype=np.int32)
        self.pages.reset(used)
        self.free = self.pages.free << self._shift

    def copy(self, cells: int) -> PageAllocator:
        clone = PageAllocator(cells, self.page)
        clone.refcounts[: self.cells] = self.refcounts
        clone.pages = self.pages.copy(cells // self.page)
        clone.free = clone.pages.free << self._shift
        return clone
