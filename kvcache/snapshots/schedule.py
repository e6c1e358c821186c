"""Resume points of one sequence: positions for snapshots to resume at, and their rows.

Resuming at an earlier position needs tokens that a sliding window or a ring has dropped by then.
For positions scheduled here, these rows are retained just before they would be dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from kvcache._interrupts import uninterrupted
from kvcache._types import Bools
from kvcache.storage.arrays import LayerArrays

from .rows import TokenRows, exchange


class ResumePoints:
    """Scheduled positions, and rows retained for positions already passed. Owns the rows."""

    def __init__(self, scheduled: Iterable[int] = ()) -> None:
        self.scheduled = set(scheduled)
        self.retained: TokenRows | None = None
        self._passed: set[int] = set()  # positions whose rows were retained

    def schedule(self, positions: Iterable[int]) -> None:
        """Add `positions`: their rows are to be retained once they are reached."""
        self.scheduled = self.scheduled.union(positions)

    def due(self, reached: int) -> list[int]:
        """Return the scheduled positions up to `reached`, ascending."""
        return sorted(position for position in self.scheduled if position <= reached)

    def retain(self, position: int, rows: TokenRows) -> None:
        """Retain `rows`, all those needed to resume at `position`, and unschedule it.

        Owns `rows` from then on. If this raises, they are closed, and nothing is retained. Callers
        hold interrupts back from before they take the rows.
        """
        retained = self.retained
        try:
            if retained is not None:
                # Windows of neighbouring points overlap: keep a row once.
                new = ~np.isin(rows.positions, retained.positions)
                rows = exchange([rows, retained], partial(_joined, retained, rows, new), _only)
        except BaseException:
            rows.close()
            raise
        self.retained, self.scheduled = rows, self.scheduled - {position}
        self._passed = self._passed | {position}

    def add_to(self, rows: TokenRows, start: int, stop: int) -> TokenRows:
        """Return `rows` with the retained ones of ``[start, stop)``; close `rows` in any case."""
        retained = self.retained
        if retained is None:
            return rows
        positions = retained.positions
        new = (positions >= start) & (positions < stop) & ~np.isin(positions, rows.positions)
        try:
            return exchange([rows], partial(_joined, rows, retained, new), _only)
        except BaseException:
            rows.close()
            raise

    def forget(self, position: int) -> None:
        """Drop the rows retained from `position` on; the schedule stays."""
        retained = self.retained
        if retained is None:
            return
        kept = np.flatnonzero(retained.positions < position)
        # An object without rows goes as well, if it was made for a point that needs none: its owner
        # would list it as pinned.
        if not kept.size or kept.size < retained.positions.size:
            make = (lambda: [retained.take(kept)]) if kept.size else tuple
            with uninterrupted():
                rows = exchange([retained], make, tuple)
                self.retained = rows[0] if rows else None

    def convert(self, change: Callable[[LayerArrays], LayerArrays]) -> None:
        """Replace the arrays of each layer of what is retained, which goes to host memory."""
        if (retained := self.retained) is None:
            return
        layers = {layer: change(arrays) for layer, arrays in retained.content().items()}
        selected = TokenRows(retained.positions, layers)
        with uninterrupted():
            self.retained = selected
            retained.close()

    def take_back(self, position: int) -> None:
        """Drop the rows retained from `position` on, and schedule the points after it again."""
        self.forget(position)
        again = {passed for passed in self._passed if passed > position}
        self.scheduled = self.scheduled | again
        self._passed = self._passed - again

    def unschedule(self, position: int) -> None:
        """Forget the positions after `position`, scheduled or passed."""
        self.scheduled = {scheduled for scheduled in self.scheduled if scheduled <= position}
        self._passed = {passed for passed in self._passed if passed <= position}

    def savepoint(self) -> Callable[[], None]:
        """Return a function that makes the schedule and the retained rows what they are now."""
        scheduled, retained, passed = self.scheduled, self.retained, self._passed
        undo_rows = None if retained is None else retained.savepoint()

        def undo() -> None:
            self.scheduled, self.retained, self._passed = scheduled, retained, passed
            if undo_rows is not None:
                undo_rows()

        return undo


def _joined(one: TokenRows, two: TokenRows, new: Bools) -> list[TokenRows]:
    return [one.joined(two, new)]


def _only(made: list[TokenRows]) -> TokenRows:
    """Return the one object made."""
    return made[0]
