"""Batches sorted by sequence, the form for the table of cells."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvcache._reductions import all_of
from kvcache._types import Indices, Int32s


class SortedBatch(NamedTuple):
    """A batch sorted by sequence and position: each sequence is one run of it."""

    order: Indices
    """Batch index of each sorted token."""
    positions: Int32s
    sequences: Indices
    """Of each sorted token. Like all numbers here that arrays are indexed by, int64, to which NumPy
    would convert others at each use."""
    ids: Indices
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
    ids = sequences.astype(np.int64)
    if all_of(ids[1:] > ids[:-1]):  # one token per sequence, in order: the usual decode step
        order = np.arange(ids.size)
        return SortedBatch(order, positions, ids, ids, order, np.ones(ids.size, np.int64))
    order = np.lexsort((positions, ids))
    ids = ids[order]
    starts = np.flatnonzero(np.diff(ids, prepend=-1))
    counts = np.diff(starts, append=ids.size)
    return SortedBatch(order, positions[order], ids, ids[starts], starts, counts)
