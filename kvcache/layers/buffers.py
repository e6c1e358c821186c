"""Growing buffers for the arrays of one layer, ``[B, kv_heads, slots, head_dim]`` each.

Per-layer caches allocate, grow and view memory only here. The caches above decide which token
lives in which slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from kvcache._types import Indices
from kvcache.backends import Array, Backend, HostArray, nbytes, transfer
from kvcache.errors import ShapeError
from kvcache.storage.admission import Geometry
from kvcache.storage.arrays import LayerArrays, NamedArray
from kvcache.storage.layout import TOKENS
from kvcache.storage.lengths import padded_index, round_up

NAMES = ("keys", "values")
"""Names of the arrays, in their order."""
Arrays: TypeAlias = tuple[Array, ...]
"""The arrays of a layer, in the order of :data:`NAMES`."""


class GrowingBuffers:
    """Buffers of one layer, allocated by the first :meth:`grow`.

    geometry: of everything written here. step: capacities are multiples of so many slots.
    limit: most slots ever needed; None for no limit.
    """

    def __init__(
        self, backend: Backend, geometry: Geometry, step: int, limit: int | None = None
    ) -> None:
        self.backend = backend
        self.geometry = geometry
        self.arrays: Arrays = ()
        self.capacity = 0
        self.growths = 0
        self._step, self._limit = step, limit
        self._padding = backend.config.padding
        # True if a view of n slots is a slice of just n slots, without padding or a copy.
        self._exact = backend.slices_are_views and self._padding == 1

    # Room.

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare capacity included."""
        return self._nbytes(self.capacity)

    @property
    def token_bytes(self) -> int:
        """Bytes of one slot, over the whole batch."""
        return self._nbytes(1)

    def _nbytes(self, slots: int) -> int:
        geometry = self.geometry
        return sum(nbytes(shape, geometry.dtype) for shape in geometry.shapes(slots))

    def grow(self, slots: int) -> None:
        """Make room for `slots` slots, keeping their content; do nothing if there is.

        Capacity grows by half at least, so that copying costs O(1) per token in the long run.
        """
        if slots <= self.capacity:
            return
        unit = math.lcm(self._step, self._padding)
        capacity = round_up(max(slots, self.capacity * 3 // 2), unit)
        if self._limit is not None:
            capacity = min(capacity, self.padded(self._limit))
        arrays, growths = self._alloc(capacity), self.growths
        if self.capacity:
            arrays = self.backend.write_slices(arrays, self.arrays, 0, self.capacity, TOKENS)
            growths += 1
        # The old arrays are only dropped, not freed: :meth:`savepoint` may put them back.
        self.arrays, self.capacity, self.growths = arrays, capacity, growths

    def _alloc(self, slots: int) -> Arrays:
        alloc, geometry = self.backend.alloc, self.geometry
        return tuple([alloc(shape, geometry.dtype) for shape in geometry.shapes(slots)])

    def savepoint(self) -> Callable[[], None]:
        """Return a function that undoes growth from now on."""
        arrays, capacity, growths = self.arrays, self.capacity, self.growths

        def undo() -> None:
            # Without growth the present arrays are the successors of those, by now consumed.
            if self.capacity != capacity:
                self.arrays, self.capacity, self.growths = arrays, capacity, growths

        return undo

    # Programs.

    def export_state(self) -> Arrays:
        """Return the buffers in the form for compiled programs, until :meth:`import_state`."""
        return self.backend.traced_forms(self.arrays)

    def empty(self) -> Array:
        """Return an empty array, shape ``(0,)``, in the dtype of the buffers."""
        return self.backend.alloc((0,), self.geometry.dtype)

    def import_state(self, arrays: Arrays) -> None:
        """Replace the buffers by `arrays`, derived by programs from the exported ones.

        Raises: ShapeError if their shapes differ; nothing has changed then.
        """
        for name, own, given in zip(NAMES, self.arrays, arrays, strict=True):
            if tuple(own.shape) != tuple(given.shape):
                raise ShapeError(
                    f"a state to import has the shape of the exported one; got {name} of "
                    f"{tuple(given.shape)} for {tuple(own.shape)}."
                )
        self.arrays = self.backend.from_traced_forms(arrays, self.geometry.dtype)

    # Slots.

    def append(
        self, keys: Array, values: Array, start: int, stop: int, held: int
    ) -> tuple[Array, Array]:
        """Write keys and values to slots ``[start, stop)``; return :meth:`view` of `held` slots.

        The path of every decode step, hence one call without a loop.
        """
        # One statement: the old arrays are consumed once this is called.
        self.arrays = self.written((keys, values), start, stop)
        new_keys, new_values = self.arrays
        width = held if self._exact else self.width(held)
        if width == self.capacity:
            return new_keys, new_values
        read = self.backend.read_slice
        return read(new_keys, 0, width, TOKENS), read(new_values, 0, width, TOKENS)

    def written(self, update: Arrays, start: int, stop: int) -> Arrays:
        """Return the arrays with an update in slots ``[start, stop)``; consumes the present ones.

        The caller assigns the result in the same statement, with all that depends on the write.
        """
        return self.backend.write_slices(self.arrays, update, start, stop, TOKENS)

    def with_rows(self, update: Arrays, slots: HostArray) -> Arrays:
        """Return the arrays with one row of an update in each of `slots`, as :meth:`written`."""
        return self.backend.write_row_sets(self.arrays, update, slots, TOKENS)

    def read_rows(self, slots: HostArray) -> Arrays:
        """Return copies of the rows in `slots`."""
        return self.take_tokens(self.arrays, slots)

    def take_tokens(self, update: Arrays, rows: HostArray) -> Arrays:
        """Return copies of some tokens of an update."""
        return tuple(self.backend.gather(array, rows, TOKENS) for array in update)

    def width(self, held: int) -> int:
        """Return the number of columns of :meth:`view` for `held` slots."""
        # Where a slice is a copy, returning the whole buffer is cheaper; the mask hides the rest.
        return self.padded(held) if self.backend.slices_are_views else self.capacity

    def view(self, held: int) -> Arrays:
        """Return the first `held` slots plus padding; the whole buffers where slices are copies."""
        width = held if self._exact else self.width(held)
        if width == self.capacity:
            return self.arrays
        read = self.backend.read_slice
        return tuple(read(array, 0, width, TOKENS) for array in self.arrays)

    def padded(self, columns: int) -> int:
        """Return `columns` rounded up to the backend's padding."""
        return round_up(columns, self._padding)

    def held_and_update(self, update: Arrays, held: int) -> Arrays:
        """Return copies of :meth:`view` of `held` slots with an unwritten update appended."""
        return tuple(map(self._concat_padded, self.view(held), update))

    def _concat_padded(self, old: Array, new: Array) -> Array:
        """Return `old` and `new` as one array, padded with zeros as the backend asks."""
        columns = old.shape[TOKENS] + new.shape[TOKENS]
        missing = self.padded(columns) - columns
        parts = [old, new]
        if missing:
            shape = (*old.shape[:TOKENS], missing, old.shape[3])
            parts.append(self.backend.alloc(shape, self.geometry.dtype))
        return self.backend.concat(parts, TOKENS)

    # Copies.

    def held_slice(self, held: int) -> Arrays:
        """Return the first `held` slots plus padding, as views where the framework has views."""
        width = min(self.capacity, self.padded(held))
        return tuple(self.backend.slice(array, 0, width, TOKENS) for array in self.arrays)

    def to_host(self, held: int) -> LayerArrays:
        """Return NumPy copies of the first `held` slots."""
        to_host = self.backend.to_host
        arrays = zip(NAMES, self.held_slice(held), strict=True)
        # Padding is cut off on the host: on the device every length might compile a program.
        return tuple(NamedArray(name, to_host(array)[:, :, :held]) for name, array in arrays)

    def read_tokens(self, columns: Arrays, index: Indices) -> LayerArrays:
        """Return NumPy copies of the tokens at `index` of `columns`, arrays like the buffers."""
        backend, index_padded = self.backend, padded_index(self.backend, index)
        gathered = [backend.to_host(backend.gather(c, index_padded, TOKENS)) for c in columns]
        return tuple(
            NamedArray(name, np.array(array[:, :, : index.size], order="C"))
            for name, array in zip(NAMES, gathered, strict=True)
        )

    def transferred(self, backend: Backend, held: int) -> Arrays:
        """Return the first `held` slots on another backend, without a copy where possible.

        They may share memory with these buffers: copy them and sync before this cache changes.
        """
        # Rounded to the padding of the target, as far as the buffer reaches: it then compiles for
        # few lengths. Whole buffers are transferred, because a slice need not be compact memory,
        # and then some frameworks cannot share it (JAX).
        width = min(self.capacity, round_up(held, backend.config.padding))
        arrays = [transfer(array, self.backend, backend) for array in self.arrays]
        return tuple(
            array if width == self.capacity else backend.read_slice(array, 0, width, TOKENS)
            for array in arrays
        )


def place_rows(parts: Sequence[LayerArrays], slots: Indices, width: int) -> LayerArrays:
    """Return host arrays of `width` slots: the rows of `parts` in `slots`, 0 elsewhere."""
    placed = []
    for arrays in zip(*parts, strict=True):
        rows = np.concatenate([array.data for array in arrays], axis=TOKENS)
        whole = np.zeros((*rows.shape[:TOKENS], width, rows.shape[-1]), rows.dtype)
        whole[:, :, slots] = rows
        placed.append(arrays[0]._replace(data=whole))
    return tuple(placed)
