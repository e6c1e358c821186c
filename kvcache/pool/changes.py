"""Records of changes to a table of cells: what is to be dropped, and how to take it back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvcache._types import Indices, Int32s


class Eviction(NamedTuple):
    """Cells to drop: the `counts` oldest cells of each sequence in `ids`."""

    ids: Int32s
    counts: Indices


class Dropped(NamedTuple):
    """Cells evicted for a pass, each with its sequence and position; ascending by sequence."""

    sequences: Sequence[int] | Int32s
    cells: Sequence[int] | Int32s
    positions: Sequence[int] | Int32s


class RowEnds(NamedTuple):
    """The rows of a table as they were: the array of rows, and first and last of each."""

    rows: Int32s
    first: Indices
    last: Indices
