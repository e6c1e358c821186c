"""Resume points of one sequence: where snapshots must be able to go on, and the rows for that.

A sliding window, a ring or a chunk drops tokens that going on at an earlier position needs.
Positions scheduled here have those rows retained, right before they would be dropped.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .rows import TokenRows


class ResumePoints:
    """Positions scheduled, and rows retained for positions that were passed. Owns the rows."""

    def __init__(self, scheduled: Iterable[int] = ()) -> None:
        self.scheduled = set(scheduled)
        self.retained: TokenRows | None = None

    def schedule(self, positions: Iterable[int]) -> None:
        """Retain what going on at `positions` needs, from when they are reached."""
        self.scheduled.update(positions)

    def due(self, reached: int) -> list[int]:
        """Return the scheduled positions up to `reached`, ascending."""
        return sorted(position for position in self.scheduled if position <= reached)

    def retain(self, position: int, rows: TokenRows) -> None:
        """Retain `rows`, all that going on at `position` needs; it is no longer scheduled then."""
        if self.retained is not None:
            new = ~np.isin(rows.positions, self.retained.positions)
            rows = rows.narrowed(new).join(self.retained)
        self.retained = rows
        self.scheduled.discard(position)

    def add_to(self, rows: TokenRows, start: int, stop: int) -> TokenRows:
        """Return `rows`, which are closed, with the retained ones of ``[start, stop)``."""
        if self.retained is None:
            return rows
        positions = self.retained.positions
        new = (positions >= start) & (positions < stop) & ~np.isin(positions, rows.positions)
        return rows.join(self.retained.take(np.flatnonzero(new)))

    def forget(self, position: int) -> None:
        """Drop the retained rows of `position` and behind it; the schedule stays."""
        if self.retained is None:
            return
        kept = self.retained.narrowed(self.retained.positions < position)
        self.retained = kept if kept.positions.size else None
        if self.retained is None:
            kept.close()  # its owner still knows it

    def unschedule(self, position: int) -> None:
        """Take back what is scheduled behind `position`."""
        self.scheduled = {scheduled for scheduled in self.scheduled if scheduled <= position}
