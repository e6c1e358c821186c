"""Batches sorted by sequence, the form for the table of cells."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvcache._types import Indices, Int32s


class SortedBatch(NamedTuple):
    """A batch sorted by sequence and position: each sequence is one run of it."""

    order: Indices
    """Batch index of each sorted token."""
    positions: Int32s
    sequences: Int32s
    """Of each sorted token."""
    ids: Int32s
    """Sequences in the batch, once each, ascending."""
    starts: Indices
    """First sorted token of each of `ids`."""
    counts: Indices
    """Number of tokens of each of `ids`."""
    inserts: bool = False
    """True if a token lies before others already held by its sequence."""

    @property
    def single(self) -> bool:
        """True if every sequence has just one token."""
        return self.ids.size == self.positions.size


def sorted_batch(positions: Int32s, sequences: Int32s) -> SortedBatch:
    """Sort a batch by sequence and position."""
    # The two usual decode steps come first: both are sorted already.
    if positions.size == 1:
        one = np.zeros(1, np.int64)
        return SortedBatch(one, positions, sequences, sequences, one, one + 1)
    if (sequences[1:] > sequences[:-1]).all():  # one token per sequence, in order
        order = np.arange(positions.size)
        return SortedBatch(order, positions, sequences, sequences, order, np.ones_like(order))
    order = np.lexsort((positions, sequences))
    sequences = sequences[order]
    starts = np.flatnonzero(np.diff(sequences, prepend=-1))
    counts = np.diff(starts, append=sequences.size)
    return SortedBatch(order, positions[order], sequences, sequences[starts], starts, counts)
