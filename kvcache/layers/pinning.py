"""Rows in the memory of a per-layer cache, pinned by snapshots and resume points."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Self

import numpy as np

from kvcache._interrupts import uninterrupted
from kvcache._types import Int32s
from kvcache.backends import Backend
from kvcache.snapshots.rows import LayerRows, RowOwner, Slots, TokenRows
from kvcache.snapshots.schedule import ResumePoints
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.arrays import LayerArrays

from .buffers import NAMES, Arrays, GrowingBuffers
from .padding import padding_array


class PinnedRows:
    """The pinned rows of one per-layer cache.

    rows: the rows pinned now, in most caches none.
    """

    def __init__(self) -> None:
        self.rows: dict[TokenRows, None] = {}  # a set that keeps the order of pinning

    def pin(self, rows: TokenRows) -> None:
        self.rows[rows] = None

    def unpin(self, rows: TokenRows) -> None:
        self.rows.pop(rows, None)

    def spill(self, position: int = 0) -> None:
        """Copy rows that reach `position` or beyond to the host, before their slots change."""
        for rows in list(self.rows):  # a list: to_host() unpins, and so changes `self.rows`
            if rows.positions.size and rows.positions[-1] >= position:
                rows.to_host()

    def savepoint(self) -> Callable[[], None]:
        """Return a function that pins again what is pinned now, and nothing else.

        Call it only while the slots of these rows have not been written to since.
        """
        pinned, undos = dict(self.rows), [rows.savepoint() for rows in self.rows]

        def undo() -> None:
            for undo_rows in undos:
                undo_rows()
            self.rows = pinned

        return undo


class LayerPins(PinnedRows, RowOwner):
    """Owner of the pinned rows in the buffers of a cache.

    padding: of the rows of the batch.
    """

    def __init__(self, buffers: GrowingBuffers, padding: Int32s | None) -> None:
        super().__init__()
        self._buffers = buffers
        self.padding = padding
        self.lock = nullcontext()  # nothing to guard: a per-layer cache belongs to one thread

    def savepoint(self) -> Callable[[], None]:
        undo_rows, padding = super().savepoint(), self.padding

        def undo() -> None:
            undo_rows()
            self.padding = padding

        return undo

    @property
    def token_bytes(self) -> int:
        return self._buffers.token_bytes

    def read(self, slots: Slots) -> LayerRows:
        if not slots.size:
            return {}
        # Snapshots number layers; a cache knows only its own, under 0.
        return {0: self.rows_of(self._buffers.read_tokens(self._buffers.arrays, slots))}

    def rows_of(self, arrays: LayerArrays) -> LayerArrays:
        """Return `arrays` of some tokens as rows of snapshots, which tell the padding."""
        return arrays if self.padding is None else (*arrays, padding_array(self.padding))

    def serves(self, backend: Backend, axis: int) -> bool:
        """Return whether a cache of `backend` with the tokens on `axis` can copy the rows itself.

        Not where slices are copies, each length compiled, nor of rows with padding.
        """
        buffers = self._buffers
        alike = buffers.backend is backend and buffers.axis == axis
        return alike and self.padding is None and backend.slices_are_views

    def arrays(self, slots: Slots) -> Arrays:
        """Return the rows in `slots` on the device: views of a run of them, else copies."""
        first, stop = int(slots[0]), int(slots[-1]) + 1
        if np.array_equal(slots, np.arange(first, stop)):
            return self._buffers.slots(first, stop)
        return self._buffers.gathered(self._buffers.arrays, slots)

    def detached(self, slots: Slots) -> tuple[RowOwner, Slots] | None:
        backend = self._buffers.backend
        if not (slots.size and backend.in_host_memory and backend.slices_are_views):
            return None
        copied = CopiedRows(self._buffers.of(self.arrays(slots)), self.padding)
        return copied, np.arange(slots.size)

    def capture(self, positions: Int32s, slots: Slots, start: int, stop: int) -> TokenRows:
        """Pin the rows of ``[start, stop)`` among `positions`, which are held in `slots`."""
        inside = (positions >= start) & (positions < stop)
        return TokenRows.resident(positions[inside], self, slots[inside])

    def retain_due(
        self,
        points: ResumePoints,
        positions: Int32s,
        slots: Slots,
        visibility: Visibility,
        offset: int,
    ) -> None:
        """Retain the rows needed by resume points up to `offset`, before they are displaced."""
        for position in points.due(offset):
            needed = visibility.needed(positions, position)
            with uninterrupted():  # rows are pinned before the points own them
                points.retain(position, TokenRows.resident(positions[needed], self, slots[needed]))


class CopiedRows(LayerPins):
    """Owner of rows copied out of a cache, in the memory of its framework.

    Nobody writes to them, so no rows are pinned: they are freed with the last that names them.
    """

    own_arrays = len(NAMES)

    @property
    def place(self) -> Hashable:
        padding = None if self.padding is None else self.padding.tobytes()
        return self._buffers.backend.spec, self._buffers.geometry, padding

    def pin(self, rows: TokenRows) -> None:
        """Do nothing."""

    def unpin(self, rows: TokenRows) -> None:
        """Do nothing."""

    def collect(self, parts: Sequence[tuple[Self, Slots]]) -> tuple[RowOwner, Slots]:
        buffers = self._buffers
        every = np.arange(buffers.capacity)
        if len(parts) == 1 and np.array_equal(parts[0][1], every):
            return self, every
        pieces = [owner.arrays(slots) for owner, slots in parts if slots.size]
        if not pieces:
            return self, every[:0]
        # Copies, though views would do: the memory of rows that go would stay.
        copied = CopiedRows(buffers.of(*pieces), self.padding)
        return copied, np.arange(copied._buffers.capacity)
