"""Per-layer caches that are copied, and filled from copies."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Self

from kvcache.backends import Backend, get_backend
from kvcache.errors import KVCacheError, ShapeError
from kvcache.storage.admission import Admission
from kvcache.storage.arrays import LayerArrays, check_layer_form
from kvcache.storage.layout import LAYER_AXES, TOKENS

from .buffers import AXES, NAMES, Arrays, GrowingBuffers
from .checkpoint import Checkpoint
from .rewind import Rewind
from .stack import StandaloneCache


class CopyableCache(StandaloneCache):
    """A cache whose tokens are in buffers, copied slot by slot."""

    _admission: Admission
    _asked_backend: str | Backend | None
    _buffers: GrowingBuffers | None
    _offset: int
    _checkpoint: Checkpoint | None

    @property
    @abstractmethod
    def len(self) -> int:
        """Tokens held."""

    @abstractmethod
    def _with_room(self, slots: int, spare: bool = True) -> GrowingBuffers:
        """Return the buffers with room for `slots` slots, made here on first use.

        spare: whether to make room in steps of any size.
        """

    @abstractmethod
    def _slots(self, offset: int) -> int:
        """Return the number of tokens held once `offset` have been seen."""

    def copy(self) -> Self:
        self.check_not_exported()
        clone = self.make(self._asked_backend, self.options)
        if self._buffers is not None and self._offset:
            clone._fill(self._buffers.held_slice(self.len), self._offset)
        return clone

    def to_backend(self, backend: str | Backend) -> Self:
        self.check_not_exported()
        target = get_backend(backend)
        clone = self.make(target, self.options)
        if self._buffers is not None and self._offset:
            buffers = clone._fill(self._buffers.transferred(target, self.len), self._offset)
            # The copy may still be reading the memory of this cache, which may change next.
            target.sync(*buffers.arrays)
        return clone

    def to_layer(self) -> LayerArrays:
        self.check_not_exported()
        if self._buffers is None or not self._offset:
            return ()
        return self._buffers.to_host(self.len)

    def from_layer(self, arrays: LayerArrays, offset: int) -> None:
        if self.backend is None:
            raise KVCacheError("a cache that is filled from the host names a backend; got none.")
        check_layer_form([arrays], NAMES, AXES, least=len(NAMES))
        held = [array.data.shape[TOKENS] for array in arrays]
        if held != [self._slots(offset)] * len(NAMES):
            raise ShapeError(
                f"at offset {offset}, {type(self).__name__} holds {self._slots(offset)} tokens in "
                f"{' and '.join(NAMES)}; got {held}."
            )
        # Without a step's spare room: it may come from a file, whose size says nothing of it.
        self._fill_from_host(arrays, offset, self.backend, spare=False)

    def _fill_from_host(
        self, layer: LayerArrays, offset: int, backend: Backend, spare: bool = True
    ) -> None:
        arrays = tuple(backend.from_host_axes(array.data, LAYER_AXES) for array in layer)
        self._atomic(partial(self._fill, arrays, offset, spare))

    def _fill(self, arrays: Arrays, offset: int, spare: bool = True) -> GrowingBuffers:
        """Copy `arrays` into the first slots of an empty cache; the next token is at `offset`."""
        keys, values = arrays
        slots = self._admission.validate(keys, values)
        buffers = self._with_room(slots, spare)
        buffers.arrays = buffers.written(arrays, 0, slots)
        buffers.backend.evaluate(*buffers.arrays)
        # A checkpoint opened while empty knows nothing of these tokens.
        self._offset, self._checkpoint, self.rewound = offset, None, Rewind(0, refilled=True)
        return buffers
