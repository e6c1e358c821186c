"""Snapshots of sequences in a pool: which cells they keep, and when they have to leave."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from kvcache.errors import CacheFullError
from kvcache.snapshots.rows import Layers, Places, Rows, Sight

from .base import Commit
from .batch import Int32s
from .buffers import LayerBuffers
from .cells import CellTable, Eviction


class Residents:
    """Rows that stay in the cells of a pool.

    Each of their cells counts them as one more holder, so that no sequence is given it. When a
    pass needs cells that only they hold, the eldest move to the host.
    """

    def __init__(
        self, table: CellTable, buffers: LayerBuffers, sight: Sight, lock: threading.RLock
    ) -> None:
        self._table, self._buffers, self._sight, self.lock = table, buffers, sight, lock
        self._rows: dict[Rows, None] = {}
        self._pins = np.zeros(table.size, np.int32)  # by cell: how many of the rows keep it
        self.resting = False
        # By sequence: positions to keep the way to, and the rows kept so far.
        self._due: defaultdict[int, set[int]] = defaultdict(set)
        self._early: dict[int, Rows] = {}

    # As the lender of rows.

    @property
    def token_bytes(self) -> int:
        return self._buffers.token_bytes

    def read(self, places: Places) -> Layers:
        return self._buffers.read(places)

    def lend(self, rows: Rows) -> None:
        with self.lock:
            self._table.hold(rows.places)
            self._pins[rows.places] += 1
            self._rows[rows] = None

    def release(self, rows: Rows) -> None:
        with self.lock:
            del self._rows[rows]
            self._pins[rows.places] -= 1
            self._table.release(rows.places)

    # When cells are needed.

    def make_room(self, going: Eviction | None = None, keep: Iterable[Rows] = ()) -> bool:
        """Let the eldest, but for `keep`, leave that are in the way; False if none are.

        They are if no sequence holds one of their cells, those that will be `going` aside.
        """
        kept, held = set(keep), self._table.held_besides(self._pins, going)
        for rows in self._rows:
            if rows not in kept and not held[rows.places].all():
                rows.to_host()
                return True
        return False

    def leave(self, cells: Int32s | None = None) -> None:
        """Let all leave that keep one of `cells`, which are to be changed; None: all."""
        for rows in list(self._rows):
            if cells is None or np.isin(rows.places, cells).any():
                rows.to_host()

    def mark(self) -> dict[Rows, Places]:
        """What is kept now, for :meth:`return_to`."""
        return {rows: rows.places for rows in self._rows}

    def return_to(self, mark: dict[Rows, Places]) -> None:
        """Let go, in a table that is as it was at `mark` again, of what has left since."""
        for rows in mark.keys() - self._rows.keys():
            self._table.release(mark[rows])

    def leave_out_of(self, table: CellTable) -> None:
        """Take the snapshots of this cache from the holders in a copy of its table."""
        for rows in self._rows:
            table.release(rows.places)

    # Taking and putting back.

    def capture(self, sequence: int, start: int, stop: int) -> Rows:
        """What is held of positions ``[start, stop)``, with what was kept on schedule."""
        rows, early = self._live(sequence, start, stop), self._early.get(sequence)
        if early is None:
            return rows
        new = (early.positions >= start) & (early.positions < stop)
        return rows.join(
            early.take(np.flatnonzero(new & ~np.isin(early.positions, rows.positions)))
        )

    def _live(self, sequence: int, start: int, stop: int) -> Rows:
        cells = self._table.row(sequence)
        positions = self._table.positions[cells]
        inside = (positions >= start) & (positions < stop)
        return Rows.resident(positions[inside], self, cells[inside].astype(np.int64))

    def prepare_seat(self, sequence: int, parts: Sequence[Rows], position: int) -> Commit:
        """Let an empty sequence hold what it needs of `parts`, in order, to go on at `position`.

        Raises: ValueError if it is not empty, CacheFullError.
        """
        if self._table.row(sequence).size:
            raise ValueError(f"what is restored goes to an empty sequence; {sequence} holds some.")
        chosen = [np.flatnonzero(self._sight.needed(rows.positions, position)) for rows in parts]
        while (lacking := self._lacking(parts, chosen)) > self._table.free:
            # Those that are put back leave last: what they have of it in cells needs none.
            if not self.make_room(keep=parts) and not self.make_room():
                raise CacheFullError(
                    f"restoring needs {lacking} free cells; {self._table.free} of "
                    f"{self._table.size} are free. Remove sequences."
                )
        arriving = self._arriving(parts, chosen)
        return lambda: self._seat(sequence, parts, chosen, arriving)

    def _lacking(self, parts: Sequence[Rows], chosen: Sequence[Places]) -> int:
        pairs = zip(parts, chosen, strict=True)
        return sum(which.size for rows, which in pairs if rows.home is not self)

    def _arriving(self, parts: Sequence[Rows], chosen: Sequence[Places]) -> list[Layers]:
        """What has to be written of each of `parts`: nothing of those that are here."""
        found: list[Layers] = []
        for rows, which in zip(parts, chosen, strict=True):
            found.append({} if rows.home is self or not which.size else rows.read(which))
            if found[-1]:
                self._buffers.check_rows(found[-1])
        return found

    def _seat(
        self,
        sequence: int,
        parts: Sequence[Rows],
        chosen: Sequence[Places],
        arriving: Sequence[Layers],
    ) -> None:
        found = []
        for rows, which in zip(parts, chosen, strict=True):
            here = rows.home is self
            found.append(rows.places[which] if here else np.full(which.size, -1, np.int64))
        positions = [rows.positions[which] for rows, which in zip(parts, chosen, strict=True)]
        cells = self._table.seat(sequence, np.concatenate(positions), np.concatenate(found))
        for layers, places in zip(arriving, _runs(cells, found), strict=True):
            self._buffers.arrive(places, layers)

    # On schedule.

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        """Keep what going on at `positions` needs, from when they are written."""
        self._due[sequence].update(positions)

    @property
    def scheduled(self) -> bool:
        """Whether :meth:`collect` has anything to do. Not while `resting`."""
        return bool(self._due) and not self.resting

    def collect(self) -> None:
        """Keep what is complete: to be called before a pass lets go of anything."""
        for sequence, due in list(self._due.items()):
            complete = {each for each in due if each <= self._table.next_position(sequence)}
            for position in sorted(complete):
                self._keep(sequence, position)
            due.difference_update(complete)
            if not due:
                del self._due[sequence]

    def _keep(self, sequence: int, position: int) -> None:
        rows = self._live(sequence, self._sight.lowest(position), position)
        early = self._early.pop(sequence, None)
        if early is not None:
            new = ~np.isin(rows.positions, early.positions)
            rows = _only(rows, new).join(early)
        self._early[sequence] = rows

    def forget(self, sequence: int, begin: int) -> None:
        """Drop what was kept on schedule, and is due, from position `begin` on."""
        due = {each for each in self._due.pop(sequence, ()) if each <= begin}
        if due:
            self._due[sequence] = due
        early = self._early.pop(sequence, None)
        if early is not None:
            rows = _only(early, early.positions < begin)
            if rows.positions.size:
                self._early[sequence] = rows
            else:
                rows.close()


def _only(rows: Rows, which: npt.NDArray[np.bool_]) -> Rows:
    """Those of `rows` for which `which` is true, instead of all."""
    chosen = rows.take(np.flatnonzero(which))
    rows.close()
    return chosen


def _runs(cells: Places, like: Sequence[Places]) -> list[Places]:
    """`cells` cut into pieces as long as those of `like`."""
    return np.split(cells, np.cumsum([each.size for each in like])[:-1])
