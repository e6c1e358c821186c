"""Positions that a sequence holds already, or that occur twice in a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvcache._reductions import any_of

from .sorted_batch import SortedBatch

if TYPE_CHECKING:
    from .cells import CellTable


def refuse_repeats(table: CellTable, groups: SortedBatch) -> bool:
    """Return whether a token comes before the last one stored of its sequence.

    Raises: ValueError for a position stored already, or occurring twice.
    """
    positions, sequences, starts = groups.positions, groups.sequences, groups.starts
    if not groups.single:
        repeated = (positions[1:] == positions[:-1]) & (sequences[1:] == sequences[:-1])
        if any_of(repeated):
            token = int(np.argmax(repeated))
            raise ValueError(
                f"position {positions[token]} of sequence {sequences[token]} occurs twice."
            )
    # Only a token at or before the end of its sequence can repeat a stored position.
    last = table.last[groups.ids]
    filled = last > table.first[groups.ids]
    ends = table.positions.take(table.rows[groups.ids, last - 1])
    inserts = filled & (positions[starts] <= ends)
    if not any_of(inserts):
        return False
    for group in np.flatnonzero(inserts):
        _refuse_stored(table, groups, int(group))
    return True


def _refuse_stored(table: CellTable, groups: SortedBatch, group: int) -> None:
    """Raise ValueError if a position of one sequence in the batch is stored already."""
    start, sequence = groups.starts[group], int(groups.ids[group])
    wanted = groups.positions[start : start + groups.counts[group]]
    stored = np.isin(wanted, table.positions[table.cells_of(sequence)])
    if stored.any():
        raise ValueError(
            f"sequence {sequence} holds position {wanted[stored][0]} already. Remove it first."
        )
