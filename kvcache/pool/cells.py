"""The host-side table of a pool: the position of each cell, and the cells of each sequence.

Everything is NumPy and incremental: planning a pass costs time in proportion to its batch, not to
the pool. A cell may belong to several sequences with a common prefix; it then has the same
position in all of them.
"""

from __future__ import annotations

import numpy as np

from kvcache._checks import NO_LIMIT
from kvcache._reductions import all_of, any_of, largest, smallest
from kvcache._types import Bools, Indices, Int32s
from kvcache.errors import CacheFullError

from .allocator import CellAllocator
from .changes import Dropped, Eviction
from .placement import Placement
from .repeats import refuse_repeats
from .sorted_batch import SortedBatch, sorted_batch


class CellTable(Placement):
    """Positions, refcounts and per-sequence order of a pool of `cells` cells.

    Row s of `rows` lists the cells of sequence s by position, in ``[first[s], last[s])``; all of
    them lie in the range of cells ``[low[s], high[s]]``. Only the single-token path
    (:mod:`kvcache.pool.single`) writes to these arrays, too.

    This table gives a sequence any free cells; :class:`PagedTable` gives it whole pages.
    """

    def __init__(self, cells: int, max_sequences: int) -> None:
        self.max_sequences = max_sequences
        self.allocator = CellAllocator(cells)
        self.positions = np.zeros(cells, np.int32)
        self._numbers = np.arange(cells, dtype=np.int32)
        # By cell: positions by which its key was shifted since it was put. None, and so free for
        # every pass, until the first removal from the middle.
        self.shifts: Int32s | None = None
        self.rows = np.zeros((max_sequences, 64), np.int32)
        self.first = np.zeros(max_sequences, np.int64)
        self.last = np.zeros(max_sequences, np.int64)
        # Of an empty sequence: a range that any cell extends.
        self.low = np.full(max_sequences, NO_LIMIT, np.int64)
        self.high = np.full(max_sequences, -1, np.int64)
        # An empty sequence begins in its own part of the pool, if that is free: sequences then
        # stay contiguous as they grow side by side.
        self._start_hints = np.arange(max_sequences, dtype=np.int64) * (cells // max_sequences) - 1

    @property
    def cells(self) -> int:
        """Cells of the pool."""
        return self.allocator.cells

    @property
    def free(self) -> int:
        """Number of cells without references."""
        return self.allocator.free

    # Looking.

    def cells_of(self, sequence: int) -> Int32s:
        """Return the cells of a sequence, ordered by position: a view."""
        return self.rows[sequence, self.first[sequence] : self.last[sequence]]

    def next_position(self, sequence: int) -> int:
        """Return the position after the last one stored; 0 for an empty sequence."""
        row = self.cells_of(sequence)
        return int(self.positions[row[-1]]) + 1 if row.size else 0

    def find(self, sequence: int, position: int) -> int:
        """Return the number of cells of a sequence with positions below `position`."""
        row = self.cells_of(sequence)
        if not row.size:
            return 0
        first, last = int(self.positions[row[0]]), int(self.positions[row[-1]])
        if last - first == row.size - 1:  # no gaps, as usual: no search
            return min(max(position - first, 0), row.size)
        return int(np.searchsorted(self.positions[row], position))

    def is_run(self, cells: Int32s) -> bool:
        """Return whether `cells` are consecutive in ascending order; False without any."""
        first = cells.item(0) if cells.size else 0
        # Compared as bytes, at the speed of memcmp: this is asked for every token of a pass.
        run = self._numbers[first : first + cells.size]
        return cells.size > 0 and cells.tobytes() == run.tobytes()

    def span(self, ids: Indices) -> tuple[int, int]:
        """Return the smallest range of cells ``[start, stop)`` around non-empty sequences `ids`."""
        return smallest(self.low[ids]), largest(self.high[ids]) + 1

    def pages_of(self, ids: Indices) -> tuple[Int32s, Indices]:
        """Return the pages of non-empty sequences `ids`, and the slot of the first token of each.

        Pages are int32 ``[ids, width]``, the width a power of two, and zeros come behind the last.
        """
        first, held = self.first[ids], self.last[ids] - self.first[ids]
        columns = np.arange(1 << (largest(held) - 1).bit_length())
        inside = np.minimum(first[:, None] + columns, self.rows.shape[1] - 1)
        pages = np.where(columns < held[:, None], self.rows[ids[:, None], inside], 0)
        return pages, np.zeros_like(first)

    # Planning: nothing here changes anything.

    def group(self, positions: Int32s, sequences: Int32s) -> SortedBatch:
        """Sort a batch by sequence and position.

        Raises: ValueError for a sequence id or position out of range, or for a position that
            its sequence holds already or that occurs twice.
        """
        if largest(sequences.view(np.uint32)) >= self.max_sequences:  # negative ids are huge
            raise ValueError(
                f"sequence ids must lie in [0, {self.max_sequences}), as many as max_sequences; "
                f"got {sequences.min()} to {sequences.max()}."
            )
        if (least := smallest(positions)) < 0:
            raise ValueError(f"positions must be >= 0; got {least}.")
        groups = sorted_batch(positions, sequences)
        inserts = refuse_repeats(self, groups)
        return groups._replace(inserts=inserts) if inserts else groups

    def expired(self, ids: Indices, oldest: Indices) -> Eviction:
        """Return the cells before `oldest`, an array with one position for each of `ids`."""
        first, last = self.first[ids], self.last[ids]
        held = last - first
        head = self.positions.take(self.rows[ids, first])
        tail = self.positions.take(self.rows[ids, last - 1])
        counts = np.minimum(np.maximum(oldest - head, 0), held)
        for i in ((held > 0) & (tail - head != held - 1)).nonzero()[0]:  # gaps: search for each
            counts[i] = self.find(int(ids[i]), int(oldest[i]))
        drops = counts > 0
        return Eviction(ids[drops], counts[drops])

    def check_room_for(self, groups: SortedBatch, eviction: Eviction | None) -> None:
        """Raise CacheFullError unless a sorted batch fits after `eviction`."""
        self.check_room(groups.positions.size, eviction)

    def check_room(self, tokens: int, eviction: Eviction | None) -> None:
        """Raise CacheFullError unless `tokens` cells are free after `eviction`."""
        free = self.free
        if free < tokens and eviction is not None and eviction.ids.size:
            # A cell becomes free only if all its references are dropped.
            cells, counts = np.unique(self._oldest(eviction), return_counts=True)
            free += int(np.count_nonzero(self.allocator.refcounts[cells] == counts))
        if free < tokens:
            raise CacheFullError(
                f"a pass needs one free cell per token; {tokens} needed, {free} of {self.cells} "
                "free. Remove sequences, or make the cache with more capacity."
            )

    # Changing.

    def to_drop(self, eviction: Eviction) -> Dropped | None:
        """Return the cells to drop with their sequences and positions; None if there are none."""
        if not eviction.ids.size:
            return None
        cells, ids = self._oldest(eviction), eviction.ids
        owners = ids if cells.size == ids.size else np.repeat(ids, eviction.counts)
        return Dropped(owners, cells, self.positions[cells])

    def evict(self, eviction: Eviction, dropped: Dropped | None) -> None:
        """Drop the oldest cells of sequences. dropped: result of :meth:`to_drop`."""
        if dropped is None:
            return
        ids, counts, (owners, cells, _) = eviction.ids, eviction.counts, dropped
        at_edge = (cells == self.low[owners]) | (cells == self.high[owners])
        self.first[ids] += counts
        self.allocator.decref(cells)
        if any_of(at_edge):
            self._shrink_ranges(eviction, owners[at_edge])

    def _shrink_ranges(self, eviction: Eviction, edges: Indices) -> None:
        """Update the ranges of `edges`, sequences with a cell dropped at an edge of the range."""
        single = all_of(eviction.counts == 1)
        ids = edges if single else np.unique(edges)
        first, last, low = self.first[ids], self.last[ids], self.low[ids]
        head = self.rows[ids, np.minimum(first, last - 1)]  # of an empty sequence: any cell
        # The usual step drops the lowest cell and leaves the next one: no search.
        steps = single & (first < last) & (self.rows[ids, first - 1] == low) & (head == low + 1)
        self.low[ids[steps]] += 1
        for sequence in ids[~steps]:
            self.recompute_range(int(sequence))

    def insert(self, groups: SortedBatch) -> Int32s:
        """Assign a cell to every token of a batch; return the cells in the order of the batch.

        To be called after :meth:`group` and :meth:`check_room` (and :meth:`evict`): there is room,
        and no position is stored already.
        """
        cells = self._choose(groups)
        self.allocator.take(cells)
        self.positions[cells] = groups.positions
        if self.shifts is not None:
            self.shifts[cells] = 0
        self._append(groups, cells)
        by_token = np.empty(cells.size, np.int32)
        by_token[groups.order] = cells
        return by_token

    def truncate(self, sequence: int, length: int) -> None:
        """Keep only the first `length` cells of a sequence."""
        dropped = self.cells_of(sequence)[length:].copy()
        self.last[sequence] = self.first[sequence] + length
        self.allocator.decref(dropped)
        self.recompute_range(sequence)

    def remove_middle(self, sequence: int, start: int, stop: int, shift: int) -> Int32s:
        """Drop cells ``[start, stop)`` of a row, and add `shift` to the positions after them.

        Return the cells with changed positions.
        """
        row = self.cells_of(sequence).copy()  # its own memory is overwritten below
        rest = row[stop:]
        self.last[sequence] -= stop - start
        self.cells_of(sequence)[start:] = rest
        self.positions[rest] += shift
        if self.shifts is None:
            self.shifts = np.zeros(self.cells, np.int32)
        self.shifts[rest] += shift
        self.allocator.decref(row[start:stop])
        self.recompute_range(sequence)
        return rest

    def is_shared(self, cells: Int32s, pins: Int32s | int = 0) -> bool:
        """Return whether one of `cells` has more than one reference.

        pins: number of references of snapshots to each cell of the pool, which do not count.
        """
        return bool(((self.allocator.refcounts - pins)[cells] > 1).any())

    def moved_by(self, cells: Int32s) -> Int32s:
        """Return the number of positions by which the keys of `cells` were shifted."""
        return np.zeros_like(cells) if self.shifts is None else self.shifts[cells]

    def copy(self, cells: int) -> CellTable:
        """Return an independent table with the same content. cells: at least as many as here."""
        clone = self._empty(cells)
        clone.allocator = self.allocator.copy(cells)
        clone.positions[: self.cells] = self.positions
        if self.shifts is not None:
            clone.shifts = np.zeros(cells, np.int32)
            clone.shifts[: self.cells] = self.shifts
        clone.rows, clone.first, clone.last = self.rows.copy(), self.first.copy(), self.last.copy()
        clone.low, clone.high = self.low.copy(), self.high.copy()
        return clone

    def _empty(self, cells: int) -> CellTable:
        """Return an empty table of this kind."""
        return CellTable(cells, self.max_sequences)

    def set_row(self, sequence: int, cells: Int32s) -> None:
        """Make `cells`, ordered by position and free or not, the cells of a sequence."""
        # Referenced before the old cells are dropped, which may be the same ones.
        self.allocator.incref(cells)
        self.truncate(sequence, 0)
        self._fill(sequence, cells)

    # For snapshots, which hold references, too, and are restored to empty sequences.

    def incref(self, cells: Indices | Int32s) -> None:
        """Add a reference to each of `cells`."""
        self.allocator.incref(cells)

    def decref(self, cells: Indices | Int32s) -> None:
        """Drop a reference to each of `cells`."""
        self.allocator.decref(cells.astype(np.int32))

    def referenced_by_others(self, pins: Int32s, going: Eviction | None) -> Bools:
        """Return a mask of cells referenced by sequences, bool [cells], once `going` is evicted.

        pins: number of references of snapshots to each cell, int32 [cells].
        """
        others = self.allocator.refcounts - pins
        if going is not None:
            np.subtract.at(others, self._oldest(going), 1)
        return others > 0

    def references_of_others(self, pins: Int32s, going: Eviction | None) -> list[Bools]:
        """Return masks of cells that rows are not to be spilled for, as above; the best rule first.

        Rows with cells outside of the first mask free some; those outside of another may help.
        """
        return [self.referenced_by_others(pins, going)]

    def assign(self, sequence: int, positions: Int32s, cells: Indices) -> Indices:
        """Fill an empty sequence with `positions`, ascending, in `cells`; -1 stands for a free one.

        Return the cells, none of them -1.
        """
        missing = cells < 0
        cells = cells.copy()
        cells[missing] = new = self._free_cells(cells, positions)
        self.positions[new] = positions[missing]
        if self.shifts is not None:
            self.shifts[new] = 0
        self.allocator.incref(cells)
        self._fill(sequence, cells.astype(np.int32))
        return cells

    def _free_cells(self, cells: Indices, positions: Int32s) -> Int32s:
        """Return a free cell for each -1 among the `cells` of a sequence."""
        return self.allocator.pop(int(np.count_nonzero(cells < 0)))

    def _fill(self, sequence: int, cells: Int32s) -> None:
        """Fill an empty sequence with `cells`, referenced for it already."""
        self._reserve_row_space(np.array([sequence]), np.array([cells.size]))
        self.first[sequence], self.last[sequence] = 0, cells.size
        self.rows[sequence, : cells.size] = cells
        self.recompute_range(sequence)

    # Inside.

    def _oldest(self, eviction: Eviction) -> Int32s:
        """Return the cells to evict, sequence by sequence."""
        counts = eviction.counts
        if all_of(counts == 1):
            oldest: Int32s = self.rows[eviction.ids, self.first[eviction.ids]]
            return oldest
        ids = np.repeat(eviction.ids, counts)
        within = np.arange(ids.size) - np.repeat(np.cumsum(counts) - counts, counts)
        cells: Int32s = self.rows[ids, self.first[ids] + within]
        return cells

    def _choose(self, groups: SortedBatch) -> Indices:
        """Return a free cell for every sorted token, if possible next to the last of its sequence.

        A sequence then stays in a short range of cells, which attention reads as a slice.
        """
        ids, last = groups.ids, self.last[groups.ids]
        tails, filled = self.rows[ids, last - 1].astype(np.int64), last > self.first[ids]
        if not all_of(filled):
            tails = np.where(filled, tails, self._start_hints[ids])
        if groups.single:
            claimed, cells = self._claim_next_cell(ids, tails + 1)
        else:
            rank = np.arange(groups.positions.size) - np.repeat(groups.starts, groups.counts)
            cells = np.repeat(tails, groups.counts) + 1 + rank
            cells[cells >= self.cells] = 0  # any valid cell: if it is taken, another is popped
            claimed = self.allocator.claim(cells)
        if not all_of(claimed):
            cells[~claimed] = self.allocator.pop(int(cells.size - np.count_nonzero(claimed)))
        return cells

    def _claim_next_cell(self, ids: Indices, wanted: Indices) -> tuple[Bools, Indices]:
        """Claim a cell of `wanted` for each of `ids`, or else the cell just dropped by it.

        Reusing the dropped cell keeps a window in its part of the pool, like a ring. Return a
        mask of the cells claimed, and the cells.
        """
        claimed = wanted < self.cells
        claimed[claimed] = self.allocator.claim(wanted[claimed])
        if not all_of(claimed):
            others = np.flatnonzero(~claimed)
            # Left of the first cell of a row is the last one dropped, or any cell: claim() checks.
            wanted[others] = self.rows[ids[others], self.first[ids[others]] - 1]
            claimed[others] = self.allocator.claim(wanted[others])
        return claimed, wanted

    def _append(self, groups: SortedBatch, cells: Indices) -> None:
        """Add the cells of a sorted batch to the rows of their sequences, ordered by position."""
        ids, counts, starts = groups.ids, groups.counts, groups.starts
        self._reserve_row_space(ids, counts)
        last = self.last[ids]
        if groups.single:
            self.rows[ids, last] = low = high = cells
        else:
            columns = np.repeat(last - starts, counts) + np.arange(cells.size)
            self.rows[groups.sequences, columns] = cells
            low, high = np.minimum.reduceat(cells, starts), np.maximum.reduceat(cells, starts)
        self.last[ids] = last + counts
        self.low[ids] = np.minimum(low, self.low[ids])
        self.high[ids] = np.maximum(high, self.high[ids])
        # Appended at the end first, rows with an insertion are put in order of position.
        for sequence in ids if groups.inserts else ():
            row = self.cells_of(int(sequence))
            row[:] = row[np.argsort(self.positions[row])]

    def recompute_range(self, sequence: int) -> None:
        """Compute the range of a sequence from its cells."""
        row = self.cells_of(sequence)
        if row.size:
            self.low[sequence], self.high[sequence] = row.min(), row.max()
        else:  # an empty row begins again at its front
            self.first[sequence] = self.last[sequence] = 0
            self.low[sequence], self.high[sequence] = NO_LIMIT, -1

    def _reserve_row_space(self, ids: Indices, extra: Indices) -> None:
        """Make room in the rows of `ids` for `extra` more cells each."""
        if largest(self.last[ids] + extra) <= self.rows.shape[1]:
            return
        held = self.last - self.first
        # Rows move to the front, which reclaims what windows dropped; twice the room needed, so
        # that moving costs O(1) per token in the long run.
        width = 2 * max(largest(held), largest(held[ids] + extra))
        rows = np.zeros((held.size, width), np.int32)
        for sequence in np.flatnonzero(held):
            rows[sequence, : held[sequence]] = self.cells_of(int(sequence))
        self.rows, self.first, self.last = rows, np.zeros_like(held), held
