"""Records of changes to a table of cells: what is to be dropped, and how to take it back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvcache._types import Indices, Int32s


class Eviction(NamedTuple):
    """Cells to drop: the `counts` oldest cells of each sequence in `ids`."""

    ids: Indices
    counts: Indices


class Dropped(NamedTuple):
    """Cells evicted for a pass, each with its sequence and position."""

    sequences: Indices | Int32s
    cells: Int32s
    positions: Int32s

    def as_arrays(self) -> Dropped:
        """Return the cells themselves."""
        return self


class DroppedCell(NamedTuple):
    """The one cell evicted by a step of one token: without arrays, which cost time to make."""

    sequence: int
    cell: int
    position: int

    def as_arrays(self) -> Dropped:
        """Return the cell as arrays of one element."""
        return Dropped(*(np.array([number], np.int32) for number in self))


class RowEnds(NamedTuple):
    """The rows of a table as they were: the array of rows, and first and last of each."""

    rows: Int32s
    first: Indices
    last: Indices
