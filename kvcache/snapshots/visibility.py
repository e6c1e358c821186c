"""The one rule of attention: what a token at a position sees, and what going on there needs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcache._types import Bools, Int32s
from kvcache.backends import Array


class Visibility(NamedTuple):
    """A sliding window, chunks, or both, with attention sinks. Positions count from 0.

    window: tokens right before a position that it sees, itself aside; None for all.
    chunk: a position sees none of earlier chunks of this many positions; None for no chunks.
    sinks: the first so many positions, seen by every later one (StreamingLLM, 2309.17453).

    A cache may have to hold more than the next token sees: a ring, for one, holds a full window.
    It then has two of these, one for its masks and one for going on.
    """

    window: int | None = None
    chunk: int | None = None
    sinks: int = 0

    # Seeing.

    def lowest(self, positions: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        """Return the lowest position that each of `positions` sees, sinks aside."""
        lows = np.zeros_like(positions)
        if self.window is not None:
            lows = np.maximum(lows, positions - self.window)
        if self.chunk is not None:
            lows = np.maximum(lows, positions - positions % self.chunk)
        return lows

    def sees(self, queries: Array, columns: Array, sinks: Array | None = None) -> Array:
        """Return a bool array: which positions in `columns` each of `queries` sees.

        queries, columns: positions, which broadcast: on the host, or traced in a compiled
            program. A column of -1 is padding, which nobody sees.
        sinks: a traced number of sinks, instead of that of this rule.
        """
        visible = columns <= queries
        if self.window is not None:
            visible = visible & (columns >= queries - self.window)
        if self.chunk is not None:
            visible = visible & (columns >= queries - queries % self.chunk)
        if sinks is not None or self.sinks:
            first = self.sinks if sinks is None else sinks
            visible = visible | ((columns < first) & (columns <= queries))
        return visible & (columns >= 0)

    # Going on.

    @property
    def resumable_anywhere(self) -> bool:
        """Whether holding all positions before one suffices to go on there, wherever it lies."""
        return self.window in (None, 0)

    def lowest_needed(self, position: int) -> int:
        """Return the lowest position that must be held to go on at `position`, sinks aside.

        With chunks that is at least the last token, also at the edge of a chunk: a sequence
        knows its position from the last token that it holds.
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
        """Return which of `positions` must be held to go on at `position`."""
        recent = (positions >= self.lowest_needed(position)) & (positions < position)
        return recent | (positions < min(self.sinks, position))

    def last_resumable(self, positions: Int32s, limit: int) -> int:
        """Return the last position up to `limit` to go on at if just `positions` are held.

        positions: ascending. Returns 0 if there is no such position.
        """
        held = positions[: int(np.searchsorted(positions, limit))]
        if self.window == 0:
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
