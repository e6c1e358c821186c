"""Resume points of one sequence: positions for snapshots to resume at, and their rows.

Resuming at an earlier position needs tokens that a sliding window or a ring has dropped by then.
For positions scheduled here, these rows are retained just before they would be dropped.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .rows import TokenRows


class ResumePoints:
    """Scheduled positions, and rows retained for positions already passed. Owns the rows."""

    def __init__(self, scheduled: Iterable[int] = ()) -> None:
        self.scheduled = set(scheduled)
        self.retained: TokenRows | None = None
        self._passed: set[int] = set()  # positions whose rows were retained

    def schedule(self, positions: Iterable[int]) -> None:
        """Add `positions`: their rows are to be retained once they are reached."""
        self.scheduled.update(positions)

    def due(self, reached: int) -> list[int]:
        """Return the scheduled positions up to `reached`, ascending."""
        return sorted(position for position in self.scheduled if position <= reached)

    def retain(self, position: int, rows: TokenRows) -> None:
        """Retain `rows`, all those needed to resume at `position`, and unschedule it."""
        if self.retained is not None:  # windows of neighbouring points overlap: keep a row once
            new = ~np.isin(rows.positions, self.retained.positions)
            rows = rows.narrowed(new).join(self.retained)
        self.retained = rows
        self.scheduled.discard(position)
        self._passed.add(position)

    def add_to(self, rows: TokenRows, start: int, stop: int) -> TokenRows:
        """Return `rows` together with the retained ones of ``[start, stop)``; close `rows`."""
        if self.retained is None:
            return rows
        positions = self.retained.positions
        new = (positions >= start) & (positions < stop) & ~np.isin(positions, rows.positions)
        return rows.join(self.retained.take(np.flatnonzero(new)))

    def forget(self, position: int) -> None:
        """Drop the rows retained from `position` on; the schedule stays."""
        if self.retained is None:
            return
        kept = self.retained.narrowed(self.retained.positions < position)
        self.retained = kept if kept.positions.size else None
        if self.retained is None:
            kept.close()  # even without rows, its owner still lists it as pinned

    def take_back(self, position: int) -> None:
        """Drop the rows retained from `position` on, and schedule the points after it again."""
        self.forget(position)
        again = {passed for passed in self._passed if passed > position}
        self.scheduled |= again
        self._passed -= again

    def unschedule(self, position: int) -> None:
        """Remove scheduled positions after `position`."""
        self.scheduled = {scheduled for scheduled in self.scheduled if scheduled <= position}
