"""Snapshots of sequences in a pool: which cells they keep, and when they have to leave."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from kvcache._types import Int32s
from kvcache.errors import CacheFullError
from kvcache.snapshots.rows import LayerRows, Slots, TokenRows, Visibility

from .base import Commit
from .buffers import PoolBuffers
from .cells import CellTable, Eviction


class PoolPins:
    """TokenRows that stay in the cells of a pool.

    Each of their cells counts them as one more holder, so that no sequence is given it. When a
    pass needs cells that only they hold, the eldest move to the host.
    """

    def __init__(
        self, table: CellTable, buffers: PoolBuffers, visibility: Visibility, lock: threading.RLock
    ) -> None:
        self._table, self._buffers, self._visibility, self.lock = table, buffers, visibility, lock
        self._rows: dict[TokenRows, None] = {}
        self._pins = np.zeros(table.size, np.int32)  # by cell: how many of the rows keep it
        self.paused = False
        # By sequence: positions to keep the way to, and the rows kept so far.
        self._scheduled: defaultdict[int, set[int]] = defaultdict(set)
        self._retained: dict[int, TokenRows] = {}

    # As the lender of rows.

    @property
    def token_bytes(self) -> int:
        return self._buffers.token_bytes

    def read(self, slots: Slots) -> LayerRows:
        return self._buffers.read(slots)

    def pin(self, rows: TokenRows) -> None:
        with self.lock:
            self._table.incref(rows.slots)
            self._pins[rows.slots] += 1
            self._rows[rows] = None

    def unpin(self, rows: TokenRows) -> None:
        with self.lock:
            del self._rows[rows]
            self._pins[rows.slots] -= 1
            self._table.decref(rows.slots)

    # When cells are needed.

    def spill_one(self, going: Eviction | None = None, keep: Iterable[TokenRows] = ()) -> bool:
        """Let the eldest, but for `keep`, leave that are in the way; False if none are.

        They are if no sequence holds one of their cells, those that will be `going` aside.
        """
        kept, held = set(keep), self._table.referenced_by_others(self._pins, going)
        for rows in self._rows:
            if rows not in kept and not held[rows.slots].all():
                rows.to_host()
                return True
        return False

    def spill(self, cells: Int32s | None = None) -> None:
        """Let all leave that keep one of `cells`, which are to be changed; None: all."""
        for rows in list(self._rows):
            if cells is None or np.isin(rows.slots, cells).any():
                rows.to_host()

    def save_pins(self) -> dict[TokenRows, Slots]:
        """What is kept now, for :meth:`restore_pins`."""
        return {rows: rows.slots for rows in self._rows}

    def restore_pins(self, saved: dict[TokenRows, Slots]) -> None:
        """Let go, in a table that is as it was at `saved` again, of what has left since."""
        for rows in saved.keys() - self._rows.keys():
            self._table.decref(saved[rows])

    def unpin_in_copy(self, table: CellTable) -> None:
        """Take the snapshots of this cache from the holders in a copy of its table."""
        for rows in self._rows:
            table.decref(rows.slots)

    # Taking and putting back.

    def capture(self, sequence: int, start: int, stop: int) -> TokenRows:
        """What is held of positions ``[start, stop)``, with what was kept on schedule."""
        rows, retained = self._live(sequence, start, stop), self._retained.get(sequence)
        if retained is None:
            return rows
        new = (retained.positions >= start) & (retained.positions < stop)
        return rows.join(
            retained.take(np.flatnonzero(new & ~np.isin(retained.positions, rows.positions)))
        )

    def _live(self, sequence: int, start: int, stop: int) -> TokenRows:
        cells = self._table.cells_of(sequence)
        positions = self._table.positions[cells]
        inside = (positions >= start) & (positions < stop)
        return TokenRows.resident(positions[inside], self, cells[inside].astype(np.int64))

    def prepare_restore(self, sequence: int, parts: Sequence[TokenRows], position: int) -> Commit:
        """Let an empty sequence hold what it needs of `parts`, in order, to go on at `position`.

        Raises: ValueError if it is not empty, CacheFullError.
        """
        if self._table.cells_of(sequence).size:
            raise ValueError(f"what is restored goes to an empty sequence; {sequence} holds some.")
        chosen = [
            np.flatnonzero(self._visibility.needed(rows.positions, position)) for rows in parts
        ]
        while (lacking := self._lacking(parts, chosen)) > self._table.free:
            # Those that are put back leave last: what they have of it in cells needs none.
            if not self.spill_one(keep=parts) and not self.spill_one():
                raise CacheFullError(
                    f"restoring needs {lacking} free cells; {self._table.free} of "
                    f"{self._table.size} are free. Remove sequences."
                )
        arriving = self._arriving(parts, chosen)
        return lambda: self._restore(sequence, parts, chosen, arriving)

    def _lacking(self, parts: Sequence[TokenRows], chosen: Sequence[Slots]) -> int:
        pairs = zip(parts, chosen, strict=True)
        return sum(which.size for rows, which in pairs if rows.owner is not self)

    def _arriving(self, parts: Sequence[TokenRows], chosen: Sequence[Slots]) -> list[LayerRows]:
        """What has to be written of each of `parts`: nothing of those that are here."""
        found: list[LayerRows] = []
        for rows, which in zip(parts, chosen, strict=True):
            found.append({} if rows.owner is self or not which.size else rows.read(which))
            if found[-1]:
                self._buffers.check_rows(found[-1])
        return found

    def _restore(
        self,
        sequence: int,
        parts: Sequence[TokenRows],
        chosen: Sequence[Slots],
        arriving: Sequence[LayerRows],
    ) -> None:
        found = []
        for rows, which in zip(parts, chosen, strict=True):
            here = rows.owner is self
            found.append(rows.slots[which] if here else np.full(which.size, -1, np.int64))
        positions = [rows.positions[which] for rows, which in zip(parts, chosen, strict=True)]
        cells = self._table.assign(sequence, np.concatenate(positions), np.concatenate(found))
        for layers, slots in zip(arriving, _runs(cells, found), strict=True):
            self._buffers.enqueue_rows(slots, layers)

    # On schedule.

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        """Keep what going on at `positions` needs, from when they are written."""
        self._scheduled[sequence].update(positions)

    @property
    def scheduled(self) -> bool:
        """Whether :meth:`collect` has anything to do. Not while `paused`."""
        return bool(self._scheduled) and not self.paused

    def collect(self) -> None:
        """Keep what is complete: to be called before a pass lets go of anything."""
        for sequence, positions_due in list(self._scheduled.items()):
            complete = {
                each for each in positions_due if each <= self._table.next_position(sequence)
            }
            for position in sorted(complete):
                self._keep(sequence, position)
            positions_due.difference_update(complete)
            if not positions_due:
                del self._scheduled[sequence]

    def _keep(self, sequence: int, position: int) -> None:
        rows = self._live(sequence, self._visibility.lowest(position), position)
        retained = self._retained.pop(sequence, None)
        if retained is not None:
            new = ~np.isin(rows.positions, retained.positions)
            rows = _only(rows, new).join(retained)
        self._retained[sequence] = rows

    def forget(self, sequence: int, start: int) -> None:
        """Drop what was kept on schedule, and is due, from position `start` on."""
        positions_due = {each for each in self._scheduled.pop(sequence, ()) if each <= start}
        if positions_due:
            self._scheduled[sequence] = positions_due
        retained = self._retained.pop(sequence, None)
        if retained is not None:
            rows = _only(retained, retained.positions < start)
            if rows.positions.size:
                self._retained[sequence] = rows
            else:
                rows.close()


def _only(rows: TokenRows, which: npt.NDArray[np.bool_]) -> TokenRows:
    """Those of `rows` for which `which` is true, instead of all."""
    chosen = rows.take(np.flatnonzero(which))
    rows.close()
    return chosen


def _runs(cells: Slots, like: Sequence[Slots]) -> list[Slots]:
    """`cells` cut into pieces as long as those of `like`."""
    return np.split(cells, np.cumsum([each.size for each in like])[:-1])
