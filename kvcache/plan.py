"""What a forward pass does to the buffers, decided on the host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvcache.backends import Backend, CacheConfig
from kvcache.backends.base import Array
from kvcache.batch import Int32s
from kvcache.cells import CellTable

TOKEN_AXIS = {"htd": 1, "thd": 0, "hdt": 2}


@dataclass
class ForwardPlan:
    """Where a pass writes, what it reads, and who may see what.

    cells: cell of each token. start, stop: the range of cells that `get` returns.
    positions, sequences: of each token. window, chunk: limits of sight.
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

    def mask(self) -> npt.NDArray[np.bool_]:
        """``[tokens, stop - start]``, True = attend."""
        mask = np.zeros((self.cells.size, self.stop - self.start), np.bool_)
        if not self.stores:
            return mask
        lows = self._lowest_visible()
        for token, (sequence, position) in enumerate(
            zip(self.sequences.tolist(), self.positions.tolist(), strict=True)
        ):
            find = self.table.find
            first = find(sequence, int(lows[token]))
            row = self.table.row(sequence)
            last = row.size if token in self.ahead else find(sequence, position + 1)
            mask[token, row[first:last] - self.start] = True
        return mask

    def _lowest_visible(self) -> Int32s:
        """Lowest position that each token may see."""
        lows = np.zeros_like(self.positions)
        if self.window is not None:
            lows = np.maximum(lows, self.positions - (self.window - 1))
        if self.chunk is not None:
            lows = np.maximum(lows, self.positions - self.positions % self.chunk)
        return lows


def device_mask(backend: Backend, config: CacheConfig, visible: npt.NDArray[np.bool_]) -> Array:
    """`visible` on the device, in the dtype that the config asks for."""
    if config.mask_dtype == "bool":
        return backend.from_host(visible)
    return backend.from_host(np.where(visible, 0.0, -np.inf), config.mask_dtype)
