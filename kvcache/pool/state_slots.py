"""Slots of recurrent states on the device: one holds the state of a sequence in all layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from kvcache._locks import Lock
from kvcache._types import Int32s
from kvcache.backends import HOST_DTYPES, Array, Backend, HostArray, nbytes
from kvcache.backends.arguments import refuse_traced
from kvcache.backends.arrays import Arrays, DType
from kvcache.backends.base import FastKey
from kvcache.errors import (
    DTypeError,
    KVCacheError,
    ShapeError,
    SnapshotMismatchError,
    StateError,
)
from kvcache.snapshots.rows import LayerRows, RowOwner, Slots, TokenRows
from kvcache.storage.admission import check_owner
from kvcache.storage.arrays import LayerArrays, NamedArray
from kvcache.storage.lengths import padded_index
from kvcache.storage.states import TOKEN_AXIS, check_state_layers, check_state_rows

from .checks import refuse_gradients
from .exchange import check_form, convert
from .owned import Commit
from .plan import PoolState

SLOT_AXES = "tc"
"""The first axes of buffers, by the letters of :meth:`Backend.alloc_axes`: slots, channels."""
Likeness: TypeAlias = tuple[FastKey, ...]
"""Properties of arrays that are alike where no check is needed."""


class LayerForm(NamedTuple):
    """Shapes, without the axis of slots, and dtypes of the arrays of one layer."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


class StateSlots(RowOwner):
    """Buffers of `count` slots for every layer, and the owner of rows that snapshots pin in them.

    Slot 0 is never written to: its zeros are the state of a fresh sequence. A pass writes to slots
    that nobody holds, never to one that is history, so a write that fails leaves nothing to undo.

    lock: that of the cache, held during every access.
    """

    def __init__(self, backend: Backend, count: int, lock: Lock) -> None:
        self.backend, self.count, self.lock = backend, count, lock
        self.layers: dict[int, Arrays] = {}
        self.forms: dict[int, LayerForm] = {}
        """Of the layers; buffers in the form for programs may carry bits of another dtype."""
        # The buffers as exported last, unless the cache has used them since.
        self._exported: PoolState | None = None
        self._maybe_traced = False  # True while any buffer may be in the form for programs
        self._traced_dtypes: dict[str, DType] = {}  # by name of the dtype outside of programs
        self._checked: dict[int, Likeness] = {}  # of the arrays put last in a layer
        # A set in order of pinning: the oldest spill first.
        self._pinned: dict[TokenRows, None] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.token_bytes * self.count

    # Reading and writing.

    def get(self, layer: int, slots: Int32s) -> Arrays:
        """Return copies of the states in `slots`, ``[slots, ...]``."""
        read, buffers = self.backend.read_rows, self._settled()[layer]
        return tuple([read(buffer, slots, 0) for buffer in buffers])

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
            self._first_put(layer, rows, slots)
            return
        if slots.size:
            layers, write = self._settled(), self.backend.write_row_sets
            self._exported = None
            # Unpacked from map(): no signal handler runs between the call, which may consume the
            # buffers, and the assignment.
            [layers[layer]] = map(write, (layers[layer],), (rows,), (slots,), (0,))
            # They are not returned, so nobody else has them computed before the next pass.
            self.backend.evaluate(*layers[layer])

    def _first_put(self, layer: int, rows: Arrays, slots: Int32s) -> None:
        """Allocate a layer, with `rows` in `slots`."""
        form = self._form_of(rows)
        buffers = self._alloc(form)
        if slots.size:
            buffers = self.backend.write_row_sets(buffers, rows, slots, 0)
            self.backend.evaluate(*buffers)
        self._add({layer: buffers}, {layer: form})

    def allocate(self, layers: Iterable[int], form: LayerForm) -> None:
        """Allocate the buffers of all `layers`, or of none. Raises: ShapeError, DTypeError."""
        wanted = [*layers]
        for layer in wanted:
            self._check_form(layer, form)
        new = {layer: self._alloc(form) for layer in {*wanted} - self.layers.keys()}
        self._add(new, dict.fromkeys(new, form))

    def _alloc(self, form: LayerForm) -> Arrays:
        pairs = zip(*form, strict=True)
        alloc = self.backend.alloc_axes
        return tuple(alloc((self.count, *shape), dtype, SLOT_AXES) for shape, dtype in pairs)

    def _add(self, layers: dict[int, Arrays], forms: dict[int, LayerForm]) -> None:
        """Take over new layers. Other threads that go through the layers keep their own lists."""
        self.forms, self.layers, self._exported = (
            {**self.forms, **forms},
            {**self._settled(), **layers},
            None,
        )

    def _form_of(self, arrays: Arrays) -> LayerForm:
        shapes = tuple(tuple(array.shape[1:]) for array in arrays)
        return LayerForm(shapes, tuple(map(self.backend.dtype_name, arrays)))

    # Programs.

    def export(self) -> PoolState:
        """Return all buffers by layer in the form for :mod:`kvcache.functional`."""
        # Exported twice without use in between, the state is the same: no conversion.
        if self._exported is None:
            self._maybe_traced = True
            convert(self.layers, self.backend.traced_form)
            self._exported = dict(self.layers)
        return self._exported

    def prepare_import(self, state: PoolState) -> Commit:
        """Return a commit to replace the buffers by those of `state`, derived from exported ones.

        Raises: ShapeError if layers, shapes or dtypes differ, StateError for consumed arrays.
        """
        check_form({layer: self._traced_form(form) for layer, form in self.forms.items()}, state)
        if any(self.backend.is_deleted(array) for arrays in state.values() for array in arrays):
            raise StateError(
                "arrays of this state were consumed by a program. Assign the state that the last "
                "program returned."
            )
        imported, layers = dict(state), {layer: tuple(arrays) for layer, arrays in state.items()}

        def commit() -> None:
            self.layers, self._exported, self._maybe_traced = layers, imported, True

        return commit

    def _traced_form(self, form: LayerForm) -> list[tuple[tuple[int, ...], DType]]:
        return [
            ((self.count, *shape), self._traced_dtype(dtype))
            for shape, dtype in zip(*form, strict=True)
        ]

    def _traced_dtype(self, dtype: str) -> DType:
        if dtype not in self._traced_dtypes:
            like = self.backend.alloc((1,), dtype)
            self._traced_dtypes[dtype] = self.backend.traced_form(like).dtype
        return self._traced_dtypes[dtype]

    def likes(self, lead: tuple[int, ...]) -> dict[int, dict[int, Array]]:
        """Return `likes` of a :class:`StatePlan`. lead: axes in front."""
        bits: dict[int, dict[int, Array]] = {}
        for layer, form in self.forms.items():
            for number, dtype in enumerate(form.dtypes):
                if self._traced_dtype(dtype) != self.backend.dtype(dtype):
                    empty = self.backend.alloc((*lead, 0), dtype)
                    bits.setdefault(layer, {})[number] = empty
        return bits

    def _settled(self) -> dict[int, Arrays]:
        """Return the buffers by layer, back from programs.

        Raises: KVCacheError if a program has consumed them.
        """
        if self._maybe_traced:
            self._check_present()
            self._exported = None
            for layer, form in self.forms.items():
                for number, dtype in enumerate(form.dtypes):
                    present = self.layers[layer]
                    taken_back = self.backend.from_traced(present[number], dtype)
                    self.layers[layer] = *present[:number], taken_back, *present[number + 1 :]
            self._maybe_traced = False
        return self.layers

    def _check_present(self) -> None:
        deleted = self.backend.is_deleted
        if any(deleted(buffer) for buffers in self.layers.values() for buffer in buffers):
            raise KVCacheError(
                "a program has the states of this cache. Assign the state that it returned to "
                "program_state."
            )

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
        self._check_form(layer, self._form_of(arrays))

    def _check_form(self, layer: int, form: LayerForm) -> None:
        if form != (fixed := self.forms.get(layer, form)):
            kind = DTypeError if form.shapes == fixed.shapes else ShapeError
            raise kind(
                f"states of a layer keep the number, shapes and dtypes of the first: layer {layer} "
                f"has {_described(fixed)}; got {_described(form)}."
            )

    # As the owner of rows.

    @property
    def token_bytes(self) -> int:
        pairs = (pair for form in self.forms.values() for pair in zip(*form, strict=True))
        return sum(nbytes(shape, dtype) for shape, dtype in pairs)

    def read(self, slots: Slots) -> LayerRows:
        """Return host copies of the states in `slots`, as rows of a batch of one."""
        if not slots.size:
            return {}
        index = padded_index(self.backend, slots).astype(np.int32)
        with self.lock:
            return {
                layer: tuple(
                    NamedArray(f"state{number}", rows[: slots.size, None], TOKEN_AXIS)
                    for number, rows in enumerate(self._on_host(layer, index))
                )
                for layer in self.layers
            }

    def _on_host(self, layer: int, index: Int32s) -> list[HostArray]:
        """Return host copies of the states at `index`.

        Buffers stay in the form for programs: another thread may be running one.
        """
        if self._maybe_traced:
            self._check_present()
        backend, dtypes = self.backend, self.forms[layer].dtypes
        rows = [backend.read_rows(buffer, index, 0) for buffer in self.layers[layer]]
        return [
            backend.to_host(backend.from_traced(copied, dtype))
            for copied, dtype in zip(rows, dtypes, strict=True)
        ]

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

    def prepare_rows(self, slot: int, rows: LayerRows, *, extend: bool) -> Commit:
        """Write `rows`, one state in host memory, to a free slot; return the commit.

        extend: whether the commit may add layers that have no memory yet.

        Raises: SnapshotMismatchError for states of another form or other layers, DTypeError.
        """
        index, new, layers = np.array([slot], np.int32), {}, self._settled()
        states = {layer: self._admitted(layer, arrays) for layer, arrays in rows.items()}
        check_state_layers(rows.keys(), layers.keys(), extend=extend)
        write, self._exported = self.backend.write_row_sets, None
        for layer, state in states.items():
            if layer in layers:
                [layers[layer]] = map(write, (layers[layer],), (state,), (index,), (0,))
            else:
                new[layer] = write(self._alloc(self._form_of(state)), state, index, 0)
        # Another thread may read what a lazy framework would compute in this one only.
        self.backend.sync(*(array for layer in states for array in {**layers, **new}[layer]))
        forms = {layer: self._form_of(states[layer]) for layer in new}
        return lambda: self._add(new, forms)

    def _admitted(self, layer: int, arrays: LayerArrays) -> Arrays:
        """Return a state in host memory as arrays ``[1, ...]`` of the backend."""
        check_state_rows([arrays])
        given = LayerForm(
            tuple(array.data.shape[2:] for array in arrays),
            tuple(_name_of(array) for array in arrays),
        )
        fixed = self.forms.get(layer, given)
        if given != fixed or any(array.data.shape[1] != 1 for array in arrays):
            raise SnapshotMismatchError(
                f"a snapshot goes back to layers of the same states; layer {layer} has "
                f"{_described(fixed)} of one sequence, got {_described(given)} of "
                f"{arrays[0].data.shape[1]}."
            )
        from_host = self.backend.from_host_axes
        return tuple(from_host(array.data[0], SLOT_AXES) for array in arrays)

    def copied(self, target: Backend, lock: Lock) -> StateSlots:
        """Return a copy on `target`, without snapshots. Raises: DTypeError."""
        clone = StateSlots(target, self.count, lock)
        clone.layers = {
            layer: tuple(self._moved(buffer, target) for buffer in buffers)
            for layer, buffers in self._settled().items()
        }
        clone.forms = dict(self.forms)
        target.sync(*(buffer for buffers in clone.layers.values() for buffer in buffers))
        return clone

    def free(self) -> None:
        """Free all memory. What fails to be freed goes with its last use."""
        freed, self.layers, self.forms, self._checked = self.layers, {}, {}, {}
        for buffers in freed.values():
            for buffer in buffers:
                self.backend.free(buffer)

    def _moved(self, buffer: Array, target: Backend) -> Array:
        """Return a copy of `buffer` on `target` that shares no memory with it."""
        if target.spec == self.backend.spec and target.owns(buffer):
            return target.concat([buffer], 0)
        return target.from_host_axes(self.backend.to_host(buffer), SLOT_AXES)


def _name_of(array: NamedArray) -> str:
    return next(name for name, dtype in HOST_DTYPES.items() if dtype == array.data.dtype)


def _described(form: LayerForm) -> str:
    pairs = zip(form.dtypes, form.shapes, strict=True)
    return ", ".join(f"{dtype}{list(shape)}" for dtype, shape in pairs)
