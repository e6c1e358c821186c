"""The pages of each sequence, listed as block tables want them."""

from __future__ import annotations

import numpy as np

from kvcache._types import Indices, Int32s


class PageLists:
    """The pages of every sequence in order, listed when asked for, and only the new ones then.

    A list goes with a row of the table of cells: column c of row s is in the listed page
    ``(c - base[s]) // page``. Pages that a window gave back stay at the front of a list until it
    is made anew.
    """

    def __init__(self, max_sequences: int, page: int) -> None:
        self._page, self._shift = page, page.bit_length() - 1
        self._pages = np.zeros((max_sequences, 8), np.int32)
        self._base = np.zeros(max_sequences, np.int64)
        self._listed = np.zeros(max_sequences, np.int64)

    def forget(self, sequence: int) -> None:
        """Make the list of a sequence anew, because other tokens than the last ones changed."""
        self._listed[sequence] = 0

    def move(self, columns: Indices) -> None:
        """Follow rows that moved to the front by so many `columns` each."""
        self._base -= columns

    def read(
        self, rows: Int32s, ids: Indices, first: Indices, last: Indices
    ) -> tuple[Int32s, Indices]:
        """Return the pages of non-empty sequences `ids`, ``[ids, width]``, and where each begins.

        rows: the cells of all sequences. first, last: columns ``[first, last)`` of each of `ids`.

        Where it begins: the slot of the first token in the first page. The width is a power of two,
        and behind the last page of a sequence come zeros.
        """
        self._begin(rows, ids[self._listed[ids] == 0], first[self._listed[ids] == 0])
        self._make_room(rows, ids, first, last)
        self._list(rows, ids, first, last)
        begin = first - self._base[ids]
        head = begin >> self._shift
        counts = self._counts(ids, last) - head
        width = 1 << (int(counts.max()) - 1).bit_length()
        columns = np.arange(width)
        # One slice of all rows where no window dropped pages, as usual: that is a plain copy.
        pages: Int32s = (
            self._pages[ids[:, None], np.minimum(head[:, None] + columns, self._width - 1)]
            if head.any()
            else self._pages[ids, :width]
        )
        pages[columns >= counts[:, None]] = 0
        return pages, begin - (head << self._shift)

    @property
    def _width(self) -> int:
        return self._pages.shape[1]

    def _counts(self, ids: Indices, last: Indices) -> Indices:
        """Return the length of the complete list of each of `ids`."""
        counts: Indices = ((last - 1 - self._base[ids]) >> self._shift) + 1
        return counts

    def _begin(self, rows: Int32s, ids: Indices, first: Indices) -> None:
        """Begin the lists of `ids` anew, with the page of the first token."""
        if ids.size:
            self._listed[ids] = 0
            self._base[ids] = first - (rows[ids, first] & (self._page - 1))

    def _make_room(self, rows: Int32s, ids: Indices, first: Indices, last: Indices) -> None:
        """Make all lists fit, without pages given back where they did not."""
        counts = self._counts(ids, last)
        long = counts > self._width
        if not long.any():
            return
        self._begin(rows, ids[long], first[long])
        most = int(self._counts(ids, last).max())
        # Half of the room is free then, so that a list is made anew after so many pages at most.
        if 2 * most > self._width:
            wider = np.zeros((self._base.size, 2 << (most - 1).bit_length()), np.int32)
            wider[:, : self._width] = self._pages
            self._pages = wider

    def _list(self, rows: Int32s, ids: Indices, first: Indices, last: Indices) -> None:
        """List the pages that are new since the last time."""
        listed, counts = self._listed[ids], self._counts(ids, last)
        new = counts - listed
        if not new.any():
            return
        self._listed[ids] = counts
        owners = np.repeat(np.arange(ids.size), new)
        numbers = listed[owners] + np.arange(owners.size) - np.repeat(np.cumsum(new) - new, new)
        columns = self._base[ids[owners]] + (numbers << self._shift)
        # The first page may begin before the first token of its row.
        cells = rows[ids[owners], np.maximum(columns, first[owners])]
        self._pages[ids[owners], numbers] = cells >> self._shift
