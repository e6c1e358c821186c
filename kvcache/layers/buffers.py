"""Growing buffers for the arrays of one layer, ``[B, kv_heads, slots, head_dim]`` each.

Per-layer caches allocate, grow and view memory only here. The caches above decide which token
lives in which slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from kvcache._types import Indices
from kvcache.backends import Array, Backend, HostArray, nbytes, transfer
from kvcache.storage.admission import Geometry
from kvcache.storage.arrays import LayerArrays, NamedArray
from kvcache.storage.layout import LAYER_AXES, TOKENS
from kvcache.storage.lengths import padded_index, round_up

from .columns import Sizes

NAMES = ("keys", "values")
"""Names of the arrays, in their order."""
AXES = 4
"""Number of axes of each."""
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
        self.capacity = 0  # as in `sizes`: every update asks for it
        self.growths = 0
        self.sizes = Sizes.on(backend, step, limit)
        # True if a view of n slots is a slice of just n slots, without padding or a copy.
        self._exact = backend.slices_are_views and self.sizes.padding == 1
        # Slots below this one, but above those held, may still have tokens that were taken back.
        self._dirty = 0
        # Whether the buffers themselves may be returned, when all slots are held; else other
        # objects, of the same memory.
        self._returnable = not backend.assignment_rebinds

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

    def grow(self, slots: int, spare: bool = True) -> None:
        """Make room for `slots` slots, keeping their content; do nothing if there is.

        spare: whether to make room in steps of any size, and for half more than before at least.
        """
        if slots <= self.capacity:
            return
        sizes = self.sizes.grown(slots) if spare else self.sizes.fitted(slots)
        growths = self.growths
        arrays = self._alloc(sizes.capacity)
        if self.capacity:
            arrays = self.backend.write_slices(arrays, self.arrays, 0, self.capacity, TOKENS)
            growths += 1
        # The old arrays are only dropped, not freed: :meth:`savepoint` may put them back.
        self.arrays, self.sizes, self.capacity, self.growths = (
            arrays,
            sizes,
            sizes.capacity,
            growths,
        )

    def _alloc(self, slots: int) -> Arrays:
        alloc, geometry = self.backend.alloc_axes, self.geometry
        return tuple([alloc(shape, geometry.dtype, LAYER_AXES) for shape in geometry.shapes(slots)])

    def savepoint(self) -> Callable[[], None]:
        """Return a function that undoes growth from now on."""
        arrays, sizes, growths, dirty = self.arrays, self.sizes, self.growths, self._dirty

        def undo() -> None:
            # Without growth the present arrays are the successors of those, by now consumed; free
            # slots of theirs may have been written to.
            if self.capacity == sizes.capacity:
                self._dirty = self.capacity
            else:
                self.arrays, self.sizes, self.capacity = arrays, sizes, sizes.capacity
                self.growths, self._dirty = growths, dirty

        return undo

    # Programs.

    def to_traced(self) -> Arrays:
        """Return the buffers in the form for compiled programs; consumes them.

        The caller assigns the result in the same statement.
        """
        return self.backend.traced_forms(self.arrays)

    def from_traced(self, arrays: Arrays) -> Arrays:
        """Return `arrays` in the form for the buffers; consumes them.

        The caller assigns the result in the same statement, with all that depends on it.
        """
        return self.backend.from_traced_forms(arrays, self.geometry.dtype)

    def empty(self) -> Array:
        """Return an empty array, shape ``(0,)``, in the dtype of the buffers."""
        return self.backend.alloc((0,), self.geometry.dtype)

    # Tokens taken back.

    def take_back(self, slots: int) -> None:
        """Note that those of the first `slots` slots that are not held have tokens taken back."""
        self._dirty = max(self._dirty, min(slots, self.capacity))

    def clean(self, held: int) -> None:
        """Write zeros to slots from `held` on with tokens taken back: 0 times NaN is NaN.

        Done late, where slots beyond those held are returned or exported, because most are
        overwritten before.
        """
        while held < self._dirty:
            # In powers of two: where every length is compiled, there are few.
            tokens = 1 << ((self._dirty - held).bit_length() - 1)
            self.arrays = self.written(self._alloc(tokens), held, held + tokens)
            held += tokens
        self._dirty = 0

    # Slots.

    def append(
        self, keys: Array, values: Array, start: int, stop: int, held: int
    ) -> tuple[Array, Array]:
        """Write keys and values to slots ``[start, stop)``; return :meth:`view` of `held` slots.

        The path of every decode step, hence one call without a loop.
        """
        if not self._exact and self._dirty:
            self.clean(held)
        # One statement: the old arrays are consumed once this is called.
        self.arrays = self.written((keys, values), start, stop)
        new_keys, new_values = self.arrays
        width = held if self._exact else self.width(held)
        if width == self.capacity:
            return self.whole()
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
        return self.sizes.width(held)

    def whole(self) -> tuple[Array, Array]:
        """Return all slots."""
        keys, values = self.arrays
        return (keys, values) if self._returnable else (keys[...], values[...])

    def view(self, held: int) -> Arrays:
        """Return the first `held` slots plus padding; the whole buffers where slices are copies."""
        if not self._exact:
            self.clean(held)
        return self._first(self.width(held))

    def _first(self, columns: int) -> Arrays:
        """Return the first `columns` slots, as views where the framework has views."""
        if columns == self.capacity:
            return self.whole()
        read = self.backend.read_slice
        return tuple(read(array, 0, columns, TOKENS) for array in self.arrays)

    def padded(self, columns: int) -> int:
        """Return `columns` rounded up to the backend's padding."""
        return self.sizes.padded(columns)

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
            parts.append(self.backend.alloc_axes(shape, self.geometry.dtype, LAYER_AXES))
        return self.backend.concat(parts, TOKENS)

    def with_gradients(self, columns: Arrays, update: Arrays, start: int) -> tuple[Array, Array]:
        """Return `columns` with gradients for `update`, which they hold from `start` on."""
        connect = self.backend.with_gradients
        keys, values = (
            connect(column, rows, start, TOKENS)
            for column, rows in zip(columns, update, strict=True)
        )
        return keys, values

    def exact(self, held: int) -> Arrays:
        """Return the first `held` slots, without padding; copies where slices are copies."""
        if not self.backend.slices_are_views:
            # Cut on the host, in a tenth of a millisecond; a program for each length takes 100.
            from_host = self.backend.from_host_axes
            return tuple(from_host(array.data, LAYER_AXES) for array in self.to_host(held))
        return self._first(held)

    # Copies.

    def held_slice(self, held: int) -> Arrays:
        """Return the first `held` slots plus padding, as views where the framework has views."""
        if not self._exact:
            self.clean(held)
        return self._padded_slice(held)

    def _padded_slice(self, held: int) -> Arrays:
        width = min(self.capacity, self.padded(held))
        return tuple(self.backend.slice(array, 0, width, TOKENS) for array in self.arrays)

    def to_host(self, held: int) -> LayerArrays:
        """Return NumPy copies of the first `held` slots."""
        to_host = self.backend.to_host
        arrays = zip(NAMES, self._padded_slice(held), strict=True)
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
        self.clean(held)
        # Rounded to the padding of the target, as far as the buffer reaches: it then compiles for
        # few lengths. Whole buffers are transferred, because a slice need not be compact memory,
        # and then some frameworks cannot share it (JAX).
        width = min(self.capacity, round_up(held, backend.config.padding))
        arrays = [transfer(array, self.backend, backend, LAYER_AXES) for array in self.arrays]
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
