"""Keys as they were put, of cells that removals from the middle have moved since."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from kvcache._types import Int32s
from kvcache.backends import Array, Backend
from kvcache.errors import ShapeError
from kvcache.storage.lengths import padded_index

from .checks import check_dtype
from .layouts import ArrayLayout

Shift: TypeAlias = Callable[[int, Array, Array], Array]
"""``shift(layer, keys, offsets) -> keys``: move keys by `offsets` positions, int32 [tokens].

It is given keys as they were put, and the whole way that each has to go from there.
"""


class OriginalKeys:
    """Unshifted keys of moved cells, in a buffer per layer as large as that of its keys.

    Every shift begins with them, so a key is rounded once, however often it is moved.

    layout: of keys.
    """

    def __init__(self, backend: Backend, dtype: str, layout: ArrayLayout) -> None:
        self._backend, self._dtype, self._layout = backend, dtype, layout
        self.buffers: dict[int, Array] = {}
        """By layer; empty until the first removal from the middle."""

    def shift(
        self, keys: Mapping[int, Array], cells: Int32s, moved: Int32s, offset: int, shift: Shift
    ) -> tuple[dict[int, Array], dict[int, Array]]:
        """Shift the `keys` of `cells` in all layers by `offset`, without storing the result.

        moved: number of positions by which each was shifted before, int32 [tokens].

        Returns, by layer, what :attr:`buffers` hold once the cells have moved, and shifted keys.

        Raises: DTypeError, ShapeError for a result unlike the keys; whatever `shift` raises.
        """
        gather, axis = self._backend.gather, self._layout.token_axis
        offsets = self._backend.from_host((moved + offset).astype(np.int32))
        buffers, shifted = {}, {}
        for layer, current in keys.items():
            buffers[layer] = self._including(layer, current, cells[moved == 0])
            rows = gather(buffers[layer], cells, axis)
            shape, result = tuple(rows.shape), shift(layer, rows, offsets)
            check_dtype(self._backend, self._dtype, "shifted keys", result)
            if tuple(result.shape) != shape:
                raise ShapeError(f"a shift keeps shapes; got {tuple(result.shape)} for {shape}.")
            [shifted[layer]] = self._backend.replace_nonfinite((result,), axis)
        # What is computed lazily fails here, not in the middle of a later pass.
        self._backend.sync(*buffers.values(), *shifted.values())
        return buffers, shifted

    def read(self, cells: Int32s) -> dict[int, Array]:
        """Return copies of the original keys of `cells`, by layer."""
        gather, axis = self._backend.gather, self._layout.token_axis
        return {layer: gather(buffer, cells, axis) for layer, buffer in self.buffers.items()}

    def write(self, cells: Int32s, keys: Mapping[int, Array]) -> None:
        """Make `keys` the original keys of `cells`, by layer."""
        axis, write_rows = self._layout.token_axis, self._backend.write_rows
        for layer, rows in keys.items():
            self.buffers[layer] = write_rows(self.buffers[layer], rows, cells, axis)

    def _including(self, layer: int, keys: Array, cells: Int32s) -> Array:
        """Return the buffer of a layer with the `keys` of `cells`, not moved yet, copied in.

        A layer without a buffer gets a new one, which is not stored here: the shift may still
        fail. An old buffer may be written to before, as it has no meaning where cells have not
        moved.
        """
        if layer not in self.buffers:
            buffer = self._backend.alloc_axes(keys.shape, self._dtype, self._layout.axes)
            return self._copied(buffer, keys, cells)
        self.buffers[layer] = self._copied(self.buffers[layer], keys, cells)
        return self.buffers[layer]

    def _copied(self, buffer: Array, keys: Array, cells: Int32s) -> Array:
        """Copy `keys` of `cells` to `buffer`; consumes it, and returns its successor."""
        if not cells.size:
            return buffer
        axis = self._layout.token_axis
        index = padded_index(self._backend, cells.astype(np.int64)).astype(np.int32)
        rows = self._backend.gather(keys, index, axis)
        return self._backend.write_rows(buffer, rows, index, axis)
