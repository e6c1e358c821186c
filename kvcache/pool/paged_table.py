"""The table of cells of a pool that is handed out in pages."""

from __future__ import annotations

from typing import NamedTuple, SupportsIndex

import numpy as np

from kvcache._checks import as_index
from kvcache._reductions import any_of
from kvcache._types import Bools, Indices, Int32s
from kvcache.errors import CacheFullError, NotSupportedError

from .cells import CellTable
from .changes import Eviction
from .page_allocator import PageAllocator
from .page_lists import PageLists
from .placement import Moved, TailCopy, ranges
from .sorted_batch import SortedBatch


def as_page(value: SupportsIndex) -> int:
    """Return the size of a page as an int.

    Raises: TypeError for no integer, ValueError for one that is no power of two.
    """
    page = as_index(value, "page")
    if page < 1 or page & (page - 1):
        raise ValueError(f"page must be a power of two, in cells; got {page}. Give 16, or 1.")
    return page


def new_table(cells: int, max_sequences: int, page: int) -> CellTable:
    """Return an empty table that hands out pages of so many cells."""
    if page == 1:
        return CellTable(cells, max_sequences)
    return PagedTable(cells, max_sequences, page)


class _Tails(NamedTuple):
    """The ends of some sequences: columns ``[first, last)`` of their rows, and the last cell.

    filled: False for an empty sequence, whose last cell means nothing.
    """

    first: Indices
    last: Indices
    filled: Bools
    cells: Indices


class PagedTable(CellTable):
    """A table whose sequences lie in pages of `page` cells, a power of two.

    The tokens of a sequence fill its pages in order: a token is in the slot after that of the token
    before it, in the same page or, from the last slot, in the first one of another page. Only the
    first token of all may lie anywhere in its page: a window drops tokens, and frees a page with
    its last one. Several sequences may hold a page, in the same slots as far as both go. The first
    one to go on keeps it; every other one that goes on moves what it holds of it to a page of its
    own (:meth:`tails_to_copy`).

    cells: a multiple of `page`.
    """

    def __init__(self, cells: int, max_sequences: int, page: int) -> None:
        super().__init__(cells, max_sequences)
        self.page = page
        self._mask, self._shift = page - 1, page.bit_length() - 1
        self.allocator: PageAllocator = PageAllocator(cells, page)
        pages = self.allocator.pages.cells
        self._start_hints = np.arange(max_sequences, dtype=np.int64) * (pages // max_sequences) - 1
        self._lists = PageLists(max_sequences, page)

    def _empty(self, cells: int) -> PagedTable:
        return PagedTable(cells, self.max_sequences, self.page)

    # Planning.

    def group(self, positions: Int32s, sequences: Int32s) -> SortedBatch:
        groups = super().group(positions, sequences)
        if groups.inserts:
            raise NotSupportedError(
                f"in a cache with page={self.page} tokens come after the last of their sequence; "
                "before it, every later token would have to move to another slot. Remove these "
                "first, or make the cache without pages."
            )
        return groups

    def may_append(self, tail: int, held: int) -> bool:
        slot = tail & self._mask
        # All slots so far are its own then, and no others are taken.
        alone = held > slot and self.allocator.pages.refcounts[tail >> self._shift] == slot + 1
        return bool(slot < self._mask and alone)

    def tails_to_copy(self, groups: SortedBatch, eviction: Eviction | None) -> TailCopy | None:
        first, last, filled, tails = self._tails(groups.ids)
        slots, refcounts = tails & self._mask, self.allocator.refcounts
        # All slots up to the last are of this sequence alone, and no others are taken.
        alone = (last - first > slots) & (refcounts[tails] == 1)
        alone &= self.allocator.pages.refcounts[tails >> self._shift] == slots + 1
        unclear = filled & (slots < self._mask) & ~alone
        if not unclear.any():  # as for most passes
            return None
        first, _, filled, _ = self._tails(groups.ids, eviction)
        unclear = np.flatnonzero(unclear & filled)
        # All slots behind have to be free: another token of this sequence could not move later,
        # when a program may not have written it yet.
        behind = np.arange(self.page) > slots[unclear, None]
        pages = refcounts.reshape(-1, self.page)[tails[unclear] >> self._shift]
        moves = ((pages > 0) & behind).any(1)
        # Of several sequences that end in the same cell, the first one keeps the page.
        others = np.ones(unclear.size, np.bool_)
        others[np.unique(tails[unclear], return_index=True)[1]] = False
        moving = unclear[moves | others]
        return self._tail_copy(groups.ids[moving], first[moving], last[moving], slots[moving])

    def _tail_copy(
        self, ids: Indices, first: Indices, last: Indices, slots: Indices
    ) -> TailCopy | None:
        """Return the tokens of `ids` in their last pages. slots: of the last tokens in these."""
        if not ids.size:
            return None
        starts = np.maximum(first, last - 1 - slots)
        counts = last - starts
        return TailCopy(
            ids, starts, counts, self.rows[np.repeat(ids, counts), ranges(starts, counts)]
        )

    def _tails(self, ids: Indices, eviction: Eviction | None = None) -> _Tails:
        """Return the ends of sequences `ids`, ascending, as they are after `eviction`."""
        first, last = self.first[ids].copy(), self.last[ids]
        if eviction is not None and eviction.ids.size:
            index = np.minimum(np.searchsorted(ids, eviction.ids), ids.size - 1)
            own = ids[index] == eviction.ids  # sequences idle in this pass are evicted, too
            first[index[own]] += eviction.counts[own]
        cells = self.rows[ids, last - 1].astype(np.int64)
        return _Tails(first, last, last > first, cells)

    def check_room_for(self, groups: SortedBatch, eviction: Eviction | None) -> None:
        free = self.allocator.pages.free
        if free >= groups.positions.size + groups.ids.size:  # one page each, and each one copied
            return
        needed = int(self._pages_needed(groups, eviction).sum())
        if free < needed and eviction is not None and eviction.ids.size:
            free += self._pages_given_back(eviction)
        if free < needed:
            raise CacheFullError(
                f"a pass needs whole pages of {self.page} cells for the tokens that do not fit the "
                f"last ones of their sequences; {needed} needed, {free} of "
                f"{self.allocator.pages.cells} free. Remove sequences, or make the cache with "
                "more capacity."
            )

    def _pages_needed(self, groups: SortedBatch, eviction: Eviction | None) -> Indices:
        """Return the number of new pages for each sequence of a sorted batch."""
        _, _, filled, tails = self._tails(groups.ids, eviction)
        tokens = groups.counts - np.where(filled, self._mask - (tails & self._mask), 0)
        pages: Indices = np.maximum(tokens + self._mask, 0) >> self._shift
        copied = self.tails_to_copy(groups, eviction)
        if copied is not None:  # what moves takes one more page each
            pages[np.searchsorted(groups.ids, copied.ids)] += 1
        return pages

    def _pages_given_back(self, eviction: Eviction) -> int:
        """Return the number of pages that `eviction` frees."""
        cells, counts = np.unique(self._oldest(eviction), return_counts=True)
        freed = cells[self.allocator.refcounts[cells] == counts] >> self._shift
        pages, cells_of_page = np.unique(freed, return_counts=True)
        return int(np.count_nonzero(self.allocator.pages.refcounts[pages] == cells_of_page))

    def check_removal(self, row: Int32s, removed: range) -> None:
        start, after = removed.start, row[removed.stop : removed.stop + 1]
        if not removed:
            return
        if start and self._follow(row[start - 1 : start], after).all():
            return
        if not start and not after[0] & self._mask:
            return
        first = -int(row[0]) & self._mask
        raise NotSupportedError(
            f"only whole pages are removed from the middle of a sequence in a cache with "
            f"page={self.page}, because a token keeps its slot; got tokens {start} to "
            f"{removed.stop} of those held, and pages begin at tokens {first}, "
            f"{first + self.page}, and so on. Remove these ranges, or make the cache without pages."
        )

    def _follow(self, before: Int32s, after: Int32s) -> Bools:
        """Return whether each cell of `after` may come next to that of `before` in a sequence."""
        begins = (after & self._mask) == 0
        same_page = (after == before + 1) & ~begins
        follows: Bools = same_page | (begins & ((before & self._mask) == self._mask))
        return follows

    def joined(self, cells: Int32s, row: Int32s) -> Int32s:
        chain = np.concatenate([cells, row[:1]])
        broken = np.flatnonzero(~self._follow(chain[:-1], chain[1:]))
        return cells[broken[-1] + 1 :] if broken.size else cells

    # Changing.

    def move_tails(self, copied: TailCopy) -> Int32s:
        ids, _, counts, cells = copied
        last = np.cumsum(counts) - 1
        pages = self.allocator.claim_pages((cells[last] >> self._shift).astype(np.int64) + 1)
        moved = (np.repeat(pages, counts) << self._shift) + (cells & self._mask)
        self.positions[moved] = self.positions[cells]
        if self.shifts is not None:
            self.shifts[moved] = self.shifts[cells]
        self.allocator.take(moved)
        self.rows[copied.places] = moved
        self.allocator.decref(cells)
        for sequence in ids:
            self.recompute_range(int(sequence))
        return moved

    def move_back(self, sequence: int, moved: Moved) -> bool:
        own = np.repeat(moved.tails.ids, moved.tails.counts) == sequence
        old, new = moved.tails.cells[own], moved.rows.cells[own]
        row = self.cells_of(sequence).copy()
        if row[-new.size :].tolist() != new.tolist():
            return False
        row[-new.size :] = old
        # They may have been given to tokens that were not put.
        self.positions[old] = self.positions[new]
        if self.shifts is not None:
            self.shifts[old] = self.shifts[new]
        self.set_row(sequence, row)
        return True

    def _choose(self, groups: SortedBatch) -> Indices:
        ids, counts = groups.ids, groups.counts
        _, _, filled, tails = self._tails(ids)
        room = np.where(filled, self._mask - (tails & self._mask), 0)
        more = np.maximum(counts - room + self._mask, 0) >> self._shift
        if groups.single and not any_of(more > 0):  # as for most decode steps
            own: Indices = tails + 1
            return own
        pages = np.where(filled, tails >> self._shift, self._start_hints[ids])
        new = self.allocator.claim_pages(ranges(pages + 1, more))
        # By token: its number behind the last slot of the page that its sequence is in.
        beyond = ranges(np.zeros_like(counts), counts) - np.repeat(room, counts)
        number = np.repeat(np.cumsum(more) - more, counts) + (beyond >> self._shift)
        cells: Indices = np.repeat(tails + 1 + room, counts) + beyond
        outside = beyond >= 0
        cells[outside] = (new[number[outside]] << self._shift) + (beyond[outside] & self._mask)
        return cells

    # For snapshots.

    def referenced_by_others(self, pins: Int32s, going: Eviction | None) -> Bools:
        """Return a mask of cells in pages of sequences, which are not free without pins either."""
        cells = super().referenced_by_others(pins, going)
        return np.repeat(cells.reshape(-1, self.page).any(1), self.page)

    def references_of_others(self, pins: Int32s, going: Eviction | None) -> list[Bools]:
        # Pins in pages of sequences come last: they may keep one from going on in its last page.
        cells = super().referenced_by_others(pins, going)
        return [self.referenced_by_others(pins, going), cells]

    def shareable(self, cells: Indices, positions: Int32s) -> Bools:
        """Return a mask of cells whose pages hold the sequence's own tokens, in their slots."""
        if not cells.size:
            return cells >= 0
        slots, starts, counts = self._slots(cells, positions)
        pages = np.repeat(cells[starts] >> self._shift, counts)
        fits = (cells >= 0) & (cells & self._mask == slots) & (cells >> self._shift == pages)
        return np.repeat(np.logical_and.reduceat(fits, starts), counts)

    def cells_needed(self, cells: Indices, positions: Int32s) -> int:
        shared = np.where(self.shareable(cells, positions), cells, -1)
        if not cells.size:
            return 0
        _, starts, _ = self._slots(shared, positions)
        return int(np.count_nonzero(shared[starts] < 0)) << self._shift

    def cells_freed(self, references: Int32s, cells: Indices) -> int:
        return self.allocator.pages_freed(references, cells) << self._shift

    def _free_cells(self, cells: Indices, positions: Int32s) -> Int32s:
        missing = cells < 0
        if not missing.any():
            return np.empty(0, np.int32)
        slots, starts, counts = self._slots(cells, positions)
        new = missing[starts]
        pages = np.zeros(starts.size, np.int32)
        pages[new] = self.allocator.claim_pages(np.full(int(np.count_nonzero(new)), -1))
        found = (np.repeat(pages, counts) << self._shift) + slots
        return found[missing].astype(np.int32)

    def _slots(self, cells: Indices, positions: Int32s) -> tuple[Indices, Indices, Indices]:
        """Return the slot of each token of a sequence, and the first token and size of each page.

        The first token lies in slot 0 if nothing can come before it, or else where the cells that
        are there want it.
        """
        there = np.flatnonzero(cells >= 0)
        begin = 0
        if there.size and positions[0] > 0:
            begin = int(cells[there[0]] - there[0]) & self._mask
        number = np.arange(cells.size) + begin
        starts = np.flatnonzero(np.diff(number >> self._shift, prepend=-1))
        return number & self._mask, starts, np.diff(starts, append=cells.size)

    # Block tables.

    def pages_of(self, ids: Indices) -> tuple[Int32s, Indices]:
        return self._lists.read(self.rows, ids, self.first[ids], self.last[ids])

    def recompute_range(self, sequence: int) -> None:
        super().recompute_range(sequence)
        self._lists.forget(sequence)

    def _reserve_row_space(self, ids: Indices, extra: Indices) -> None:
        first = self.first
        super()._reserve_row_space(ids, extra)
        if self.first is not first:
            self._lists.move(first)
