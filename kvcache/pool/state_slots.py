"""Slots of recurrent states on the device: one holds the state of a sequence in all layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from kvcache._locks import Lock
from kvcache._types import Int32s
from kvcache.backends import HOST_DTYPES, Array, Backend, nbytes
from kvcache.backends.arguments import refuse_traced
from kvcache.backends.arrays import Arrays
from kvcache.backends.base import FastKey
from kvcache.errors import DTypeError, ShapeError, SnapshotMismatchError
from kvcache.snapshots.rows import LayerRows, Slots, TokenRows
from kvcache.storage.admission import check_owner
from kvcache.storage.arrays import LayerArrays, NamedArray
from kvcache.storage.lengths import padded_index
from kvcache.storage.states import TOKEN_AXIS, check_state_rows

from .checks import refuse_gradients
from .owned import Commit

Likeness: TypeAlias = tuple[FastKey, ...]
"""What has to be alike for arrays to need no check."""


class LayerForm(NamedTuple):
    """Shapes, without the axis of slots, and dtypes of the arrays of one layer."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


class StateSlots:
    """Buffers of `count` slots for every layer, and the owner of rows that snapshots pin in them.

    Slot 0 is never written to: its zeros are the state of a fresh sequence. A pass writes to slots
    that nobody holds, never to one that is history, so a write that fails leaves nothing to undo.

    lock: that of the cache, held during every access.
    """

    def __init__(self, backend: Backend, count: int, lock: Lock) -> None:
        self.backend, self.count, self.lock = backend, count, lock
        self.layers: dict[int, Arrays] = {}
        self._checked: dict[int, Likeness] = {}  # of the arrays put last in a layer
        self._pinned: dict[
            TokenRows, None
        ] = {}  # a set in order of pinning: the oldest spill first

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.token_bytes * self.count

    # Reading and writing.

    def get(self, layer: int, slots: Int32s) -> Arrays:
        """Return copies of the states in `slots`, ``[slots, ...]``."""
        return tuple([self.backend.read_rows(buffer, slots, 0) for buffer in self.layers[layer]])

    def put(self, layer: int, arrays: Arrays, at_cuts: Sequence[Arrays], slots: Int32s) -> None:
        """Store the states of `arrays`, ``[runs, ...]``, and those `at_cuts`, ``[1, ...]``.

        slots: for all of them in order, distinct; without any, only the memory is allocated.

        Raises: ShapeError, DTypeError, UnknownBackendError, TracedArrayError,
            NotSupportedError for arrays that ask for gradients; no layer is allocated then.
        """
        rows = arrays
        if at_cuts:
            rows = tuple(
                [self.backend.concat(column, 0) for column in zip(arrays, *at_cuts, strict=True)]
            )
        if layer not in self.layers:
            self.layers[layer] = self._first_put(rows, slots)
            return
        if slots.size:
            write = self.backend.write_row_sets
            # Unpacked from map(): no signal handler runs between the call, which may consume the
            # buffers, and the assignment.
            [self.layers[layer]] = map(write, (self.layers[layer],), (rows,), (slots,), (0,))
            # They are not returned, so nobody else has them computed before the next pass.
            self.backend.evaluate(*self.layers[layer])

    def _first_put(self, rows: Arrays, slots: Int32s) -> Arrays:
        """Return new buffers for a layer, with `rows` in `slots`."""
        buffers = self._alloc_for(rows)
        if slots.size:
            buffers = self.backend.write_row_sets(buffers, rows, slots, 0)
            self.backend.evaluate(*buffers)
        return buffers

    def _alloc_for(self, arrays: Arrays) -> Arrays:
        pairs = zip(*self._form_of(arrays), strict=True)
        return tuple(self.backend.alloc((self.count, *shape), dtype) for shape, dtype in pairs)

    def _form_of(self, arrays: Arrays) -> LayerForm:
        shapes = tuple(tuple(array.shape[1:]) for array in arrays)
        return LayerForm(shapes, tuple(map(self.backend.dtype_name, arrays)))

    # Checks.

    def check(self, layer: int, arrays: Arrays, rows: int) -> None:
        """Check the states that are put in a layer, `rows` in number. Raises: as :meth:`put`."""
        try:
            likeness = tuple([self.backend.fast_key(array) for array in arrays])
        except (AttributeError, TypeError):  # no arrays: the check below says so
            likeness = ()
        if likeness and likeness == self._checked.get(layer) and likeness[0][1][0] == rows:
            return
        self._check_in_full(layer, arrays, rows)
        if layer in self.layers:
            self._checked[layer] = likeness

    def check_like(self, layer: int, state: Arrays, arrays: Arrays) -> None:
        """Check a state at a cut, ``[1, ...]``, that is put together with `arrays`."""
        self._check_in_full(layer, state, 1)
        given, fixed = self._form_of(state), self._form_of(arrays)
        if given != fixed:
            raise ShapeError(
                f"the states at cuts are such as the others of their layer, {_described(fixed)}; "
                f"got {_described(given)}."
            )

    def _check_in_full(self, layer: int, arrays: Arrays, rows: int) -> None:
        if not arrays:
            raise ShapeError("a state is one array or more; got none.")
        for number, array in enumerate(arrays):
            name = f"array {number} of a state"
            check_owner(self.backend, name, array)
            if self.backend.is_traced(array):
                refuse_traced(array)
            refuse_gradients(self.backend, name, array)
            shape = tuple(array.shape)
            if not shape or shape[0] != rows or not all(shape):
                raise ShapeError(
                    f"arrays of states have one row for each, {rows}, on the first axis, and no "
                    f"empty axis; got {shape}."
                )
        form = self._form_of(arrays)
        if layer in self.layers and form != (fixed := self._form_of(self.layers[layer])):
            kind = DTypeError if form.shapes == fixed.shapes else ShapeError
            raise kind(
                f"states of a layer keep the number, shapes and dtypes of the first: layer {layer} "
                f"has {_described(fixed)}; got {_described(form)}."
            )

    # As the owner of rows.

    @property
    def token_bytes(self) -> int:
        layers = list(self.layers.values())
        return sum(
            nbytes(tuple(buffer.shape[1:]), self.backend.dtype_name(buffer))
            for buffers in layers
            for buffer in buffers
        )

    def read(self, slots: Slots) -> LayerRows:
        """Return host copies of the states in `slots`, as rows of a batch of one."""
        if not slots.size:
            return {}
        index = padded_index(self.backend, slots).astype(np.int32)
        with self.lock:
            return {
                layer: tuple(
                    NamedArray(f"state{number}", self._on_host(rows, slots.size), TOKEN_AXIS)
                    for number, rows in enumerate(self.get(layer, index))
                )
                for layer in self.layers
            }

    def _on_host(self, rows: Array, count: int) -> np.ndarray:
        return self.backend.to_host(rows)[:count, None]

    def pin(self, rows: TokenRows) -> None:
        self._pinned[rows] = None

    def unpin(self, rows: TokenRows) -> None:
        self._pinned.pop(rows, None)

    @property
    def pinned(self) -> set[int]:
        """Slots in which rows of snapshots are pinned."""
        return {slot for rows in self._pinned for slot in rows.slots.tolist()}

    def spill(self, slots: Iterable[int]) -> bool:
        """Copy the oldest rows pinned in any of `slots` to the host; return whether there were."""
        wanted = set(slots)
        for rows in self._pinned:
            if not wanted.isdisjoint(rows.slots.tolist()):
                rows.to_host()
                return True
        return False

    def prepare_spill(self) -> Commit:
        """Copy all pinned rows to the host; return the commit, which unpins them."""
        copies = [(rows, self.read(rows.slots)) for rows in self._pinned]

        def commit() -> None:
            for rows, layers in copies:
                rows.move_to_host(layers)

        return commit

    # Restoring and copying.

    def prepare_rows(self, slot: int, rows: LayerRows) -> Commit:
        """Write `rows`, one state in host memory, to a free slot; return the commit.

        The commit adds layers that have no memory yet.

        Raises: SnapshotMismatchError for states of another form, DTypeError.
        """
        index, new = np.array([slot], np.int32), {}
        states = {layer: self._admitted(layer, arrays) for layer, arrays in rows.items()}
        write = self.backend.write_row_sets
        for layer, state in states.items():
            if layer in self.layers:
                [self.layers[layer]] = map(write, (self.layers[layer],), (state,), (index,), (0,))
            else:
                new[layer] = write(self._alloc_for(state), state, index, 0)
        # Another thread may read what a lazy framework would compute in this one only.
        self.backend.sync(*(array for layer in states for array in {**self.layers, **new}[layer]))
        return lambda: self.layers.update(new)

    def _admitted(self, layer: int, arrays: LayerArrays) -> Arrays:
        """Return a state in host memory as arrays ``[1, ...]`` of the backend."""
        check_state_rows([arrays])
        given = LayerForm(
            tuple(array.data.shape[2:] for array in arrays),
            tuple(_name_of(array) for array in arrays),
        )
        fixed = self._form_of(self.layers[layer]) if layer in self.layers else given
        if given != fixed or any(array.data.shape[1] != 1 for array in arrays):
            raise SnapshotMismatchError(
                f"a snapshot goes back to layers of the same states; layer {layer} has "
                f"{_described(fixed)} of one sequence, got {_described(given)} of "
                f"{arrays[0].data.shape[1]}."
            )
        return tuple(self.backend.from_host(array.data[0]) for array in arrays)

    def copied(self, target: Backend, lock: Lock) -> StateSlots:
        """Return a copy on `target`, without snapshots. Raises: DTypeError."""
        clone = StateSlots(target, self.count, lock)
        clone.layers = {
            layer: tuple(self._moved(buffer, target) for buffer in buffers)
            for layer, buffers in self.layers.items()
        }
        target.sync(*(buffer for buffers in clone.layers.values() for buffer in buffers))
        return clone

    def free(self) -> None:
        """Free all memory. What fails to be freed goes with its last use."""
        freed, self.layers, self._checked = self.layers, {}, {}
        for buffers in freed.values():
            for buffer in buffers:
                self.backend.free(buffer)

    def _moved(self, buffer: Array, target: Backend) -> Array:
        """Return a copy of `buffer` on `target` that shares no memory with it."""
        if target.spec == self.backend.spec:
            return target.concat([buffer], 0)
        return target.from_host(self.backend.to_host(buffer))


def _name_of(array: NamedArray) -> str:
    return next(name for name, dtype in HOST_DTYPES.items() if dtype == array.data.dtype)


def _described(form: LayerForm) -> str:
    pairs = zip(form.dtypes, form.shapes, strict=True)
    return ", ".join(f"{dtype}{list(shape)}" for dtype, shape in pairs)
