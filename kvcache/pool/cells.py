"""The host-side table of a pool of cells: which holds which position of which sequences.

Everything is NumPy and incremental: planning a pass costs what its batch is long, whatever the
size of the pool. A cell may belong to several sequences that share a prefix; it then has one
position for all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcache._types import Indices, Int32s
from kvcache.errors import CacheFullError


class SortedBatch(NamedTuple):
    """A batch sorted by sequence and position, so that each sequence is one run of it."""

    order: Indices
    """Batch index of every sorted token."""
    positions: Int32s
    sequences: Int32s
    """Sorted."""
    ids: Int32s
    """The sequences that occur, once each."""
    starts: Indices
    """Where the run of each begins."""
    counts: Indices
    """How long it is."""
    inserts: bool = False
    """Whether a token comes before some that its sequence holds already."""

    @property
    def single(self) -> bool:
        """Whether every sequence has one token."""
        return self.ids.size == self.positions.size


class Eviction(NamedTuple):
    """Cells that sequences can let go of: `counts` of the oldest of each of `ids`."""

    ids: Int32s
    counts: Indices


class SingleTokenStep(NamedTuple):
    """One token for one sequence: its cell, the cell dropped for it, the range afterwards."""

    sequence: int
    position: int
    cell: int
    dropped: int | None
    low: int
    high: int


class CellTable:
    """Positions, membership, free cells and per-sequence order of a pool of `size` cells."""

    def __init__(self, size: int, max_sequences: int) -> None:
        self.size = size
        self.max_sequences = max_sequences
        self.free = size
        self.positions = np.zeros(size, np.int32)
        self._refcounts = np.zeros(size, np.int32)
        # Row s lists the cells of sequence s by position, live in [first, last).
        self._rows = np.zeros((max_sequences, 64), np.int32)
        self._first = np.zeros(max_sequences, np.int64)
        self._last = np.zeros(max_sequences, np.int64)
        self._low = np.zeros(max_sequences, np.int64)
        self._high = np.zeros(max_sequences, np.int64)
        # Free cells, and perhaps some since taken, which are passed over when they come up.
        self._stack = np.arange(size - 1, -1, -1, dtype=np.int32)
        self._top = size
        self._stacked = np.ones(size, bool)
        self._claims = np.zeros(size, np.int64)
        # An empty sequence begins in a part of the pool of its own, if that is free.
        self._start_hints = np.arange(max_sequences, dtype=np.int64) * (size // max_sequences) - 1

    # Looking.

    def cells_of(self, sequence: int) -> Int32s:
        """Cells of a sequence, ordered by position: a view."""
        return self._rows[sequence, self._first[sequence] : self._last[sequence]]

    def next_position(self, sequence: int) -> int:
        """One past the last position stored, 0 for an empty sequence."""
        row = self.cells_of(sequence)
        return int(self.positions[row[-1]]) + 1 if row.size else 0

    def find(self, sequence: int, position: int) -> int:
        """How many cells of a sequence hold a smaller position."""
        row = self.cells_of(sequence)
        if not row.size:
            return 0
        first, last = int(self.positions[row[0]]), int(self.positions[row[-1]])
        if last - first == row.size - 1:  # without gaps
            return min(max(position - first, 0), row.size)
        return int(np.searchsorted(self.positions[row], position))

    def span(self, ids: Int32s) -> tuple[int, int]:
        """Smallest range ``[start, stop)`` of cells with all those of `ids`, none of them empty."""
        if ids.size == 1:
            return int(self._low[ids[0]]), int(self._high[ids[0]]) + 1
        return int(self._low[ids].min()), int(self._high[ids].max()) + 1

    # Planning: nothing below changes anything until `commit`.

    def group(self, positions: Int32s, sequences: Int32s) -> SortedBatch:
        """Sort a batch by sequence and position.

        Raises: ValueError for a sequence id or position out of range, or for a position that
            its sequence holds already or that occurs twice.
        """
        limit = self._first.size
        if sequences.view(np.uint32).max() >= limit:  # negative ones are huge then
            raise ValueError(
                f"sequence ids must lie in [0, {limit}), as many as max_sequences; "
                f"got {sequences.min()} to {sequences.max()}."
            )
        if positions.min() < 0:
            raise ValueError(f"positions must be >= 0; got {positions.min()}.")
        groups = _sorted(positions, sequences)
        inserts = self._refuse_repeats(groups)
        return groups._replace(inserts=inserts) if inserts else groups

    def _refuse_repeats(self, groups: SortedBatch) -> bool:
        """Whether a token comes before the last one stored of its sequence, if all may come."""
        positions, sequences, starts = groups.positions, groups.sequences, groups.starts
        if not groups.single:
            twice = (positions[1:] == positions[:-1]) & (sequences[1:] == sequences[:-1])
            if twice.any():
                at = int(np.argmax(twice))
                raise ValueError(
                    f"position {positions[at]} of sequence {sequences[at]} occurs twice."
                )
        last = self._last[groups.ids]
        filled = last > self._first[groups.ids]
        ends = self.positions[self._rows[groups.ids, last - 1]]
        behind = filled & (positions[starts] <= ends)
        for which in np.flatnonzero(behind):
            self._refuse_stored(groups, int(which))
        return bool(behind.any())

    def _refuse_stored(self, groups: SortedBatch, which: int) -> None:
        start, sequence = groups.starts[which], int(groups.ids[which])
        wanted = groups.positions[start : start + groups.counts[which]]
        stored = np.isin(wanted, self.positions[self.cells_of(sequence)])
        if stored.any():
            raise ValueError(
                f"sequence {sequence} holds position {wanted[stored][0]} already. Remove it first."
            )

    def expired(self, ids: Int32s, oldest: Indices) -> Eviction:
        """What `ids` hold before position `oldest`, one for each."""
        first, last = self._first[ids], self._last[ids]
        held = last - first
        head = self.positions[self._rows[ids, first]]
        tail = self.positions[self._rows[ids, last - 1]]
        counts = np.minimum(np.maximum(oldest - head, 0), held)
        for which in np.flatnonzero((held > 0) & (tail - head != held - 1)):  # with gaps
            counts[which] = self.find(int(ids[which]), int(oldest[which]))
        some = counts > 0
        return Eviction(ids[some], counts[some])

    def check_room(self, tokens: int, eviction: Eviction | None) -> None:
        """Raise CacheFullError unless `tokens` cells are free after `eviction`."""
        free = self.free
        if free < tokens and eviction is not None and eviction.ids.size:
            cells, counts = np.unique(self._oldest(eviction), return_counts=True)
            free += int(np.count_nonzero(self._refcounts[cells] == counts))
        if free < tokens:
            raise CacheFullError(
                f"a pass needs one free cell per token; {tokens} needed, {free} of {self.size} "
                "free. Remove sequences, or make the cache with more capacity."
            )

    # Changing.

    def evict(self, eviction: Eviction) -> None:
        """Let the oldest cells of some sequences go."""
        if not eviction.ids.size:
            return
        cells, ids, counts = self._oldest(eviction), eviction.ids, eviction.counts
        owners = ids if cells.size == ids.size else np.repeat(ids, counts)
        at_edge = (cells == self._low[owners]) | (cells == self._high[owners])
        self._first[ids] += counts
        self._release(cells)
        if at_edge.any():
            self._shrink_ranges(eviction, owners[at_edge])

    def _shrink_ranges(self, eviction: Eviction, edges: Int32s) -> None:
        """Find the ranges of sequences anew that lost a cell at the edge of theirs."""
        single = (eviction.counts == 1).all()
        ids = edges if single else np.unique(edges)
        first, last, low = self._first[ids], self._last[ids], self._low[ids]
        head = self._rows[ids, np.minimum(first, last - 1)]  # where none is left: anything
        # The usual step: the lowest cell went, and the one after it is still there.
        steps = (first < last) & (self._rows[ids, first - 1] == low) & (head == low + 1)
        steps &= single
        self._low[ids[steps]] += 1
        for sequence in ids[~steps]:
            self._recompute_range(int(sequence))

    def insert(self, groups: SortedBatch) -> Int32s:
        """Give every token of a batch a cell; return them in the order of the batch.

        There is room, and no position is taken: :meth:`check_room` and :meth:`group` said so.
        """
        cells = self._choose(groups)
        self._refcounts[cells] = 1
        self.free -= cells.size
        self.positions[cells] = groups.positions
        self._append(groups, cells)
        by_token = np.empty_like(cells)
        by_token[groups.order] = cells
        return by_token

    def truncate(self, sequence: int, length: int) -> None:
        """Keep only the first `length` cells of a sequence."""
        dropped = self.cells_of(sequence)[length:].copy()
        self._last[sequence] = self._first[sequence] + length
        self._release(dropped)
        self._recompute_range(sequence)

    def remove_middle(self, sequence: int, start: int, stop: int, shift: int) -> Int32s:
        """Drop cells ``[start, stop)`` of a row and move the rest by `shift`; return the rest."""
        row = self.cells_of(sequence).copy()
        rest = row[stop:]
        self._last[sequence] -= stop - start
        self.cells_of(sequence)[start:] = rest
        self.positions[rest] += shift
        self._release(row[start:stop])
        self._recompute_range(sequence)
        return rest

    def is_shared(self, cells: Int32s) -> bool:
        """Whether another sequence holds one of these cells, too."""
        return bool((self._refcounts[cells] > 1).any())

    def share(self, source: int, target: int, length: int) -> None:
        """Make `target` hold the first `length` cells of `source`, and nothing else."""
        cells = self.cells_of(source)[:length].copy()
        self._refcounts[cells] += 1
        self.truncate(target, 0)
        self._fill(target, cells)

    def copy(self, size: int) -> CellTable:
        """An independent table with the same content, of `size` cells: no fewer than here."""
        twin, more = CellTable(size, self.max_sequences), size - self.size
        twin.free += self.free - self.size
        for name in ("positions", "_refcounts", "_stacked"):
            getattr(twin, name)[: self.size] = getattr(self, name)
        for name in ("_rows", "_first", "_last", "_low", "_high"):
            setattr(twin, name, getattr(self, name).copy())
        # The new cells, with the highest numbers, are stacked below: they are taken last.
        twin._top = more + self._top
        twin._stack[more : twin._top] = self._stack[: self._top]
        return twin

    # Others than sequences may hold cells, and give a sequence those it is to begin with.

    def incref(self, cells: Indices) -> None:
        """Let one more hold each of `cells`, which are not free."""
        self._refcounts[cells] += 1

    def decref(self, cells: Indices) -> None:
        """The end of :meth:`incref`."""
        self._release(cells.astype(np.int32))

    def referenced_by_others(self, pins: Int32s, going: Eviction | None) -> npt.NDArray[np.bool_]:
        """Which cells have holders apart from `pins`, a number for each, when `going` is gone."""
        besides = self._refcounts - pins
        if going is not None:
            np.subtract.at(besides, self._oldest(going), 1)
        held: npt.NDArray[np.bool_] = besides > 0
        return held

    def assign(self, sequence: int, positions: Int32s, cells: Indices) -> Indices:
        """Let an empty sequence hold `positions`, ascending, in `cells`; free ones where -1."""
        missing = cells < 0
        cells = cells.copy()
        cells[missing] = new = self._pop(int(np.count_nonzero(missing)))
        self.free -= new.size
        self.positions[new] = positions[missing]
        self._refcounts[cells] += 1
        self._fill(sequence, cells.astype(np.int32))
        return cells

    def _fill(self, sequence: int, cells: Int32s) -> None:
        """Let an empty sequence consist of `cells`, which count it as a holder already."""
        self._reserve_row_space(np.array([sequence]), np.array([cells.size]))
        self._first[sequence], self._last[sequence] = 0, cells.size
        self._rows[sequence, : cells.size] = cells
        self._recompute_range(sequence)

    # The commonest pass by far, one token after the last of one sequence, needs no arrays.

    def plan_single(self, sequence: int, position: int, oldest: int) -> SingleTokenStep | None:
        """How one token is stored, and the cell before position `oldest` dropped, or None.

        None where it takes more than that: :meth:`group`, :meth:`evict` and :meth:`insert`
        do everything, and raise what is wrong.
        """
        if not 0 <= sequence < self._first.size:
            return None
        first, last = int(self._first[sequence]), int(self._last[sequence])
        if last - first < 2 or last == self._rows.shape[1]:
            return None
        tail = int(self._rows[sequence, last - 1])
        if self.positions[tail] >= position:
            return None
        cell, low, high = tail + 1, int(self._low[sequence]), int(self._high[sequence])
        if cell == self.size or self._refcounts[cell]:
            return self._reuse_oldest(sequence, position, oldest)
        return self._drop_oldest(
            SingleTokenStep(sequence, position, cell, None, low, max(high, cell)), oldest
        )

    def _reuse_oldest(self, sequence: int, position: int, oldest: int) -> SingleTokenStep | None:
        """The token in the place of the oldest, as in a ring, or None if that is not simple."""
        first = int(self._first[sequence])
        head, follower = self._rows[sequence, first : first + 2].tolist()
        if not self.positions[head] < oldest <= self.positions[follower]:
            return None
        if self._refcounts[head] > 1:
            return None
        low, high = int(self._low[sequence]), int(self._high[sequence])
        return SingleTokenStep(sequence, position, head, head, low, high)

    def _drop_oldest(self, step: SingleTokenStep, oldest: int) -> SingleTokenStep | None:
        """`step` with the oldest cell dropped, if it has to be, or None if that is not simple."""
        first = int(self._first[step.sequence])
        head, follower = self._rows[step.sequence, first : first + 2].tolist()
        if self.positions[head] >= oldest:
            return step
        if self.positions[follower] < oldest or self._refcounts[head] > 1:
            return None
        if head == step.low and follower == head + 1:
            return step._replace(dropped=head, low=follower)
        return None if head in (step.low, step.high) else step._replace(dropped=head)

    def commit_single(self, step: SingleTokenStep) -> None:
        """Carry out what :meth:`plan_single` found."""
        sequence, position, cell, dropped, low, high = step
        self._rows[sequence, self._last[sequence]] = cell
        self._last[sequence] += 1
        self._refcounts[cell] = 1
        self.positions[cell] = position
        self._low[sequence], self._high[sequence] = low, high
        if dropped is None:
            self.free -= 1
            return
        self._first[sequence] += 1
        if dropped != cell:
            self._refcounts[dropped] = 0
        if not self._stacked[dropped]:
            self._stacked[dropped] = True
            self._stack[self._top] = dropped
            self._top += 1

    # Inside.

    def _oldest(self, eviction: Eviction) -> Int32s:
        counts = eviction.counts
        if (counts == 1).all():
            oldest: Int32s = self._rows[eviction.ids, self._first[eviction.ids]]
            return oldest
        ids = np.repeat(eviction.ids, counts)
        within = np.arange(ids.size) - np.repeat(np.cumsum(counts) - counts, counts)
        cells: Int32s = self._rows[ids, self._first[ids] + within]
        return cells

    def _choose(self, groups: SortedBatch) -> Int32s:
        """A free cell for every sorted token: after the last one of its sequence, if it can be."""
        ids, last = groups.ids, self._last[groups.ids]
        tails = np.where(last > self._first[ids], self._rows[ids, last - 1], self._start_hints[ids])
        if groups.single:
            got, wanted = self._claim_next_cell(ids, tails + 1)
        else:
            rank = np.arange(groups.positions.size) - np.repeat(groups.starts, groups.counts)
            wanted = np.repeat(tails, groups.counts) + 1 + rank
            wanted[wanted >= self.size] = 0
            got = self._claim(wanted)
        if not got.all():
            wanted[~got] = self._pop(int(wanted.size - np.count_nonzero(got)))
        return wanted.astype(np.int32)

    def _claim_next_cell(
        self, ids: Int32s, wanted: Indices
    ) -> tuple[npt.NDArray[np.bool_], Indices]:
        """Claim `wanted` for one token each of `ids`, or what each of those has just let go of.

        So a window turns in its part of the pool, like a ring.
        """
        got = wanted < self.size
        got[got] = self._claim(wanted[got])
        if not got.all():
            left = np.flatnonzero(~got)
            wanted[left] = self._rows[ids[left], self._first[ids[left]] - 1]
            got[left] = self._claim(wanted[left])
        return got, wanted

    def _claim(self, cells: Indices) -> npt.NDArray[np.bool_]:
        """Take those of `cells` that are free, each once; return which."""
        tokens = np.arange(cells.size)
        self._claims[cells] = tokens  # where two want one cell, the last claim stands
        got: npt.NDArray[np.bool_] = (self._refcounts[cells] == 0) & (self._claims[cells] == tokens)
        self._refcounts[cells[got]] = 1
        return got

    def _pop(self, count: int) -> Int32s:
        """Any free cells, neighbours if possible."""
        found: list[Int32s] = [np.empty(0, np.int32)]
        while count and self._top:
            # Many at a time, because most may have been taken since they were stacked.
            cells = self._stack[max(0, self._top - max(count, 256)) : self._top][::-1]
            free = np.flatnonzero(self._refcounts[cells] == 0)[:count]
            seen = cells.size if free.size < count else int(free[-1]) + 1
            self._stacked[cells[:seen]] = False
            self._top -= seen
            found.append(cells[free])
            count -= free.size
        return np.concatenate(found)

    def _append(self, groups: SortedBatch, cells: Int32s) -> None:
        ids, counts, starts = groups.ids, groups.counts, groups.starts
        self._reserve_row_space(ids, counts)
        last, empty = self._last[ids], self._last[ids] == self._first[ids]
        if groups.single:
            self._rows[ids, last] = low = high = cells
        else:
            at = np.repeat(last - starts, counts) + np.arange(cells.size)
            self._rows[groups.sequences, at] = cells
            low, high = np.minimum.reduceat(cells, starts), np.maximum.reduceat(cells, starts)
        self._last[ids] = last + counts
        self._low[ids] = np.where(empty, low, np.minimum(low, self._low[ids]))
        self._high[ids] = np.where(empty, high, np.maximum(high, self._high[ids]))
        for sequence in ids if groups.inserts else ():
            row = self.cells_of(int(sequence))
            row[:] = row[np.argsort(self.positions[row])]

    def _release(self, cells: Int32s) -> None:
        """Take one holder from each of `cells`, and free those that have none left."""
        if (self._refcounts[cells] == 1).all():  # nobody shares any, so each is named once
            self._refcounts[cells] = 0
            freed = cells
        else:
            np.subtract.at(self._refcounts, cells, 1)
            freed = np.unique(cells[self._refcounts[cells] == 0])
        self.free += freed.size
        new = np.sort(freed[~self._stacked[freed]])
        self._stacked[new] = True
        # The lowest ends up on top, so that cells given out together are neighbours.
        self._stack[self._top : self._top + new.size] = new[::-1]
        self._top += new.size

    def _recompute_range(self, sequence: int) -> None:
        """Compute the range of a sequence from its cells."""
        row = self.cells_of(sequence)
        if row.size:
            self._low[sequence], self._high[sequence] = row.min(), row.max()
        else:
            self._first[sequence] = self._last[sequence] = 0

    def _reserve_row_space(self, ids: Int32s, extra: Indices) -> None:
        """Make room in the rows of `ids` for `extra` more cells each."""
        if (self._last[ids] + extra).max() <= self._rows.shape[1]:
            return
        held = self._last - self._first
        width = 2 * max(int(held.max()), int((held[ids] + extra).max()))
        rows = np.zeros((held.size, width), np.int32)
        for sequence in np.flatnonzero(held):
            rows[sequence, : held[sequence]] = self.cells_of(int(sequence))
        self._rows, self._first, self._last = rows, np.zeros_like(held), held


def _sorted(positions: Int32s, sequences: Int32s) -> SortedBatch:
    if positions.size == 1:
        one = np.zeros(1, np.int64)
        return SortedBatch(one, positions, sequences, sequences, one, one + 1)
    if (sequences[1:] > sequences[:-1]).all():  # a decode step: one token each, in order
        each = np.arange(positions.size)
        return SortedBatch(each, positions, sequences, sequences, each, np.ones_like(each))
    order = np.lexsort((positions, sequences))
    sequences = sequences[order]
    starts = np.flatnonzero(np.diff(sequences, prepend=-1))
    counts = np.diff(starts, append=sequences.size)
    return SortedBatch(order, positions[order], sequences, sequences[starts], starts, counts)
