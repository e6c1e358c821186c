"""Per-layer caches that are copied, and filled from copies."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Self

import numpy as np

from kvcache._types import Int32s
from kvcache.backends import Backend, get_backend
from kvcache.errors import KVCacheError, ShapeError
from kvcache.snapshots.rows import Slots
from kvcache.storage.admission import Admission
from kvcache.storage.arrays import LayerArrays, check_layer_form
from kvcache.storage.layout import TOKENS

from .buffers import AXES, NAMES, Arrays, GrowingBuffers, swapped
from .checkpoint import Checkpoint
from .padding import check_padding, is_same, padding_array, without_padding
from .rewind import Rewind
from .stack import StandaloneCache


class CopyableCache(StandaloneCache):
    """A cache whose tokens are in buffers, copied slot by slot."""

    _admission: Admission
    _asked_backend: str | Backend | None
    _buffers: GrowingBuffers | None
    _offset: int
    _checkpoint: Checkpoint | None
    _padding: Int32s | None

    @property
    @abstractmethod
    def len(self) -> int:
        """Tokens held."""

    @abstractmethod
    def _with_room(self, slots: int, spare: bool = True) -> GrowingBuffers:
        """Return the buffers with room for `slots` slots, made here on first use.

        spare: whether to make room in steps of any size.
        """

    @property
    def _held_columns(self) -> int:
        """Tokens of :meth:`_held_of`, which a copy has to hold."""
        return self.len

    @abstractmethod
    def _held(self) -> tuple[Int32s, Slots]:
        """Return the positions held, ascending, and their slots."""

    @abstractmethod
    def _least_held(self, offset: int) -> int:
        """Return how many tokens a cache holds at least after `offset`."""

    @abstractmethod
    def _most_held(self, offset: int) -> int:
        """Return how many tokens a cache can hold after `offset`."""

    @abstractmethod
    def _drop_buffers(self) -> None:
        """Forget the buffers, all of whose tokens were taken back, and what depends on padding."""

    @abstractmethod
    def _set_padding(self, padding: Int32s | None) -> None:
        """Have so many columns of padding on the left of each row, before the first token."""

    def _order(self, held: int, offset: int) -> Int32s:
        """Return the positions of the `held` tokens after `offset`, in the order of files."""
        return np.arange(held, dtype=np.int32)

    @abstractmethod
    def _slot(self, buffers: GrowingBuffers, position: int) -> int:
        """Return the slot of the token at a position to come, or among the latest ones."""

    @abstractmethod
    def _held_of(self, buffers: GrowingBuffers, arrays: Arrays, backend: Backend) -> Arrays:
        """Return the tokens held, and padding, of `arrays`, which are those of `buffers`.

        backend: of `arrays`, which is another after a transfer.
        """

    @abstractmethod
    def _place(self, arrays: Arrays, held: int, offset: int, spare: bool) -> GrowingBuffers:
        """Do :meth:`_fill` on the device."""

    def _clone(self, backend: str | Backend | None) -> Self:
        """Return an empty cache like this one, for a copy."""
        return self.make(backend, self.options)

    def copy(self) -> Self:
        self.check_not_exported()
        clone = self._clone(self._asked_backend)
        clone._set_padding(self._padding)
        if (buffers := self._buffers) is not None and self._offset:
            buffers.clean(self._slot(buffers, self._offset))
            arrays = self._held_of(buffers, buffers.arrays, buffers.backend)
            clone._fill(arrays, self._held_columns, self._offset, self._padding)
        return clone

    def to_backend(self, backend: str | Backend) -> Self:
        self.check_not_exported()
        target = get_backend(backend)
        clone = self._clone(target)
        clone._set_padding(self._padding)
        if (buffers := self._buffers) is not None and self._offset:
            buffers.clean(self._slot(buffers, self._offset))
            arrays = self._held_of(buffers, buffers.transferred(target), target)
            copied = clone._fill(arrays, self._held_columns, self._offset, self._padding)
            # The copy may still be reading the memory of this cache, which may change next.
            target.sync(*copied.arrays)
        return clone

    def to_layer(self) -> LayerArrays:
        self.check_not_exported()
        if self._buffers is None or not self._offset:
            return ()
        positions, slots = self._held()
        held = min(positions.size, self._most_held(self._offset))
        order = np.searchsorted(positions, self._order(held, self._offset))
        arrays = self._buffers.read_slots(slots[order])
        return arrays if self._padding is None else (*arrays, padding_array(self._padding))

    def from_layer(self, arrays: LayerArrays, offset: int) -> None:
        if self.backend is None:
            raise KVCacheError("a cache that is filled from the host names a backend; got none.")
        self._atomic(partial(self._from_layer, arrays, offset, self.backend))

    def _from_layer(self, arrays: LayerArrays, offset: int, backend: Backend) -> None:
        arrays, padding = without_padding(arrays)
        self._set_padding(padding)
        check_layer_form([arrays], NAMES, AXES, least=len(NAMES), mixed=True)
        held = [array.data.shape[TOKENS] for array in arrays]
        least, most = self._least_held(offset), self._most_held(offset)
        if len({*held}) > 1 or not least <= held[0] <= most:
            raise ShapeError(
                f"at offset {offset}, {type(self).__name__} holds {least} tokens"
                f"{f' to {most}' * (most > least)} in {' and '.join(NAMES)}; got {held}."
            )
        ascending = np.argsort(self._order(held[0], offset))
        arrays = tuple([array.take(ascending) for array in arrays])
        # Without a step's spare room: it may come from a file, whose size says nothing of it.
        self._fill_from_host(arrays, offset, backend, padding, spare=False)

    def _fill_from_host(
        self,
        layer: LayerArrays,
        offset: int,
        backend: Backend,
        padding: Int32s | None = None,
        spare: bool = True,
    ) -> None:
        axis, held = self._admission.axis, layer[0].data.shape[TOKENS]
        arrays = tuple([backend.from_host(swapped(array.data, axis)) for array in layer])
        self._atomic(partial(self._fill, arrays, held, offset, padding, spare))

    def _fill(
        self,
        arrays: Arrays,
        held: int,
        offset: int,
        padding: Int32s | None,
        spare: bool = True,
    ) -> GrowingBuffers:
        """Copy the tokens held after `offset` into an empty cache.

        held: their number; columns of `arrays` behind them are of no account.
        """
        self._admission.validate(*arrays)
        check_padding(padding, arrays[0].shape[0])
        if self._buffers is not None and not is_same(padding, self._padding):
            self._drop_buffers()
        self._set_padding(padding)
        buffers = self._place(arrays, held, offset, spare)
        buffers.backend.evaluate(*buffers.arrays)
        # A checkpoint opened while empty knows nothing of these tokens.
        self._offset, self._checkpoint, self.rewound = offset, None, Rewind(0, refilled=True)
        return buffers
