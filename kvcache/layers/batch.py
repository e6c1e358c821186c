"""The rows of a batch in one per-layer cache: of unequal length, selected, split and joined."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Self, SupportsIndex

import numpy as np

from kvcache._types import Int32s
from kvcache.errors import ShapeError
from kvcache.snapshots.rows import Slots
from kvcache.snapshots.schedule import ResumePoints
from kvcache.storage.admission import Admission
from kvcache.storage.lengths import padded_index

from .alike import check_alike
from .buffers import Arrays
from .copies import CopyableCache
from .padding import as_padding, check_empty, check_padding, joined_padding, selected
from .pinning import LayerPins
from .rewind import Rewind
from .row_selection import SelectableRows


class BatchCache(SelectableRows, CopyableCache):
    """A cache of several rows, which can be of unequal length."""

    _admission: Admission
    _pins: LayerPins | None
    _points: ResumePoints

    # Rows of unequal length.

    @property
    def rows(self) -> int | None:
        """Rows of the batch; None before the first update, unless padding was declared."""
        if self._buffers is not None:
            return self._buffers.geometry.batch
        return None if self._padding is None else self._padding.size

    def pad(self, padding: Iterable[SupportsIndex]) -> None:
        """Declare that rows of the batch begin with so many columns of padding.

        Before the first update. Positions of a row then count from its first token, masks hide the
        padding, and a query of padding sees itself alone.

        padding: a number for each row. Each row of a rotating cache with sinks holds as many
            further columns as the largest of them.

        Raises: ValueError for a cache with tokens, or a negative number; TypeError for no list of
            integers; ExportedError. ShapeError for other rows than came, or that come first.
        """
        self.check_not_exported()
        numbers = as_padding(padding)
        check_empty(self._offset)
        if self._buffers is not None:
            check_padding(numbers, self._buffers.geometry.batch)
        self._atomic(partial(self._declare, numbers))

    def _declare(self, padding: Int32s | None) -> None:
        self._drop_buffers()
        self._set_padding(padding)
        self.rewound = Rewind(0, refilled=True)  # its tokens are not those named for it

    # The batch axis.

    def _select(self, index: Int32s) -> None:
        padding = None if self._padding is None else as_padding(self._padding[index])
        if self._buffers is None:
            self._padding = padding
            return
        self._points.convert(partial(selected, rows=index))
        if self._pins is not None:
            self._pins.spill()  # their slots get other rows
            self._pins.padding = padding
        self._padding = padding
        self._buffers.select(index)
        self._admission.resize(index.size)
        # Nothing is known of the tokens of rows that were others.
        self.rewound = Rewind(0, refilled=True)

    def _row(self, row: int) -> Self:
        buffers, clone = self._buffers, self.make(self._asked_backend, self.options)
        padding = 0 if self._padding is None else int(self._padding[row])
        if buffers is not None and self._offset > padding:
            backend, axis = buffers.backend, buffers.axis
            slots = self._slots_of_row(padding)
            arrays = [backend.slice(array, row, row + 1, 0) for array in buffers.arrays]
            index = padded_index(backend, slots)
            own = tuple([backend.gather(array, index, axis) for array in arrays])
            clone._fill(own, slots.size, self._offset - padding, None)
        return clone

    @abstractmethod
    def _slots_of_row(self, padding: int) -> Slots:
        """Return the slots of all tokens that a cache of one row holds, ascending by position."""

    @classmethod
    def concat(cls, caches: Sequence[Self]) -> Self:
        caches = check_alike(cls, caches)
        first = caches[0]
        joined = cls.make(first._asked_backend, first.options)
        if not first._offset:
            return joined
        for cache in caches:
            _check_geometry(first, cache)
        stop, padding = joined_padding(caches)
        positions = first._positions_of_all(caches, stop, max(padding))
        parts = [cache._columns_for(positions, stop) for cache in caches]
        backend = first._admission.bound()[0]
        arrays = tuple([backend.concat(part, 0) for part in zip(*parts, strict=True)])
        joined._fill(arrays, positions.size, stop, as_padding(padding))
        joined._note_joined(caches)
        return joined

    def _note_joined(self, caches: Sequence[Self]) -> None:
        """Note what rows of a new cache lack because one of `caches`, joined, had dropped it."""

    @abstractmethod
    def _positions_of_all(self, caches: Sequence[Self], stop: int, padding: int) -> Int32s:
        """Return the positions that a cache with the rows of all `caches` holds after `stop`.

        padding: the most that a row has then.
        """

    def _columns_for(self, positions: Int32s, stop: int) -> Arrays:
        """Return the tokens at `positions` of a batch that ends at `stop`, as this cache does.

        Positions before the first token of this cache are padding: any of its tokens.
        """
        backend, geometry = self._admission.bound()
        own = np.maximum(positions - (stop - self._offset), 0)
        held, slots = self._held()
        index = slots[np.searchsorted(held, own)]
        arrays = () if self._buffers is None else self._buffers.arrays
        return tuple([backend.gather(array, index, geometry.axis) for array in arrays])


def _check_geometry(first: BatchCache, other: BatchCache) -> None:
    """Raise ShapeError unless caches are alike but for their number of rows."""
    backend, geometry = first._admission.bound()
    other_backend, other_geometry = other._admission.bound()
    if backend is not other_backend or geometry.with_batch(1) != other_geometry.with_batch(1):
        raise ShapeError(
            "concat joins caches of one backend, alike in kv_heads, head_dims and dtypes; got "
            f"{tuple(geometry[1:])} on {backend.spec} and {tuple(other_geometry[1:])} on "
            f"{other_backend.spec}."
        )
