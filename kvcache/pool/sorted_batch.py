"""A batch in the order of its sequences, as the table of cells takes it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvcache._types import Indices, Int32s


class SortedBatch(NamedTuple):
    """A batch sorted by sequence and position: each sequence is one run of it."""

    order: Indices
    """Batch index of every sorted token."""
    positions: Int32s
    sequences: Int32s
    """Sorted."""
    ids: Int32s
    """The sequences that occur, once each, ascending."""
    starts: Indices
    """First token of the run of each."""
    counts: Indices
    """Tokens of the run of each."""
    inserts: bool = False
    """Whether a token comes before others that its sequence holds already."""

    @property
    def single(self) -> bool:
        """Whether every sequence has one token."""
        return self.ids.size == self.positions.size


def sorted_batch(positions: Int32s, sequences: Int32s) -> SortedBatch:
    """Sort a batch by sequence and position; a decode step in order needs no sorting."""
    if positions.size == 1:
        one = np.zeros(1, np.int64)
        return SortedBatch(one, positions, sequences, sequences, one, one + 1)
    if (sequences[1:] > sequences[:-1]).all():  # a decode step: one token each, in order
        order = np.arange(positions.size)
        return SortedBatch(order, positions, sequences, sequences, order, np.ones_like(order))
    order = np.lexsort((positions, sequences))
    sequences = sequences[order]
    starts = np.flatnonzero(np.diff(sequences, prepend=-1))
    counts = np.diff(starts, append=sequences.size)
    return SortedBatch(order, positions[order], sequences, sequences[starts], starts, counts)
