"""Pinned cells of a pool: for snapshots, and for resume points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import compress

import numpy as np

from kvcache._interrupts import uninterrupted
from kvcache._locks import Lock
from kvcache._types import Int32s
from kvcache.errors import CacheFullError
from kvcache.snapshots.rows import LayerRows, RowOwner, Slots, TokenRows
from kvcache.snapshots.schedule import ResumePoints
from kvcache.snapshots.visibility import Visibility

from .buffers import PoolBuffers
from .cells import CellTable
from .changes import Eviction
from .owned import Commit
from .rows import finite_rows


class PoolPins(RowOwner):
    """Owner of the rows pinned in the cells of a pool.

    Pinned rows add a reference to each of their cells, so that no sequence is given these. When a
    pass needs cells referenced by snapshots only, the oldest rows are spilled to the host.

    visibility: rule for the rows needed to resume. lock: that of the cache, held during changes.
    history: returns the cells of a sequence without the tokens of an unfinished pass.
    """

    def __init__(
        self,
        table: CellTable,
        buffers: PoolBuffers,
        visibility: Visibility,
        lock: Lock,
        history: Callable[[int], Int32s],
    ) -> None:
        self._history = history
        self._table, self._buffers, self._visibility = table, buffers, visibility
        self.lock = lock
        self._rows: dict[TokenRows, None] = {}  # a set in order of pinning: the oldest spill first
        self._references = np.zeros(table.cells, np.int32)  # per cell: number of rows pinning it
        self._points: dict[int, ResumePoints] = {}
        # Sequences with scheduled positions: for most passes a look at this set is all it takes.
        self._unreached: set[int] = set()
        self.paused = False
        """True while resume points retain nothing."""

    # As the owner of rows.

    @property
    def token_bytes(self) -> int:
        return self._buffers.token_bytes

    def read(self, slots: Slots) -> LayerRows:
        return self._buffers.read(slots)

    def pin(self, rows: TokenRows) -> None:
        with self.lock:
            if rows not in self._rows:
                self._table.incref(rows.slots)
                self._references[rows.slots] += 1
                self._rows[rows] = None

    def unpin(self, rows: TokenRows) -> None:
        with self.lock:
            if rows not in self._rows:
                return
            del self._rows[rows]
            self._references[rows.slots] -= 1
            self._table.decref(rows.slots)

    # When cells are needed.

    def spill_one(self, going: Eviction | None = None, keep: Iterable[TokenRows] = ()) -> bool:
        """Copy the oldest pinned rows that block cells to the host. Return False if none do.

        Rows block a cell if no sequence references it once `going` is evicted.

        keep: rows to leave where they are.
        """
        kept = set(keep)
        for referenced in self._table.references_of_others(self._references, going):
            for rows in self._rows:
                if rows not in kept and not referenced[rows.slots].all():
                    rows.to_host()
                    return True
        return False

    def prepare_spill(self, cells: Int32s | None = None) -> Commit:
        """Copy rows pinned in any of `cells`, which will change, to the host; None: all rows.

        Return the commit, which unpins them.
        """
        return self._spilled(
            [rows for rows in self._rows if cells is None or np.isin(rows.slots, cells).any()]
        )

    def _spilled(self, leaving: Sequence[TokenRows]) -> Commit:
        """Copy the rows of `leaving` to the host; return the commit, which unpins them."""
        copies = [self._buffers.read(rows.slots) for rows in leaving]

        def commit() -> None:
            for rows, layers in zip(leaving, copies, strict=True):
                rows.move_to_host(layers)

        return commit

    def is_shared(self, cells: Int32s) -> bool:
        """Return whether one of `cells` belongs to several sequences; pins can give way."""
        return self._table.is_shared(cells, self._references)

    @property
    def references(self) -> Int32s:
        """Number of rows that pin each cell, int32 [cells]."""
        return self._references

    def unpin_in_copy(self, table: CellTable) -> None:
        """Drop all references of snapshots in `table`, a copy for another cache."""
        for rows in self._rows:
            table.decref(rows.slots)

    # Taking and putting back.

    def capture(self, sequence: int, start: int, stop: int) -> TokenRows:
        """Return the rows of positions ``[start, stop)``, held by the sequence or retained."""
        rows = self._pinned(self._history(sequence), start, stop)
        points = self._points.get(sequence)
        return rows if points is None else points.add_to(rows, start, stop)

    def _pinned(self, cells: Int32s, start: int, stop: int) -> TokenRows:
        """Return the rows of positions ``[start, stop)`` among `cells`, pinned."""
        positions = self._table.positions[cells]
        inside = (positions >= start) & (positions < stop)
        return TokenRows.resident(positions[inside], self, cells[inside].astype(np.int64))

    def prepare_restore(self, sequence: int, parts: Sequence[TokenRows], position: int) -> Commit:
        """Check a restore of `parts` to an empty sequence, to resume at `position`.

        parts: in order. Returns the commit. Makes room by spilling other rows.

        Raises: ValueError if the sequence is not empty, CacheFullError, SnapshotMismatchError for
            rows of other heads or head_dim.
        """
        if self._history(sequence).size:
            raise ValueError(f"what is restored goes to an empty sequence; {sequence} holds some.")
        needed = [
            np.flatnonzero(self._visibility.needed(rows.positions, position)) for rows in parts
        ]
        positions = np.concatenate(
            [rows.positions[index] for rows, index in zip(parts, needed, strict=True)]
        )
        leaving = self._rows_to_spill(parts, needed, positions)
        cells = self._cells_shared(parts, needed, leaving, positions)
        written = self._rows_to_write(parts, needed, cells)
        spill = self._spilled(leaving)

        def commit() -> None:
            spill()
            self._restore(sequence, positions, cells, written)

        return commit

    def _rows_to_spill(
        self, parts: Sequence[TokenRows], needed: Sequence[Slots], positions: Int32s
    ) -> list[TokenRows]:
        """Return the pinned rows to spill, the oldest first, for a restore of `parts`.

        Raises: CacheFullError if there is no room without any of them.
        """
        leaving: list[TokenRows] = []
        missing, free = self._cells_missing(parts, needed, leaving, positions), self._table.free
        if missing <= free:
            return leaving
        held = self._table.referenced_by_others(self._references, None)
        references, kept = self._table.allocator.refcounts.copy(), set(parts)
        # Rows of `parts` go last: resident rows are shared, and need no free cell.
        for rows in sorted(self._rows, key=kept.__contains__):
            if missing > free and not held[rows.slots].all():
                leaving.append(rows)
                references[rows.slots] -= 1
                free += self._table.cells_freed(references, rows.slots)
                if rows in kept:
                    missing = self._cells_missing(parts, needed, leaving, positions)
        if missing > free:
            raise CacheFullError(
                f"restoring needs {missing} free cells; {free} of {self._table.cells} are free or "
                "can be freed. Remove sequences."
            )
        return leaving

    def _cells_missing(
        self,
        parts: Sequence[TokenRows],
        needed: Sequence[Slots],
        leaving: Sequence[TokenRows],
        positions: Int32s,
    ) -> int:
        """Return the number of free cells that a restore needs if `leaving` are spilled."""
        cells = np.concatenate(self._resident(parts, needed, leaving))
        return self._table.cells_needed(cells, positions)

    def _resident(
        self, parts: Sequence[TokenRows], needed: Sequence[Slots], leaving: Sequence[TokenRows]
    ) -> list[Slots]:
        """Return the cell of every row needed, -1 for rows outside this pool and in `leaving`."""
        return [
            rows.slots[index]
            if rows.owner is self and rows not in leaving
            else np.full(index.size, -1, np.int64)
            for rows, index in zip(parts, needed, strict=True)
        ]

    def _cells_shared(
        self,
        parts: Sequence[TokenRows],
        needed: Sequence[Slots],
        leaving: Sequence[TokenRows],
        positions: Int32s,
    ) -> list[Slots]:
        """Return the cell of every row needed, -1 where it gets a free one."""
        resident = self._resident(parts, needed, leaving)
        cells = np.concatenate(resident)
        shared = self._table.shareable(cells, positions)
        return _split_like(np.where(shared, cells, -1), resident)

    def _rows_to_write(
        self, parts: Sequence[TokenRows], needed: Sequence[Slots], cells: Sequence[Slots]
    ) -> list[LayerRows]:
        """Return the checked content to write for each of `parts`: of rows that share no cell."""
        own = [index[where < 0] for index, where in zip(needed, cells, strict=True)]
        writes = [index.size > 0 for index in own]
        written: list[LayerRows] = [
            rows.read(index) if write else {}
            for rows, index, write in zip(parts, own, writes, strict=True)
        ]
        self._buffers.check_rows(*compress(written, writes))
        return list(map(finite_rows, written))

    def _restore(
        self,
        sequence: int,
        positions: Int32s,
        shared: Sequence[Slots],
        written: Sequence[LayerRows],
    ) -> None:
        """Assign cells to the sequence, and queue the rows that share none to be written."""
        cells = self._table.assign(sequence, positions, np.concatenate(shared))
        pieces = zip(written, _split_like(cells, shared), shared, strict=True)
        for layers, slots, resident in pieces:
            # Queued, because this may not be the thread of the passes, which owns the buffers.
            self._buffers.enqueue_rows(slots[resident < 0], layers)

    # Resume points.

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        """Make `positions` resume points of a sequence: retain their rows once reached."""
        points = self._points.setdefault(sequence, ResumePoints())
        points.schedule(positions)
        self._settle(sequence, points)

    def _settle(self, sequence: int, points: ResumePoints) -> None:
        """Update the record of sequences with scheduled positions; drop `points` if unused."""
        if points.scheduled:
            self._unreached.add(sequence)
        else:
            self._unreached.discard(sequence)
        if not points.scheduled and points.retained is None:
            self._points.pop(sequence, None)

    @property
    def scheduled(self) -> bool:
        """True if :meth:`retain_due` may have anything to do."""
        return bool(self._unreached) and not self.paused

    def retain_due(self) -> None:
        """Retain rows for resume points reached so far; call before a pass drops cells."""
        for sequence in list(self._unreached):
            points = self._points[sequence]
            for position in points.due(self._table.next_position(sequence)):
                lowest = self._visibility.lowest_needed(position)
                cells = self._table.cells_of(sequence)
                with uninterrupted():  # rows are pinned before the points own them
                    points.retain(position, self._pinned(cells, lowest, position))
            self._settle(sequence, points)

    def forget(self, sequence: int, start: int) -> None:
        """Drop rows retained from position `start` on, and resume points after it."""
        points = self._points.get(sequence)
        if points is not None:
            points.unschedule(start)
            points.forget(start)
            self._settle(sequence, points)

    def take_back(self, sequence: int, start: int) -> None:
        """Drop rows retained from position `start` on; resume points after it are ahead again."""
        points = self._points.get(sequence)
        if points is not None:
            points.take_back(start)
            self._settle(sequence, points)


def _split_like(cells: Slots, like: Sequence[Slots]) -> list[Slots]:
    """Split `cells` into pieces as long as the pieces of `like`."""
    return np.split(cells, np.cumsum([piece.size for piece in like])[:-1])
