"""Columns of keys and values returned by an update, and masks over them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kvcache._types import Bools, Int32s
from kvcache.backends import Array, Backend
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.lengths import round_up
from kvcache.storage.masks import device_mask

MOST_SPARE = 256
"""Slots beyond those held in buffers that are made for the tokens of a file."""


class Sizes(NamedTuple):
    """Sizes of growing buffers, and of the columns that an update returns of them.

    padding: of the backend. slices_are_views: whether it returns less than the whole buffer.
    unit: capacities are multiples of so many slots. limit: largest capacity; None for none.
    capacity: slots of the buffers.
    """

    padding: int = 1
    slices_are_views: bool = True
    unit: int = 1
    limit: int | None = None
    capacity: int = 0

    @classmethod
    def on(cls, backend: Backend, step: int, limit: int | None) -> Sizes:
        """Return the sizes of buffers not allocated yet."""
        padding = backend.config.padding
        most = None if limit is None else round_up(limit, padding)
        return cls(padding, backend.slices_are_views, math.lcm(step, padding), most)

    def padded(self, columns: int) -> int:
        """Return `columns` rounded up to the padding."""
        return round_up(columns, self.padding)

    def span(self, first: int, stop: int) -> tuple[int, int]:
        """Return the range of slots that is returned for ``[first, stop)``, padding included."""
        # Where a slice is a copy, returning the whole buffer is cheaper; the mask hides the rest.
        if not self.slices_are_views:
            return 0, self.capacity
        width = self.padded(stop - first)
        last = min(first + width, self.capacity)
        return last - width, last

    def grown(self, slots: int) -> Sizes:
        """Return the sizes once there is room for `slots` slots.

        Capacity grows by half at least, so that copying costs O(1) per token in the long run.
        """
        if slots <= self.capacity:
            return self
        return self._limited(round_up(max(slots, self.capacity * 3 // 2), self.unit))

    def fitted(self, slots: int) -> Sizes:
        """Return the sizes once there is room for `slots` slots, and for few more."""
        capacity = round_up(slots, self.unit)
        few = capacity - slots <= MOST_SPARE
        return self._limited(capacity if few else self.padded(slots))

    def _limited(self, capacity: int) -> Sizes:
        return self._replace(capacity=capacity if self.limit is None else min(capacity, self.limit))


def attention_mask(
    backend: Backend,
    rule: Visibility,
    queries: Int32s,
    columns: Int32s,
    padding: Int32s | None = None,
) -> Array | None:
    """Return the mask of `queries` over `columns`, positions both; -1 for a column of padding.

    padding: tokens that each row of the batch lacks on its left; the mask is then per row. A query
        before the first token of its row sees itself alone: softmax over nothing is NaN.

    None if every query sees every column.
    """
    visible: Bools = np.asarray(rule.sees(queries[:, None], columns))
    if padding is not None:
        own = queries[None, :, None] - padding[:, None, None]
        visible = np.asarray(rule.sees(own, in_rows(columns, padding)[:, None, :]))
        visible |= (own < 0) & (queries[:, None] == columns)
        visible = visible[:, None]
    if visible.all():
        return None  # attention runs faster without a mask
    return device_mask(backend, backend.config.mask_dtype, visible)


def in_rows(columns: Int32s, padding: Int32s) -> Int32s:
    """Return the positions of `columns` in each row of a batch, ``[B, n]``; -1 for no token."""
    own = columns - padding[:, None]
    return np.where((columns < 0) | (own < 0), -1, own).astype(np.int32)
