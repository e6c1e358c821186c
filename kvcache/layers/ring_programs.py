"""Rotating caches in the form for compiled programs: a ring, which turns by one token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvcache.backends import Array
from kvcache.errors import StateError
from kvcache.storage.lengths import padded_index, padded_positions

from .arena import Ring
from .buffers import GrowingBuffers, traced_forms
from .columns import Sizes
from .exports import State, check_room, new_owner
from .rewind import Rewind
from .ring_copies import CopyableRing
from .state import RingState


class ExportableRing(CopyableRing):
    """A rotating cache whose tokens are given to programs, and taken back, in a copy."""

    def _exported(self, tokens: int) -> State:
        arena, owner = self._with_room(0), new_owner()
        backend = arena.backend
        self._retain(arena, self._first, self._offset, self._offset)
        self._spill()
        ring = self._program_ring
        slots = min(self._offset + tokens, ring.size)
        capacity = Sizes.on(backend, self._step, ring.size).grown(slots).capacity
        positions = ring.positions(self._offset)
        held = np.pad(arena.slots_of(positions), (0, capacity - positions.size), "edge")
        make_state = self._state_maker(capacity, owner, arena.likes())
        keys, values = traced_forms(backend, arena.gathered(arena.arrays, held))
        arrays = arena.arrays
        try:
            self._show_held()
            return self._given_away(arena, make_state(keys, values), owner)
        except BaseException:
            arena.arrays = arrays  # they were only dropped
            raise

    def _state_maker(
        self, capacity: int, owner: int, likes: tuple[Array, Array]
    ) -> Callable[[Array, Array], RingState]:
        padding = self._padding_array()
        ring, offset = self._program_ring, self._offset
        numbers = self._on_device(
            offset,
            padded_positions(ring.positions(offset), capacity),
            owner,
            offset if offset < ring.size else ring.slot(offset),
            ring.keep,
            self.keep,
            ring.window,
            ring.size if capacity >= ring.size else np.iinfo(np.int32).max,
        )
        offset_array, positions, owner_array, slot, sinks, keep, window, size = numbers
        return lambda keys, values: RingState(
            keys,
            values,
            offset_array,
            positions,
            likes,
            owner_array,
            slot,
            sinks,
            keep,
            window,
            size,
            padding,
        )

    @property
    def _program_ring(self) -> Ring:
        """Layout of the form for programs, without sinks of rows that were dropped."""
        return self._ring._replace(keep=self._sinks)

    def _take_over(self, buffers: GrowingBuffers, state: State, offset: int) -> None:
        backend, capacity = buffers.backend, state.keys.shape[buffers.axis]
        ring = self._program_ring
        check_room(offset, min(offset, ring.size), capacity)
        positions = ring.positions(offset)
        # Also an older state whose arrays a later append has changed: one in place (NumPy, torch).
        if not np.array_equal(
            backend.to_host(state.positions), padded_positions(positions, capacity)
        ):
            raise StateError(
                f"the tokens of a ring are those before its offset, {offset}; a program has "
                "displaced some of them. Import the last state: a ring cannot go back in a program."
            )
        ascending = np.argsort(positions)
        index = backend.from_host(padded_index(backend, ascending), "int32")
        arrays = (state.keys, state.values)
        rows = tuple(
            [
                backend.traced_read_rows(array, index, buffers.axis, backend.dtype(dtype))
                for array, dtype in zip(arrays, buffers.geometry.dtypes, strict=True)
            ]
        )
        rewound = Rewind.after(self.rewound, offset, self._offset)
        undo = self.savepoint()
        try:
            if ring != self._ring:  # another arena, for fewer sinks
                self._ring, self._buffers = ring, None
            self._place(rows, ascending.size, offset, spare=True)
            # One statement: no signal handler runs in between.
            (
                self._offset,
                self._checkpoint,
                self._export,
                self._admission.exported,
                self.rewound,
            ) = offset, None, None, False, rewound
        except BaseException:
            undo()
            raise
