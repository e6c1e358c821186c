"""Growing buffers for the arrays of one layer, ``[B, kv_heads, slots, head_dim]`` each.

In the layout "bthd", slots come before kv_heads. Per-layer caches allocate, grow and view memory
only here. The caches above decide which token lives in which slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Self, TypeAlias

import numpy as np

from kvcache._types import Indices, Int32s
from kvcache.backends import Array, Backend, HostArray, nbytes, transfer
from kvcache.storage.admission import Geometry
from kvcache.storage.arrays import LayerArrays, NamedArray
from kvcache.storage.layout import TOKENS
from kvcache.storage.lengths import padded_index

from .columns import Sizes

NAMES = ("keys", "values")
"""Names of the arrays, in their order."""
AXES = 4
"""Number of axes of each."""
Arrays: TypeAlias = tuple[Array, ...]
"""The arrays of a layer, in the order of :data:`NAMES`."""


class GrowingBuffers:
    """Buffers of one layer, allocated by the first :meth:`grow`.

    geometry: of everything written here. sizes: of buffers not allocated yet.
    """

    def __init__(self, backend: Backend, geometry: Geometry, sizes: Sizes) -> None:
        self.backend = backend
        self.geometry = geometry
        self.axis = geometry.axis
        self.arrays: Arrays = ()
        self.capacity = 0  # as in `sizes`: every update asks for it
        self.growths = 0
        self.sizes = sizes
        # True if a view of n slots is a slice of just n slots, without padding or a copy.
        self._exact = backend.slices_are_views and sizes.padding == 1
        # Slots below this one, but above those held, may still have tokens that were taken back.
        self._dirty = 0
        # How often the arrays were replaced by others, which a savepoint puts back.
        self._moves = 0
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
        shapes = zip(geometry.shapes(slots), geometry.dtypes, strict=True)
        return sum(nbytes(shape, dtype) for shape, dtype in shapes)

    def grow(self, slots: int, spare: bool = True) -> None:
        """Make room for `slots` slots, keeping their content; do nothing if there is.

        spare: whether to make room in steps of any size, and for half more than before at least.
        """
        if slots > self.capacity:
            self._resize(self.sizes.grown(slots) if spare else self.sizes.fitted(slots))

    def hold(self, tokens: Arrays, sizes: Sizes) -> None:
        """Take copies of `tokens` as the first slots of buffers of such sizes, allocated here."""
        spare = sizes.capacity - tokens[0].shape[self.axis]
        parts = [tokens, self.alloc(spare)] if spare else [tokens]
        concat = self.backend.concat
        arrays = tuple([concat(pair, self.axis) for pair in zip(*parts, strict=True)])
        self._replace(arrays, sizes, self.growths)

    def of(self, *parts: Arrays) -> Self:
        """Return buffers of just the slots of `parts`, copied one after the other."""
        concat, buffers = self.backend.concat, copy(self)
        arrays = tuple([concat(pieces, self.axis) for pieces in zip(*parts, strict=True)])
        self.backend.evaluate(*arrays)
        buffers.arrays, buffers.capacity = arrays, arrays[0].shape[self.axis]
        return buffers

    def shared(self) -> Self | None:
        """Return buffers of the same content, copied when one of the two is written to.

        None where the framework cannot, or where most slots would be copied for nothing.
        """
        arrays = self.backend.shared(self.arrays)
        if arrays is None:
            return None
        buffers = copy(self)
        buffers.arrays, buffers.growths = arrays, 0
        return buffers

    def _resize(self, sizes: Sizes) -> None:
        """Move all slots to buffers of other sizes, not smaller ones."""
        arrays = self.alloc(sizes.capacity)
        if self.capacity:
            arrays = self.backend.write_slices(arrays, self.arrays, 0, self.capacity, self.axis)
        self._replace(arrays, sizes, self.growths + bool(self.capacity))

    def _replace(self, arrays: Arrays, sizes: Sizes, growths: int) -> None:
        # The old arrays are only dropped, not freed: :meth:`savepoint` may put them back.
        self.arrays, self.sizes, self.capacity, self.growths, self._moves = (
            arrays,
            sizes,
            sizes.capacity,
            growths,
            self._moves + 1,
        )

    def alloc(self, slots: int) -> Arrays:
        """Return new arrays of so many slots."""
        alloc, geometry = self.backend.alloc_axes, self.geometry
        shapes = zip(geometry.shapes(slots), geometry.dtypes, strict=True)
        return tuple([alloc(shape, dtype, geometry.axes) for shape, dtype in shapes])

    def savepoint(self) -> Callable[[], None]:
        """Return a function that undoes growth, and other moves, from now on."""
        arrays, sizes, growths = self.arrays, self.sizes, self.growths
        geometry, dirty, moves = self.geometry, self._dirty, self._moves

        def undo() -> None:
            # Without a move the present arrays are the successors of those, by now consumed; free
            # slots of theirs may have been written to.
            if self._moves == moves:
                self._dirty = self.capacity
            else:
                self.arrays, self.sizes, self.capacity = arrays, sizes, sizes.capacity
                self.growths, self.geometry = growths, geometry
                self._dirty, self._moves = dirty, moves

        return undo

    # Programs.

    def to_traced(self) -> Arrays:
        """Return the buffers in the form for compiled programs; consumes them.

        The caller assigns the result in the same statement.
        """
        return traced_forms(self.backend, self.arrays)

    def from_traced(self, arrays: Arrays) -> Arrays:
        """Return `arrays` in the form for the buffers; consumes them.

        The caller assigns the result in the same statement, with all that depends on it.
        """
        key_dtype, value_dtype = self.geometry.dtypes
        if key_dtype == value_dtype:
            return self.backend.from_traced_forms(arrays, key_dtype)
        pairs = zip(copies_of(self.backend, arrays), self.geometry.dtypes, strict=True)
        return tuple([self.backend.from_traced(array, dtype) for array, dtype in pairs])

    def likes(self) -> tuple[Array, Array]:
        """Return arrays without slots, in the dtypes of keys and values and of their rank."""
        shape = [1, 1, 1, 1]
        shape[self.axis] = 0
        keys, values = (self.backend.alloc(shape, dtype) for dtype in self.geometry.dtypes)
        return keys, values

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
            self.arrays = self.written(self.alloc(tokens), held, held + tokens)
            held += tokens
        self._dirty = 0

    # Slots.

    def append(
        self, keys: Array, values: Array, start: int, stop: int, first: int = 0
    ) -> tuple[Array, Array]:
        """Write keys and values to slots ``[start, stop)``; return the view of ``[first, stop)``.

        The path of every decode step, hence one call without a loop.
        """
        if not self._exact and self._dirty:
            self.clean(stop)
        backend, axis = self.backend, self.axis
        # One statement: the old arrays are consumed once this is called.
        self.arrays = backend.write_slices(self.arrays, (keys, values), start, stop, axis)
        if not self._exact:
            first, stop = self.sizes.span(first, stop)
        if stop - first == self.capacity:
            return self.whole()
        new_keys, new_values = self.arrays
        read = backend.read_slice
        return read(new_keys, first, stop, axis), read(new_values, first, stop, axis)

    def written(self, update: Arrays, start: int, stop: int) -> Arrays:
        """Return the arrays with an update in slots ``[start, stop)``; consumes the present ones.

        The caller assigns the result in the same statement, with all that depends on the write.
        """
        return self.backend.write_slices(self.arrays, update, start, stop, self.axis)

    def whole(self) -> tuple[Array, Array]:
        """Return all slots."""
        keys, values = self.arrays
        return (keys, values) if self._returnable else (keys[...], values[...])

    def view(self, first: int, stop: int) -> Arrays:
        """Return slots ``[first, stop)`` plus padding; whole buffers where slices are copies."""
        if not self._exact:
            self.clean(stop)
        return self.slots(*self.sizes.span(first, stop))

    def slots(self, first: int, stop: int) -> Arrays:
        """Return slots ``[first, stop)``, as views where the framework has views."""
        if stop - first == self.capacity:
            return self.whole()
        read = self.backend.read_slice
        return tuple([read(array, first, stop, self.axis) for array in self.arrays])

    def joined(self, parts: Sequence[Arrays]) -> tuple[Array, Array]:
        """Return the slots of `parts` in new arrays, one after the other, padded with zeros."""
        columns = sum(part[0].shape[self.axis] for part in parts)
        missing = self.sizes.padded(columns) - columns
        parts = [*parts, self.alloc(missing)] if missing else parts
        concat = self.backend.concat
        keys, values = (concat(arrays, self.axis) for arrays in zip(*parts, strict=True))
        return keys, values

    def with_gradients(self, columns: Arrays, update: Arrays, start: int) -> tuple[Array, Array]:
        """Return `columns` with gradients for `update`, which they hold from `start` on."""
        connect = self.backend.with_gradients
        keys, values = (
            connect(column, rows, start, self.axis)
            for column, rows in zip(columns, update, strict=True)
        )
        return keys, values

    def select(self, rows: Int32s) -> None:
        """Replace the arrays by some rows of the batch."""
        gather = self.backend.gather
        arrays = tuple([gather(array, rows, 0) for array in self.arrays])
        self.backend.evaluate(*arrays)
        self._replace(arrays, self.sizes, self.growths)
        self.geometry = self.geometry.with_batch(rows.size)

    # Copies.

    def gathered(self, columns: Arrays, index: Indices) -> Arrays:
        """Return copies of the tokens at `index` of `columns`, on the device."""
        return tuple([self.backend.gather(array, index, self.axis) for array in columns])

    def read_slots(self, slots: Indices) -> LayerArrays:
        """Return NumPy copies of `slots`, in the form of snapshots."""
        first, stop = (int(slots[0]), int(slots[-1]) + 1) if slots.size else (0, 0)
        if not slots.size or not np.array_equal(slots, np.arange(first, stop)):
            return self.read_tokens(self.arrays, slots)
        last = min(first + self.sizes.padded(slots.size), self.capacity)
        padded_first = last - self.sizes.padded(slots.size)
        return self._to_host(self.slots(padded_first, last), first - padded_first, slots.size)

    def read_tokens(self, columns: Arrays, index: Indices) -> LayerArrays:
        """Return NumPy copies of the tokens at `index` of `columns`, in the form of snapshots."""
        gathered = self.gathered(columns, padded_index(self.backend, index))
        return self._to_host(gathered, 0, index.size)

    def _to_host(self, columns: Arrays, first: int, tokens: int) -> LayerArrays:
        """Return NumPy copies of some columns, cut on the host, where no length is compiled."""
        hosts = [swapped(self.backend.to_host(array), self.axis) for array in columns]
        return tuple(
            NamedArray(name, np.array(host[:, :, first : first + tokens], order="C"))
            for name, host in zip(NAMES, hosts, strict=True)
        )

    def transferred(self, backend: Backend) -> Arrays:
        """Return all slots on another backend, without a copy where possible.

        They may share memory with these buffers: copy them and sync before this cache changes.
        Whole buffers are transferred, because a slice need not be compact memory, and then some
        frameworks cannot share it (JAX).
        """
        axes = self.geometry.axes
        return tuple([transfer(array, self.backend, backend, axes) for array in self.arrays])


def traced_forms(backend: Backend, arrays: Arrays) -> Arrays:
    """Return keys and values in the form for compiled programs; consumes them, or none."""
    keys, values = arrays
    if keys.dtype == values.dtype:
        return backend.traced_forms(arrays)
    return tuple([backend.traced_form(array) for array in copies_of(backend, arrays)])


def copies_of(backend: Backend, arrays: Arrays) -> Arrays:
    """Return copies, so that failing to convert the second array does not cost the first."""
    return tuple([backend.concat([array], 0) for array in arrays])


def swapped(array: HostArray, axis: int) -> HostArray:
    """Return keys or values with the tokens on `axis` with them on that of snapshots, or back."""
    return array if axis == TOKENS else array.swapaxes(axis, TOKENS)
