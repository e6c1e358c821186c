"""Cells of a pool that snapshots pin, and the rows that resume points retain."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numpy as np

from kvcache._types import Int32s
from kvcache.errors import CacheFullError
from kvcache.snapshots.rows import LayerRows, Slots, TokenRows
from kvcache.snapshots.schedule import ResumePoints
from kvcache.snapshots.visibility import Visibility

from .base import Commit
from .buffers import PoolBuffers
from .cells import CellTable, Eviction


class PoolPins:
    """The owner of the rows that stay in the cells of a pool; see :class:`RowOwner`.

    Each cell counts a snapshot's rows as one more reference, so that no sequence is given it. When
    a pass needs cells that only snapshots reference, the oldest rows are spilled to the host.
    """

    def __init__(
        self, table: CellTable, buffers: PoolBuffers, visibility: Visibility, lock: threading.RLock
    ) -> None:
        self._table, self._buffers, self._visibility = table, buffers, visibility
        self.lock = lock
        self._rows: dict[TokenRows, None] = {}
        self._references = np.zeros(table.cells, np.int32)  # by cell: rows that pin it
        self._points: dict[int, ResumePoints] = {}
        self._unreached: set[int] = set()  # sequences with positions that are still scheduled
        self.paused = False
        """Whether resume points retain nothing for now."""

    # As the owner of rows.

    @property
    def token_bytes(self) -> int:
        return self._buffers.token_bytes

    def read(self, slots: Slots) -> LayerRows:
        return self._buffers.read(slots)

    def pin(self, rows: TokenRows) -> None:
        with self.lock:
            self._table.incref(rows.slots)
            self._references[rows.slots] += 1
            self._rows[rows] = None

    def unpin(self, rows: TokenRows) -> None:
        with self.lock:
            del self._rows[rows]
            self._references[rows.slots] -= 1
            self._table.decref(rows.slots)

    # When cells are needed.

    def spill_one(self, going: Eviction | None = None, keep: Iterable[TokenRows] = ()) -> bool:
        """Copy the oldest pinned rows that block free cells to the host. Return False if none do.

        Rows block a cell if no sequence references it once `going` is evicted. keep: rows that
        stay.
        """
        kept = set(keep)
        referenced = self._table.referenced_by_others(self._references, going)
        for rows in self._rows:
            if rows not in kept and not referenced[rows.slots].all():
                rows.to_host()
                return True
        return False

    def spill(self, cells: Int32s | None = None) -> None:
        """Copy all rows to the host that pin one of `cells`, which will change; None: all rows."""
        for rows in list(self._rows):
            if cells is None or np.isin(rows.slots, cells).any():
                rows.to_host()

    def save_pins(self) -> dict[TokenRows, Slots]:
        """Return the rows pinned now, for :meth:`restore_pins`."""
        return {rows: rows.slots for rows in self._rows}

    def restore_pins(self, saved: dict[TokenRows, Slots]) -> None:
        """Unpin what was spilled since, in a table that is again as it was at `saved`."""
        for rows in saved.keys() - self._rows.keys():
            self._table.decref(saved[rows])

    def unpin_in_copy(self, table: CellTable) -> None:
        """Drop the references of snapshots in a copy of the table, which has none of them."""
        for rows in self._rows:
            table.decref(rows.slots)

    # Taking and putting back.

    def capture(self, sequence: int, start: int, stop: int) -> TokenRows:
        """Return rows of what is held of positions ``[start, stop)``, and of what is retained."""
        rows = self._pinned(sequence, start, stop)
        points = self._points.get(sequence)
        return rows if points is None else points.add_to(rows, start, stop)

    def _pinned(self, sequence: int, start: int, stop: int) -> TokenRows:
        cells = self._table.cells_of(sequence)
        positions = self._table.positions[cells]
        inside = (positions >= start) & (positions < stop)
        return TokenRows.resident(positions[inside], self, cells[inside].astype(np.int64))

    def prepare_restore(self, sequence: int, parts: Sequence[TokenRows], position: int) -> Commit:
        """Check that an empty sequence can hold what it needs of `parts` to go on at `position`.

        parts: in order. Returns what carries it out. Raises: ValueError if the sequence is not
        empty, CacheFullError.
        """
        if self._table.cells_of(sequence).size:
            raise ValueError(f"what is restored goes to an empty sequence; {sequence} holds some.")
        needed = [
            np.flatnonzero(self._visibility.needed(rows.positions, position)) for rows in parts
        ]
        while (missing := self._cells_missing(parts, needed)) > self._table.free:
            # The rows that are put back are spilled last: what they pin needs no free cell.
            if not self.spill_one(keep=parts) and not self.spill_one():
                raise CacheFullError(
                    f"restoring needs {missing} free cells; {self._table.free} of "
                    f"{self._table.cells} are free. Remove sequences."
                )
        written = self._rows_to_write(parts, needed)
        return lambda: self._restore(sequence, parts, needed, written)

    def _cells_missing(self, parts: Sequence[TokenRows], needed: Sequence[Slots]) -> int:
        """Return the cells that restoring takes: one for each row that is not in a cell."""
        pairs = zip(parts, needed, strict=True)
        return sum(index.size for rows, index in pairs if rows.owner is not self)

    def _rows_to_write(
        self, parts: Sequence[TokenRows], needed: Sequence[Slots]
    ) -> list[LayerRows]:
        """Return the content to write for each of `parts`, checked: none for resident rows."""
        written: list[LayerRows] = []
        for rows, index in zip(parts, needed, strict=True):
            written.append({} if rows.owner is self or not index.size else rows.read(index))
            if written[-1]:
                self._buffers.check_rows(written[-1])
        return written

    def _restore(
        self,
        sequence: int,
        parts: Sequence[TokenRows],
        needed: Sequence[Slots],
        written: Sequence[LayerRows],
    ) -> None:
        resident = []  # the cell of every row, -1 where it gets a free one
        for rows, index in zip(parts, needed, strict=True):
            in_cells = rows.owner is self
            resident.append(rows.slots[index] if in_cells else np.full(index.size, -1, np.int64))
        positions = [rows.positions[index] for rows, index in zip(parts, needed, strict=True)]
        cells = self._table.assign(sequence, np.concatenate(positions), np.concatenate(resident))
        for layers, slots in zip(written, _split_like(cells, resident), strict=True):
            self._buffers.enqueue_rows(slots, layers)

    # Resume points.

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        """Retain what going on at `positions` needs, from when they are reached."""
        points = self._points.setdefault(sequence, ResumePoints())
        points.schedule(positions)
        self._settle(sequence, points)

    def _settle(self, sequence: int, points: ResumePoints) -> None:
        """Take note of whether a sequence still has scheduled positions, or anything at all."""
        if points.scheduled:
            self._unreached.add(sequence)
        else:
            self._unreached.discard(sequence)
        if not points.scheduled and points.retained is None:
            self._points.pop(sequence, None)

    @property
    def scheduled(self) -> bool:
        """Whether :meth:`retain_due` has anything to do."""
        return bool(self._unreached) and not self.paused

    def retain_due(self) -> None:
        """Retain the rows for positions that were reached; call before a pass drops anything."""
        for sequence in list(self._unreached):
            points = self._points[sequence]
            for position in points.due(self._table.next_position(sequence)):
                lowest = self._visibility.lowest_needed(position)
                points.retain(position, self._pinned(sequence, lowest, position))
            self._settle(sequence, points)

    def forget(self, sequence: int, start: int) -> None:
        """Drop what is retained from position `start` on, and what is scheduled behind it."""
        points = self._points.get(sequence)
        if points is not None:
            points.unschedule(start)
            points.forget(start)
            self._settle(sequence, points)


def _split_like(cells: Slots, like: Sequence[Slots]) -> list[Slots]:
    """Return `cells` cut into pieces as long as those of `like`."""
    return np.split(cells, np.cumsum([piece.size for piece in like])[:-1])
