"""Recurrent states of one layer: those that are held, their snapshots, copies and files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar, NamedTuple, Self, TypeAlias

import numpy as np

from kvcache._types import Int32s
from kvcache.backends import Array, Backend, get_backend, transfer
from kvcache.backends.arrays import Arrays
from kvcache.errors import KVCacheError
from kvcache.snapshots.rows import TokenRows
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.admission import refuse_exported
from kvcache.storage.arrays import LayerArrays, NamedArray
from kvcache.storage.states import (
    STATE_AXES,
    TOKEN_AXIS,
    StateForm,
    admitted,
    check_state_rows,
    from_row,
    kept_positions,
    to_rows,
)

from .checkpoint import Names, savepoint
from .exports import Export
from .held import HeldStates, pinned_states
from .padding import check_padding, common_padding, padding_array, without_padding
from .pinning import PinnedRows
from .rewind import Rewind
from .stack import StandaloneCache

States: TypeAlias = Mapping[int, Arrays]
"""States by the position that they are behind, ascending; replaced, never changed."""


class Coming(NamedTuple):
    """An update announced by :meth:`StateCache.cuts`.

    tokens: their number; 0 for no update. states: recorded inside of it. form: of these, None
    while there are none.
    """

    tokens: int
    states: States
    form: StateForm | None


NO_UPDATE = Coming(0, {}, None)


class CopyableStates(StandaloneCache):
    """A cache of recurrent states, which are replaced and never written to."""

    _changing: ClassVar[Names] = (
        "_form",
        "_offset",
        "_state",
        "_shared",
        "_kept",
        "_points",
        "_checkpoint",
        "_coming",
        "_export",
        "_pins",
        "_padding",
        "rewound",
    )
    """Attributes that calls assign to; the pins have a savepoint of their own."""

    def __init__(self, backend: str | Backend | None = None) -> None:
        self._asked_backend = backend
        self._asked = None if backend is None else get_backend(backend)
        self._start()

    def _start(self) -> None:
        """Become empty, keeping the options."""
        self._form: StateForm | None = None
        self._offset = 0
        self._state: Arrays = ()
        # Arrays of the present state that may be known elsewhere, as those of a copy.
        self._shared: Arrays = ()
        self._kept: States = {}
        self._points: frozenset[int] = frozenset()
        self._checkpoint: int | None = None
        self._coming = NO_UPDATE
        self._export: Export | None = None
        self._pins = PinnedRows()
        self._padding: Int32s | None = None
        self.rewound = Rewind(0)

    def __repr__(self) -> str:
        place = self.backend.spec if self.backend else "the backend of its first array"
        return f"<{type(self).__name__} offset={self.offset} on {place}>"

    # What is held.

    @property
    def offset(self) -> int:
        return self._offset

    @property
    def backend(self) -> Backend | None:
        return self._asked if self._form is None else self._form.backend

    @property
    def dtype(self) -> tuple[str, ...] | None:
        """Dtypes of the arrays of a state; None before the first one."""
        return None if self._form is None else self._form.dtypes

    @property
    def nbytes(self) -> int:
        """Bytes of all states: the present one, those kept, and those of resident snapshots.

        A copy of the cache counts the states that the two share once more.
        """
        form = self._form or self._coming.form
        if form is None:
            return 0
        own = self._state, *self._kept.values(), *self._coming.states.values()
        distinct = {id(state): form.nbytes for state in own if state}
        # Snapshots may be of other rows than there are now.
        distinct |= {id(state): pinned.nbytes for state, pinned in pinned_states(self._pins)}
        return sum(distinct.values()) + (self._export is not None) * form.nbytes

    @property
    def state(self) -> tuple[Array, ...]:
        """Arrays behind the tokens seen; () for none. Read-only.

        They keep their values when the cache changes, unless a program has them
        (:meth:`export_state`).
        """
        self.check_not_exported()
        if self.backend is not None and self.backend.assignment_rebinds:
            return tuple(array[...] for array in self._state)
        return self._state

    @property
    def kept(self) -> tuple[int, ...]:
        """Positions behind which a state is held, ascending; the last is :attr:`offset`."""
        self.check_not_exported()
        return (*self._kept, self._offset) if self._state else ()

    def check_not_exported(self) -> None:
        if self._export is not None:
            refuse_exported()

    def savepoint(self) -> Callable[[], None]:
        return savepoint(self, self._changing, [self._pins])

    def _to_keep(self, stop: int) -> States:
        """Return the states kept below `stop` without a checkpoint: those of resume points."""
        return {p: state for p, state in self._kept.items() if p < stop and p in self._points}

    # Snapshots.

    @property
    def visibility(self) -> Visibility:
        # The state behind p is the row of p - 1, and all that is needed to go on at p.
        return Visibility(window=1)

    def capture(self, start: int, stop: int) -> TokenRows:
        self.check_not_exported()
        held = {
            position: state
            for position, state in self._held().items()
            # States of a draft are of no use behind it.
            if start < position <= stop and (position in self._points or position == stop)
        }
        if self._form is None or not held:
            return TokenRows(np.empty(0, np.int32))
        owner = HeldStates(self._form, [*held.values()], self._pins, self._padding)
        return TokenRows.resident(np.array([*held], np.int32) - 1, owner, np.arange(len(held)))

    def _held(self) -> States:
        """Return all states that the cache has."""
        return {**self._kept, self._offset: self._state} if self._state else {}

    def restore_rows(self, parts: Sequence[TokenRows], offset: int, backend: Backend) -> None:
        indices = [np.flatnonzero(rows.positions == offset - 1) for rows in parts]
        rows, index = [pair for pair in zip(parts, indices, strict=True) if pair[1].size][-1]
        owner = rows.owner
        if isinstance(owner, HeldStates) and owner.serves(backend) and self._padding is None:
            [state] = owner.at(rows.slots[index[-1:]])
            self._fill({offset: state}, offset, backend, None, shared=True)
            return
        layer = rows.read(index[-1:]).get(0, ())  # 0: see HeldStates.read
        padding = common_padding([layer], self._padding)
        layer, _ = without_padding(layer)
        check_state_rows([layer])
        self._fill({offset: from_row(backend, layer, 0)}, offset, backend, padding)

    def _fill(
        self,
        states: States,
        offset: int,
        backend: Backend,
        padding: Int32s | None,
        shared: bool = False,
    ) -> None:
        """Take over `states`, the last of them behind `offset`, into this empty cache.

        shared: whether they are known elsewhere.
        """
        state, rewound = states[offset], Rewind(0, refilled=True)
        form = admitted(state, self._form, backend)
        check_padding(padding, form.shapes[0][0])
        kept = {position: earlier for position, earlier in states.items() if position < offset}
        points, known = self._points.union(kept), state if shared else ()
        # One statement: no signal handler runs in between.
        (
            self._form,
            self._state,
            self._offset,
            self._kept,
            self._points,
            self._checkpoint,
            self._coming,
            self._padding,
            self._shared,
            self.rewound,
        ) = form, state, offset, kept, points, None, NO_UPDATE, padding, known, rewound

    # Copies and files.

    @property
    def options(self) -> Mapping[str, int | str | None]:
        return {}

    def _resumable(self) -> States:
        """Return the states of a copy: the present one, and those of resume points."""
        return {**self._to_keep(self._offset), self._offset: self._state}

    def copy(self) -> Self:
        """Return an independent cache with the same states; no checkpoint, no schedule.

        The two share the states, which neither writes to: nothing is copied.
        """
        self.check_not_exported()
        clone = self.make(self._asked_backend, self.options)
        clone._padding = self._padding
        if self._form is not None and self._state:
            self._shared = self._state
            states, backend = self._resumable(), self._form.backend
            clone._fill(states, self._offset, backend, self._padding, shared=True)
        return clone

    def to_backend(self, backend: str | Backend) -> Self:
        """Return an independent cache on `backend`, equal bit for bit; no checkpoint, no schedule.

        The states are shared where the two frameworks can share memory, because neither cache
        writes to them, and else copied through the host. This cache stays as it is.

        Raises: DTypeError where `backend` lacks a dtype; UnknownBackendError,
            BackendNotAvailableError.
        """
        self.check_not_exported()
        target = get_backend(backend)
        clone = self.make(target, self.options)
        clone._padding = self._padding
        if self._form is not None and self._state:
            self._shared = self._state
            move = partial(transfer, source=self._form.backend, target=target, axes=STATE_AXES)
            states = {p: tuple(map(move, state)) for p, state in self._resumable().items()}
            target.sync(*(array for state in states.values() for array in state))
            clone._fill(states, self._offset, target, self._padding, shared=True)
        return clone

    def to_layer(self) -> LayerArrays:
        self.check_not_exported()
        if self._form is None or not self._state:
            return ()
        states = self._resumable()
        positions = NamedArray("positions", np.array([*states], np.int32), TOKEN_AXIS)
        rows = positions, *to_rows(self._form.backend, [*states.values()])
        return rows if self._padding is None else (*rows, padding_array(self._padding))

    def from_layer(self, arrays: LayerArrays, offset: int) -> None:
        if self.backend is None:
            raise KVCacheError("a cache that is filled from the host names a backend; got none.")
        arrays, padding = without_padding(arrays)
        positions = kept_positions(arrays, offset)
        backend = self.backend
        states = {p: from_row(backend, arrays[1:], row) for row, p in enumerate(positions)}
        self._fill(states, offset, backend, padding)
