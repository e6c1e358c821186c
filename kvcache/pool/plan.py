"""The effect of a forward pass on the buffers, decided on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np

from kvcache._types import Bools, Int32s
from kvcache.backends import Array
from kvcache.backends.arrays import TracedIndex
from kvcache.snapshots.visibility import Visibility

from .cells import CellTable

PoolState: TypeAlias = Mapping[int, tuple[Array, ...]]
"""The arrays of every layer, by its number: keys and values, or keys alone."""


class ForwardPlan(NamedTuple):
    """A pass as arrays of the cache's backend: a pytree, an argument of compiled programs.

    :mod:`kvcache.functional` applies it. From :meth:`CausalCache.plan_steps` every leaf has one
    more axis in front, the steps, as ``lax.scan`` wants it.
    """

    cells: Array
    """int32 [tokens]: the cell of each token."""
    start: TracedIndex
    """First cell of the range read: an integer, or an integer array of shape []."""
    mask: Array
    """[tokens, history]: visibility of the cells of the range, which is as long as this is wide."""
    key_like: Array
    """Empty keys in the layout and dtype of the cache: length 0 on the axis of tokens."""
    value_like: Array
    """Empty values, likewise."""

    @property
    def prototypes(self) -> tuple[Array, ...]:
        """An empty array like each array of a layer, in order."""
        return self.key_like, self.value_like


@dataclass
class Pass:
    """A forward pass on the host: the cells written, the range read, and the visibility.

    cells: cell of each token, int32 [tokens].
    start, stop: the range of cells returned by `get`.
    positions, sequences: of each token, int32 [tokens].
    visibility: rule for the earlier tokens of its sequence that a token sees.
    stores: False for a reserve pass, which only allocates.
    ahead: batch indices of tokens that see later tokens as well.
    """

    table: CellTable
    cells: Int32s
    start: int
    stop: int
    positions: Int32s
    sequences: Int32s
    visibility: Visibility
    stores: bool = True
    ahead: frozenset[int] = frozenset()

    @cached_property
    def first_cell(self) -> int | None:
        """First cell if the cells are consecutive, else None: a write is then a slice."""
        cells = self.cells
        if cells.size == 1:
            return int(cells[0])
        return int(cells[0]) if (np.diff(cells) == 1).all() else None

    def visible(self) -> Iterator[Int32s]:
        """Yield the cells visible to each token, by the current state of the table."""
        lows = self.visibility.lowest(self.positions).tolist()
        tokens = zip(self.sequences.tolist(), self.positions.tolist(), lows, strict=True)
        find = self.table.find
        for token, (sequence, position, low) in enumerate(tokens):
            cells = self.table.cells_of(sequence)
            last = cells.size if token in self.ahead else find(sequence, position + 1)
            yield cells[find(sequence, low) : last]

    def mask(self) -> Bools:
        """Return the mask, bool ``[tokens, stop - start]``, True = attend."""
        mask = np.zeros((self.cells.size, self.stop - self.start), np.bool_)
        if self.stores:  # a reserve pass has no cells of its own in the table
            for token, cells in enumerate(self.visible()):
                mask[token, cells - self.start] = True
        return mask
