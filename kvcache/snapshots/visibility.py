"""The rule of attention: tokens visible from a position, and tokens needed to resume there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcache._types import Bools, Int32s
from kvcache.backends import Array


class Visibility(NamedTuple):
    """A sliding window, chunks, or both, with attention sinks. Positions count from 0.

    window: number of tokens visible right before a position, itself excluded; None for all.
    chunk: a position sees only its own chunk of so many positions; None for no chunks.
    sinks: number of first positions visible to every later one (StreamingLLM, arXiv:2309.17453).

    A cache may have to hold more than the next token sees; a ring, for example, holds a full
    window. It then has two rules, one for its masks and one for resuming.
    """

    window: int | None = None
    chunk: int | None = None
    sinks: int = 0

    # Seeing.

    def lowest(self, positions: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        """Return the lowest position visible to each of `positions`, sinks aside."""
        lows = np.zeros_like(positions)
        if self.window is not None:
            lows = np.maximum(lows, positions - self.window)
        if self.chunk is not None:
            lows = np.maximum(lows, positions - positions % self.chunk)
        return lows

    def sees(self, queries: Array, columns: Array, sinks: Array | None = None) -> Array:
        """Return a bool array, true where a position in `queries` sees one in `columns`.

        queries, columns: positions, broadcast against each other; on the host, or traced in a
            compiled program. A column of -1 is padding, and never visible.
        sinks: a traced number of sinks, instead of that of this rule.
        """
        # Operators only, no functions: the same code runs on NumPy arrays and under any tracer.
        visible = columns <= queries
        if self.window is not None:
            visible = visible & (columns >= queries - self.window)
        if self.chunk is not None:
            visible = visible & (columns >= queries - queries % self.chunk)
        if sinks is not None or self.sinks:
            first = self.sinks if sinks is None else sinks
            visible = visible | ((columns < first) & (columns <= queries))
        return visible & (columns >= 0)

    # Resuming.

    @property
    def resumable_anywhere(self) -> bool:
        """True if no window drops tokens: a prefix of any length can be resumed at its end."""
        return self.window in (None, 0)

    def lowest_needed(self, position: int) -> int:
        """Return the lowest position to hold in order to resume at `position`, sinks aside.

        With chunks, the last token is needed even at the edge of a chunk: a sequence knows its
        position from the last token that it holds.
        """
        if self.window is None and self.chunk is None:
            return 0
        low = min(self.sinks, position)
        if self.window is not None:
            low = max(low, position - self.window)
        if self.chunk is not None:
            low = max(low, min(position - position % self.chunk, position - 1))
        return low

    def needed(self, positions: Int32s, position: int) -> Bools:
        """Return a mask of the `positions` to hold in order to resume at `position`."""
        recent = (positions >= self.lowest_needed(position)) & (positions < position)
        return recent | (positions < min(self.sinks, position))

    def lowest_needed_by(self, points: Int32s) -> Int32s:
        """Return :meth:`lowest_needed` of each of `points`; ascending where these are."""
        if self.window is None and self.chunk is None:
            return np.zeros_like(points)
        lows = np.minimum(self.sinks, points)
        if self.window is not None:
            lows = np.maximum(lows, points - self.window)
        if self.chunk is not None:
            lows = np.maximum(lows, np.minimum(points - points % self.chunk, points - 1))
        return lows

    def needed_by(self, positions: Int32s, points: Int32s) -> Bools:
        """Return a mask of the `positions` to hold in order to resume at any of `points`.

        points: ascending, one at least.
        """
        # Of the points behind a position the first needs it, if any does.
        first = np.searchsorted(points, positions, side="right")
        lows = np.append(self.lowest_needed_by(points), np.iinfo(np.int32).max)
        return (positions >= lows[first]) | (positions < min(self.sinks, int(points[-1])))

    def resumable_at(self, positions: Int32s, points: Int32s, start: int) -> Bools:
        """Return a mask of the `points` to resume at if just `positions` are held, and all before.

        positions: ascending, from `start` on. points: behind it.
        """
        lows = np.maximum(self.lowest_needed_by(points), start)
        held = np.searchsorted(positions, points) - np.searchsorted(positions, lows)
        sinks = np.minimum(self.sinks, points)
        lacking = np.searchsorted(positions, sinks) < sinks - start
        resumable: Bools = (held == points - lows) & ~lacking
        return resumable

    def last_resumable(self, positions: Int32s, limit: int) -> int:
        """Return the last position up to `limit` to resume at if just `positions` are held.

        positions: ascending. Return 0 if there is no such position.
        """
        held = positions[: int(np.searchsorted(positions, limit))]
        if self.window == 0:  # no earlier token is needed (encoder output)
            return limit
        if not held.size:
            return 0
        breaks = np.flatnonzero(np.diff(held) != 1)
        starts = held[np.concatenate([[0], breaks + 1])].tolist()
        stops = (held[np.concatenate([breaks, [held.size - 1]])] + 1).tolist()
        sinks_held = stops[0] if starts[0] == 0 else 0
        for start, stop in zip(reversed(starts), reversed(stops), strict=True):
            # The lowest position needed grows with the position, so the end of a run decides.
            if self.lowest_needed(stop) >= start and sinks_held >= min(self.sinks, stop):
                return int(stop)
        return 0
