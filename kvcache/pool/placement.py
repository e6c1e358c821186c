"""The rules for the cells of a sequence: in this base, any free cells will do."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvcache._types import Bools, Indices, Int32s

from .changes import Eviction
from .rows import PendingRows
from .sorted_batch import SortedBatch


def ranges(starts: Indices, counts: Indices) -> Indices:
    """Return ``[starts[i], starts[i] + counts[i])`` for every i, one after the other."""
    behind = np.cumsum(counts)
    joined: Indices = np.arange(int(behind[-1])) + np.repeat(starts - behind + counts, counts)
    return joined


class TailCopy(NamedTuple):
    """Tokens to move to a page of their own before a pass, because their page is not to be written.

    The last cells of each sequence in `ids`, from column `starts` of its row on.
    """

    ids: Indices
    starts: Indices
    counts: Indices
    cells: Int32s
    """The cells that they are in, sequence by sequence."""

    @property
    def places(self) -> tuple[Indices, Indices]:
        """Rows and columns of :attr:`cells`."""
        return np.repeat(self.ids, self.counts), ranges(self.starts, self.counts)

    def put_back(self, rows: Int32s) -> None:
        """Write the cells to where they were in `rows`, those of all sequences."""
        rows[self.places] = self.cells


class Moved(NamedTuple):
    """Tokens that a pass moved to other cells, and their rows, queued to be written there."""

    tails: TailCopy
    rows: PendingRows


class Placement:
    """Rules for the cells of a sequence, of which a table with pages overrides all."""

    page = 1
    """Cells that are handed out together, a power of two."""

    def tails_to_copy(self, groups: SortedBatch, eviction: Eviction | None) -> TailCopy | None:
        """Return the tokens to move before a sorted batch is inserted, once `eviction` is dropped.

        They belong to sequences of the batch whose last page is partly taken by others.
        """
        return None

    def move_tails(self, copied: TailCopy) -> Int32s:
        """Move the tokens of `copied` to pages of their own; return their cells."""
        raise NotImplementedError

    def may_append(self, tail: int, held: int) -> bool:
        """Return whether a sequence of `held` tokens, the last in `tail`, goes on in that page."""
        return True

    def move_back(self, sequence: int, moved: Moved) -> bool:
        """Move the tokens of a sequence back, to cells that are intact; return whether it has them.

        To be called once its later tokens are gone.
        """
        raise NotImplementedError

    def check_removal(self, row: Int32s, removed: range) -> None:
        """Raise NotSupportedError unless the cells behind `removed` may stay where they are.

        row: cells of a sequence. removed: tokens of it, with others behind.
        """

    def joined(self, cells: Int32s, row: Int32s) -> Int32s:
        """Return the last ones of `cells` that may precede the cells `row` in a sequence."""
        return cells

    # For snapshots, restored to an empty sequence. Cells are -1 where a token is not in the pool.

    def shareable(self, cells: Indices, positions: Int32s) -> Bools:
        """Return a mask of `cells` that can be the sequence's own as they lie."""
        return cells >= 0

    def cells_needed(self, cells: Indices, positions: Int32s) -> int:
        """Return the number of free cells to take for tokens in `cells`, shared where possible."""
        return int(np.count_nonzero(cells < 0))

    def cells_freed(self, references: Int32s, cells: Indices) -> int:
        """Return the number of cells to hand out that `references` leaves of `cells`."""
        return int(np.count_nonzero(references[cells] == 0))
