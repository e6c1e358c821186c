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
    """int32 [tokens]: the cell that each token is written to."""
    start: TracedIndex
    """First cell of the range that is read; an integer, or an array that holds one."""
    mask: Array
    """[tokens, history]: what each token sees of the range, which is as long as this is wide."""
    key_like: Array
    """Empty keys in the layout and dtype of the cache: length 0 on the axis of tokens."""
    value_like: Array
    """Likewise, of values."""

    @property
    def prototypes(self) -> tuple[Array, ...]:
        """One empty array like each of those of a layer, in their order."""
        return self.key_like, self.value_like


@dataclass
class Pass:
    """A forward pass on the host: the cells it writes, the range it reads, and who sees what.

    cells: cell of each token. start, stop: the range of cells that `get` returns.
    positions, sequences: of each token. visibility: of a token, before it in its sequence.
    stores: False for a reserve pass, which only allocates. ahead: batch indices that see the
    tokens behind them, too.
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
        """First of the cells if they follow each other, else None."""
        cells = self.cells
        if cells.size == 1:
            return int(cells[0])
        return int(cells[0]) if (np.diff(cells) == 1).all() else None

    def visible(self) -> Iterator[Int32s]:
        """Yield the cells that each token may see, as the table is now."""
        lows = self.visibility.lowest(self.positions).tolist()
        tokens = zip(self.sequences.tolist(), self.positions.tolist(), lows, strict=True)
        find = self.table.find
        for token, (sequence, position, low) in enumerate(tokens):
            cells = self.table.cells_of(sequence)
            last = cells.size if token in self.ahead else find(sequence, position + 1)
            yield cells[find(sequence, low) : last]

    def mask(self) -> Bools:
        """Return ``[tokens, stop - start]``, True = attend."""
        mask = np.zeros((self.cells.size, self.stop - self.start), np.bool_)
        if self.stores:
            for token, cells in enumerate(self.visible()):
                mask[token, cells - self.start] = True
        return mask
