"""Recurrent states that snapshots refer to."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import Self

import numpy as np

from kvcache._types import Int32s
from kvcache.backends import Backend
from kvcache.backends.arrays import Arrays
from kvcache.snapshots.rows import LayerRows, RowOwner, Slots, TokenRows
from kvcache.storage.states import StateForm, to_rows

from .padding import padding_array
from .pinning import PinnedRows


class HeldStates(RowOwner):
    """Owner of the rows of one snapshot of a recurrent layer.

    The states are held, not copied: a cache replaces its states and never writes to one, so these
    rows need not be spilled while it goes on. A slot is the index of a state.

    pins: of the cache, which counts the states that are pinned as its memory; None for states that
        depend on no cache.
    padding: of the rows of the batch.
    """

    def __init__(
        self,
        form: StateForm,
        states: Sequence[Arrays],
        pins: PinnedRows | None,
        padding: Int32s | None,
    ) -> None:
        self._form, self._states, self._pins, self._padding = form, states, pins, padding
        self.own_arrays = 0 if pins is not None else len(form.shapes) * len(states)
        self.lock = nullcontext()  # nothing to guard: a per-layer cache belongs to one thread

    @property
    def token_bytes(self) -> int:
        return self._form.nbytes

    def at(self, slots: Slots) -> list[Arrays]:
        """Return the states in `slots`."""
        return [self._states[slot] for slot in slots.tolist()]

    @property
    def place(self) -> Hashable:
        padding = None if self._padding is None else self._padding.tobytes()
        return self._form.backend.spec, self._form.shapes, self._form.dtypes, padding

    def collect(self, parts: Sequence[tuple[Self, Slots]]) -> tuple[RowOwner, Slots]:
        # Without the other states, which would stay in memory.
        states = [state for owner, slots in parts for state in owner.at(slots)]
        return self._of(states, self._pins), np.arange(len(states))

    def detached(self, slots: Slots) -> tuple[RowOwner, Slots] | None:
        backend = self._form.backend
        if not backend.in_host_memory:
            return None
        # Copies where frameworks write in place: the cache may give its own to a program.
        states = [backend.owned(state) for state in self.at(slots)]
        for state in states:
            backend.evaluate(*state)
        return self._of(states, None), np.arange(slots.size)

    def serves(self, backend: Backend) -> bool:
        """Return whether a cache of `backend` can have the states themselves, to never change."""
        return self._pins is None and self._padding is None and self._form.backend is backend

    def _of(self, states: Sequence[Arrays], pins: PinnedRows | None) -> HeldStates:
        return HeldStates(self._form, states, pins, self._padding)

    def read(self, slots: Slots) -> LayerRows:
        if not slots.size:
            return {}
        # Snapshots number layers; a cache knows only its own, under 0.
        arrays = to_rows(self._form.backend, self.at(slots))
        return {0: arrays if self._padding is None else (*arrays, padding_array(self._padding))}

    def pin(self, rows: TokenRows) -> None:
        if self._pins is not None:
            self._pins.pin(rows)

    def unpin(self, rows: TokenRows) -> None:
        if self._pins is not None:
            self._pins.unpin(rows)


def pinned_states(pins: PinnedRows) -> list[tuple[Arrays, StateForm]]:
    """Return the states that rows of snapshots pin, each with its form, with repetitions."""
    owned = ((rows.owner, rows.slots) for rows in pins.rows)
    return [
        (state, owner._form)
        for owner, slots in owned
        if isinstance(owner, HeldStates)
        for state in owner.at(slots)
    ]
