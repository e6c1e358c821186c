"""The host-side table of a pool: the position that each cell holds, and its sequences.

Everything is NumPy and incremental: planning a pass costs what its batch is long, whatever the
size of the pool. A cell may belong to several sequences that share a prefix; it then has one
position for all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvcache._types import Bools, Indices, Int32s
from kvcache.errors import CacheFullError

from .allocator import CellAllocator
from .sorted_batch import SortedBatch, sorted_batch


class Eviction(NamedTuple):
    """Cells that sequences can drop: the `counts` oldest of each of `ids`."""

    ids: Int32s
    counts: Indices


class CellTable:
    """Positions, refcounts and per-sequence order of a pool of `cells` cells.

    Row s of `rows` lists the cells of sequence s by position, in ``[first[s], last[s])``; they lie
    in the range of cells ``[low[s], high[s]]``, unless there are none. The single-token path reads
    and writes these arrays, too (:mod:`kvcache.pool.single`); nobody else does.
    """

    def __init__(self, cells: int, max_sequences: int) -> None:
        self.max_sequences = max_sequences
        self.allocator = CellAllocator(cells)
        self.positions = np.zeros(cells, np.int32)
        self.rows = np.zeros((max_sequences, 64), np.int32)
        self.first = np.zeros(max_sequences, np.int64)
        self.last = np.zeros(max_sequences, np.int64)
        self.low = np.zeros(max_sequences, np.int64)
        self.high = np.zeros(max_sequences, np.int64)
        # An empty sequence begins in a part of the pool of its own, if that is free.
        self._start_hints = np.arange(max_sequences, dtype=np.int64) * (cells // max_sequences) - 1

    @property
    def cells(self) -> int:
        """Cells of the pool."""
        return self.allocator.cells

    @property
    def free(self) -> int:
        """Cells that nobody references."""
        return self.allocator.free

    # Looking.

    def cells_of(self, sequence: int) -> Int32s:
        """Return the cells of a sequence, ordered by position: a view."""
        return self.rows[sequence, self.first[sequence] : self.last[sequence]]

    def next_position(self, sequence: int) -> int:
        """Return the position behind the last one stored, 0 for an empty sequence."""
        row = self.cells_of(sequence)
        return int(self.positions[row[-1]]) + 1 if row.size else 0

    def find(self, sequence: int, position: int) -> int:
        """Return the number of cells of a sequence that hold a smaller position."""
        row = self.cells_of(sequence)
        if not row.size:
            return 0
        first, last = int(self.positions[row[0]]), int(self.positions[row[-1]])
        if last - first == row.size - 1:  # without gaps
            return min(max(position - first, 0), row.size)
        return int(np.searchsorted(self.positions[row], position))

    def span(self, ids: Int32s) -> tuple[int, int]:
        """Return the smallest range of cells ``[start, stop)`` around `ids`, none of them empty."""
        if ids.size == 1:
            return int(self.low[ids[0]]), int(self.high[ids[0]]) + 1
        return int(self.low[ids].min()), int(self.high[ids].max()) + 1

    # Planning: nothing here changes anything.

    def group(self, positions: Int32s, sequences: Int32s) -> SortedBatch:
        """Sort a batch by sequence and position.

        Raises: ValueError for a sequence id or position out of range, or for a position that
            its sequence holds already or that occurs twice.
        """
        limit = self.first.size
        if sequences.view(np.uint32).max() >= limit:  # negative ones are huge then
            raise ValueError(
                f"sequence ids must lie in [0, {limit}), as many as max_sequences; "
                f"got {sequences.min()} to {sequences.max()}."
            )
        if positions.min() < 0:
            raise ValueError(f"positions must be >= 0; got {positions.min()}.")
        groups = sorted_batch(positions, sequences)
        inserts = self._refuse_repeats(groups)
        return groups._replace(inserts=inserts) if inserts else groups

    def _refuse_repeats(self, groups: SortedBatch) -> bool:
        """Return whether a token comes before the last one stored of its sequence.

        Raises: ValueError for a position that is stored already, or occurs twice.
        """
        positions, sequences, starts = groups.positions, groups.sequences, groups.starts
        if not groups.single:
            twice = (positions[1:] == positions[:-1]) & (sequences[1:] == sequences[:-1])
            if twice.any():
                at = int(np.argmax(twice))
                raise ValueError(
                    f"position {positions[at]} of sequence {sequences[at]} occurs twice."
                )
        last = self.last[groups.ids]
        filled = last > self.first[groups.ids]
        ends = self.positions[self.rows[groups.ids, last - 1]]
        behind = filled & (positions[starts] <= ends)
        for group in np.flatnonzero(behind):
            self._refuse_stored(groups, int(group))
        return bool(behind.any())

    def _refuse_stored(self, groups: SortedBatch, group: int) -> None:
        start, sequence = groups.starts[group], int(groups.ids[group])
        wanted = groups.positions[start : start + groups.counts[group]]
        stored = np.isin(wanted, self.positions[self.cells_of(sequence)])
        if stored.any():
            raise ValueError(
                f"sequence {sequence} holds position {wanted[stored][0]} already. Remove it first."
            )

    def expired(self, ids: Int32s, oldest: Indices) -> Eviction:
        """Return the cells of `ids` before position `oldest`, one for each."""
        first, last = self.first[ids], self.last[ids]
        held = last - first
        head = self.positions[self.rows[ids, first]]
        tail = self.positions[self.rows[ids, last - 1]]
        counts = np.minimum(np.maximum(oldest - head, 0), held)
        for i in np.flatnonzero((held > 0) & (tail - head != held - 1)):  # with gaps
            counts[i] = self.find(int(ids[i]), int(oldest[i]))
        some = counts > 0
        return Eviction(ids[some], counts[some])

    def check_room(self, tokens: int, eviction: Eviction | None) -> None:
        """Raise CacheFullError unless `tokens` cells are free after `eviction`."""
        free = self.free
        if free < tokens and eviction is not None and eviction.ids.size:
            cells, counts = np.unique(self._oldest(eviction), return_counts=True)
            free += int(np.count_nonzero(self.allocator.refcounts[cells] == counts))
        if free < tokens:
            raise CacheFullError(
                f"a pass needs one free cell per token; {tokens} needed, {free} of {self.cells} "
                "free. Remove sequences, or make the cache with more capacity."
            )

    # Changing.

    def evict(self, eviction: Eviction) -> None:
        """Drop the oldest cells of some sequences."""
        if not eviction.ids.size:
            return
        cells, ids, counts = self._oldest(eviction), eviction.ids, eviction.counts
        owners = ids if cells.size == ids.size else np.repeat(ids, counts)
        at_edge = (cells == self.low[owners]) | (cells == self.high[owners])
        self.first[ids] += counts
        self.allocator.decref(cells)
        if at_edge.any():
            self._shrink_ranges(eviction, owners[at_edge])

    def _shrink_ranges(self, eviction: Eviction, edges: Int32s) -> None:
        """Update the ranges of `edges`, sequences that lost a cell at the edge of theirs."""
        single = (eviction.counts == 1).all()
        ids = edges if single else np.unique(edges)
        first, last, low = self.first[ids], self.last[ids], self.low[ids]
        head = self.rows[ids, np.minimum(first, last - 1)]  # where none is left: anything
        # The usual step: the lowest cell went, and the one after it is still there.
        steps = (first < last) & (self.rows[ids, first - 1] == low) & (head == low + 1)
        steps &= single
        self.low[ids[steps]] += 1
        for sequence in ids[~steps]:
            self._recompute_range(int(sequence))

    def insert(self, groups: SortedBatch) -> Int32s:
        """Give every token of a batch a cell; return them in the order of the batch.

        There is room, and no position is taken: :meth:`check_room` and :meth:`group` said so.
        """
        cells = self._choose(groups)
        self.allocator.refcounts[cells] = 1
        self.allocator.free -= cells.size
        self.positions[cells] = groups.positions
        self._append(groups, cells)
        by_token = np.empty_like(cells)
        by_token[groups.order] = cells
        return by_token

    def truncate(self, sequence: int, length: int) -> None:
        """Keep only the first `length` cells of a sequence."""
        dropped = self.cells_of(sequence)[length:].copy()
        self.last[sequence] = self.first[sequence] + length
        self.allocator.decref(dropped)
        self._recompute_range(sequence)

    def remove_middle(self, sequence: int, start: int, stop: int, shift: int) -> Int32s:
        """Drop cells ``[start, stop)`` of a row, and add `shift` to the positions behind them.

        Returns the cells whose positions changed.
        """
        row = self.cells_of(sequence).copy()
        rest = row[stop:]
        self.last[sequence] -= stop - start
        self.cells_of(sequence)[start:] = rest
        self.positions[rest] += shift
        self.allocator.decref(row[start:stop])
        self._recompute_range(sequence)
        return rest

    def is_shared(self, cells: Int32s) -> bool:
        """Whether one of `cells` is referenced more than once."""
        return bool((self.allocator.refcounts[cells] > 1).any())

    def share(self, source: int, target: int, length: int) -> None:
        """Make `target` hold the first `length` cells of `source`, and nothing else."""
        cells = self.cells_of(source)[:length].copy()
        self.allocator.refcounts[cells] += 1
        self.truncate(target, 0)
        self._fill(target, cells)

    def copy(self, cells: int) -> CellTable:
        """Return an independent table with the same content, of `cells` cells: no fewer."""
        clone = CellTable(cells, self.max_sequences)
        clone.allocator = self.allocator.copy(cells)
        clone.positions[: self.cells] = self.positions
        clone.rows, clone.first, clone.last = self.rows.copy(), self.first.copy(), self.last.copy()
        clone.low, clone.high = self.low.copy(), self.high.copy()
        return clone

    def restore(self, saved: CellTable) -> None:
        """Be as `saved`, an earlier copy, which is of no further use."""
        self.allocator, self.positions = saved.allocator, saved.positions
        self.rows, self.first, self.last = saved.rows, saved.first, saved.last
        self.low, self.high = saved.low, saved.high

    # Snapshots reference cells, too, and give a sequence those that it is to begin with.

    def incref(self, cells: Indices) -> None:
        """Add a reference to each of `cells`, which are not free."""
        self.allocator.refcounts[cells] += 1

    def decref(self, cells: Indices) -> None:
        """Drop a reference to each of `cells`."""
        self.allocator.decref(cells.astype(np.int32))

    def referenced_by_others(self, pins: Int32s, going: Eviction | None) -> Bools:
        """Return for each cell whether others than snapshots reference it once `going` is evicted.

        pins: references of snapshots to each cell.
        """
        others = self.allocator.refcounts - pins
        if going is not None:
            np.subtract.at(others, self._oldest(going), 1)
        return others > 0

    def assign(self, sequence: int, positions: Int32s, cells: Indices) -> Indices:
        """Let an empty sequence hold `positions`, ascending, in `cells`; free ones where -1."""
        missing = cells < 0
        cells = cells.copy()
        cells[missing] = new = self.allocator.pop(int(np.count_nonzero(missing)))
        self.allocator.free -= new.size
        self.positions[new] = positions[missing]
        self.allocator.refcounts[cells] += 1
        self._fill(sequence, cells.astype(np.int32))
        return cells

    def _fill(self, sequence: int, cells: Int32s) -> None:
        """Let an empty sequence consist of `cells`, referenced for it already."""
        self._reserve_row_space(np.array([sequence]), np.array([cells.size]))
        self.first[sequence], self.last[sequence] = 0, cells.size
        self.rows[sequence, : cells.size] = cells
        self._recompute_range(sequence)

    # Inside.

    def _oldest(self, eviction: Eviction) -> Int32s:
        """Return the cells to evict, sequence by sequence."""
        counts = eviction.counts
        if (counts == 1).all():
            oldest: Int32s = self.rows[eviction.ids, self.first[eviction.ids]]
            return oldest
        ids = np.repeat(eviction.ids, counts)
        within = np.arange(ids.size) - np.repeat(np.cumsum(counts) - counts, counts)
        cells: Int32s = self.rows[ids, self.first[ids] + within]
        return cells

    def _choose(self, groups: SortedBatch) -> Int32s:
        """Return a free cell for every sorted token, if possible behind the last of its sequence.

        So a sequence stays in one range of cells, which attention reads as a slice.
        """
        ids, last = groups.ids, self.last[groups.ids]
        tails = np.where(last > self.first[ids], self.rows[ids, last - 1], self._start_hints[ids])
        if groups.single:
            got, wanted = self._claim_next_cell(ids, tails + 1)
        else:
            rank = np.arange(groups.positions.size) - np.repeat(groups.starts, groups.counts)
            wanted = np.repeat(tails, groups.counts) + 1 + rank
            wanted[wanted >= self.cells] = 0
            got = self.allocator.claim(wanted)
        if not got.all():
            wanted[~got] = self.allocator.pop(int(wanted.size - np.count_nonzero(got)))
        return wanted.astype(np.int32)

    def _claim_next_cell(self, ids: Int32s, wanted: Indices) -> tuple[Bools, Indices]:
        """Claim `wanted` for one token each of `ids`, or the cell that each has just dropped.

        So a window turns in its part of the pool, like a ring.
        """
        got = wanted < self.cells
        got[got] = self.allocator.claim(wanted[got])
        if not got.all():
            left = np.flatnonzero(~got)
            wanted[left] = self.rows[ids[left], self.first[ids[left]] - 1]
            got[left] = self.allocator.claim(wanted[left])
        return got, wanted

    def _append(self, groups: SortedBatch, cells: Int32s) -> None:
        """Add the cells of a sorted batch to the rows of their sequences, ordered by position."""
        ids, counts, starts = groups.ids, groups.counts, groups.starts
        self._reserve_row_space(ids, counts)
        last, empty = self.last[ids], self.last[ids] == self.first[ids]
        if groups.single:
            self.rows[ids, last] = low = high = cells
        else:
            at = np.repeat(last - starts, counts) + np.arange(cells.size)
            self.rows[groups.sequences, at] = cells
            low, high = np.minimum.reduceat(cells, starts), np.maximum.reduceat(cells, starts)
        self.last[ids] = last + counts
        self.low[ids] = np.where(empty, low, np.minimum(low, self.low[ids]))
        self.high[ids] = np.where(empty, high, np.maximum(high, self.high[ids]))
        for sequence in ids if groups.inserts else ():
            row = self.cells_of(int(sequence))
            row[:] = row[np.argsort(self.positions[row])]

    def _recompute_range(self, sequence: int) -> None:
        """Compute the range of a sequence from its cells."""
        row = self.cells_of(sequence)
        if row.size:
            self.low[sequence], self.high[sequence] = row.min(), row.max()
        else:
            self.first[sequence] = self.last[sequence] = 0

    def _reserve_row_space(self, ids: Int32s, extra: Indices) -> None:
        """Make room in the rows of `ids` for `extra` more cells each."""
        if (self.last[ids] + extra).max() <= self.rows.shape[1]:
            return
        held = self.last - self.first
        width = 2 * max(int(held.max()), int((held[ids] + extra).max()))
        rows = np.zeros((held.size, width), np.int32)
        for sequence in np.flatnonzero(held):
            rows[sequence, : held[sequence]] = self.cells_of(int(sequence))
        self.rows, self.first, self.last = rows, np.zeros_like(held), held
