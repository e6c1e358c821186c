"""What a forward pass does to the buffers, decided on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcache._types import Int32s
from kvcache.backends import Array

from .cells import CellTable

PoolState: TypeAlias = Mapping[int, tuple[Array, ...]]
"""Keys and values of every layer, by its number; keys alone where it has no values."""


class ForwardPlan(NamedTuple):
    """A pass as arrays of the cache's backend: a pytree, an argument of compiled programs.

    :mod:`kvcache.functional` applies it. From :meth:`CausalCache.plan_steps` every leaf has one
    more axis in front, the steps, as ``lax.scan`` wants it.
    """

    cells: Array
    """int32 [tokens]: where each token is written."""
    start: Any
    """First cell of the range that is read; an integer, or an array that holds one."""
    mask: Array
    """[tokens, history]: what each token sees of the range, which is as long as this is wide."""
    keys: Array
    """No keys at all, in the layout and dtype of the cache's: length 0 on the axis of tokens."""
    values: Array
    """Likewise, of values."""


@dataclass
class Pass:
    """Where a pass writes, what it reads, and who may see what, on the host.

    cells: cell of each token. start, stop: the range of cells that `get` returns.
    positions, sequences: of each token. window, chunk: limits of visibility.
    ahead: batch indices that may see tokens after them.
    """

    table: CellTable
    cells: Int32s
    start: int
    stop: int
    positions: Int32s
    sequences: Int32s
    window: int | None
    chunk: int | None
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
        """The cells that each token may see, as the table is now."""
        lows, find = self._lowest_visible().tolist(), self.table.find
        each = zip(self.sequences.tolist(), self.positions.tolist(), lows, strict=True)
        for token, (sequence, position, low) in enumerate(each):
            row = self.table.cells_of(sequence)
            last = row.size if token in self.ahead else find(sequence, position + 1)
            yield row[find(sequence, low) : last]

    def mask(self) -> npt.NDArray[np.bool_]:
        """``[tokens, stop - start]``, True = attend."""
        mask = np.zeros((self.cells.size, self.stop - self.start), np.bool_)
        if self.stores:
            for token, cells in enumerate(self.visible()):
                mask[token, cells - self.start] = True
        return mask

    def _lowest_visible(self) -> Int32s:
        """Lowest position that each token may see."""
        lows = np.zeros_like(self.positions)
        if self.window is not None:
            lows = np.maximum(lows, self.positions - (self.window - 1))
        if self.chunk is not None:
            lows = np.maximum(lows, self.positions - self.positions % self.chunk)
        return lows
