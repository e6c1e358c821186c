"""Recurrent states that snapshots refer to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from kvcache._types import Int32s
from kvcache.backends.arrays import Arrays
from kvcache.snapshots.rows import LayerRows, Slots, TokenRows
from kvcache.storage.states import StateForm, to_rows

from .padding import padding_array
from .pinning import PinnedRows


class HeldStates:
    """Owner of the rows of one snapshot of a recurrent layer; implements :class:`RowOwner`.

    The states are held, not copied: a cache replaces its states and never writes to one, so these
    rows need not be spilled while it goes on. A slot is the index of a state.

    pins: of the cache, which counts the states that are pinned as its memory.
    padding: of the rows of the batch.
    """

    def __init__(
        self,
        form: StateForm,
        states: Sequence[Arrays],
        pins: PinnedRows,
        padding: Int32s | None,
    ) -> None:
        self._form, self._states, self._pins, self._padding = form, states, pins, padding
        self.lock = nullcontext()  # nothing to guard: a per-layer cache belongs to one thread

    @property
    def token_bytes(self) -> int:
        return self._form.nbytes

    def at(self, slots: Slots) -> list[Arrays]:
        """Return the states in `slots`."""
        return [self._states[slot] for slot in slots.tolist()]

    def read(self, slots: Slots) -> LayerRows:
        if not slots.size:
            return {}
        # Snapshots number layers; a cache knows only its own, under 0.
        arrays = to_rows(self._form.backend, self.at(slots))
        return {0: arrays if self._padding is None else (*arrays, padding_array(self._padding))}

    def pin(self, rows: TokenRows) -> None:
        self._pins.pin(rows)

    def unpin(self, rows: TokenRows) -> None:
        self._pins.unpin(rows)


def pinned_states(pins: PinnedRows) -> list[Arrays]:
    """Return the states that rows of snapshots pin, with repetitions."""
    owned = ((rows.owner, rows.slots) for rows in pins.rows)
    return [
        state
        for owner, slots in owned
        if isinstance(owner, HeldStates)
        for state in owner.at(slots)
    ]
