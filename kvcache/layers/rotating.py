"""The rotating per-layer cache: the latest tokens, and the first ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Self

import numpy as np

from kvcache._checks import NO_LIMIT, as_index, as_indices, as_room
from kvcache._types import Int32s
from kvcache.backends import Array, Backend
from kvcache.errors import StateError, TrimError
from kvcache.snapshots.rows import Slots, TokenRows
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.lengths import padded_index, padded_positions, round_up

from .arena import Arena, Placement, Ring, arena_columns, place
from .buffers import Arrays, GrowingBuffers, traced_forms
from .checkpoint import Checkpoint, Names
from .columns import Sizes
from .exports import State, check_room, new_owner
from .growing import KVCache
from .padding import check_padding
from .pinning import LayerPins
from .rewind import Rewind
from .state import RingState


class RotatingKVCache(KVCache):
    """Bounded cache for one layer: the first `keep` tokens and the latest others.

    A query sees itself, the ``max_size - keep - 1`` tokens before it, and the first `keep`
    tokens (attention sinks, StreamingLLM, arXiv:2309.17453), however many tokens an update
    brings: one of several tokens returns the columns of all their windows, and the mask tells
    them apart. Columns ascend by position, sinks first: ``max_size - 1`` of them and those of the
    update, more where the backend pads, or where a checkpoint or `slack` and sinks hold others.

    The tokens lie in buffers of about twice the window, and move to their front once per window.

    max_size: tokens that a query sees, sinks included. keep: sinks.
    slack: further tokens to hold, so that as many can be trimmed at any time.
    Others as for :class:`KVCache`; `capacity` beyond that of a full ring has no effect.
    """

    kind: ClassVar[str] = "rotating"
    _buffers: Arena | None
    _changing: ClassVar[Names] = (*KVCache._changing, "_ring", "_first", "_lead", "_latest", "_wide")

    def __init__(
        self,
        max_size: int,
        keep: int = 0,
        backend: str | Backend | None = None,
        step: int = 256,
        dtype: str | None = None,
        *,
        slack: int = 0,
        capacity: int = 0,
        layout: str = "bhtd",
    ) -> None:
        max_size, keep = as_index(max_size, "max_size"), as_index(keep, "keep")
        if max_size < 1:
            raise ValueError(f"max_size must be >= 1 token; got {max_size}.")
        if not 0 <= keep < max_size:
            raise ValueError(
                f"keep must be 0 to max_size - 1, so that a window is left; "
                f"got keep={keep} with max_size={max_size}."
            )
        # A larger ring never drops a token, and larger numbers do not fit the int32 of masks.
        self.max_size = min(max_size, NO_LIMIT)
        self.keep = min(keep, self.max_size - 1)
        self.slack = min(as_room(slack, "slack"), NO_LIMIT)
        self._window = self.max_size - self.keep
        # A buffer never outgrows the ring, whatever its step.
        step = min(as_index(step, "step"), NO_LIMIT)
        self._configure(backend, step, dtype, capacity, layout)

    def _start(self) -> None:
        super()._start()
        self._ring = Ring(self._window, self.keep, self.slack)
        self._first = 0  # first position held, sinks aside
        # Of the last update: its first column behind the sinks, its tokens, and the positions of
        # its columns if they were no slots.
        self._lead, self._latest = 0, 0
        self._wide: Int32s | None = None

    @property
    def options(self) -> Mapping[str, int | str | None]:
        slack = {"slack": self.slack} if self.slack else {}
        return {"max_size": self.max_size, "keep": self.keep, **super().options, **slack}

    @property
    def len(self) -> int:
        dropped = self._first - self._sinks
        return self._offset if dropped <= 0 else self._offset - dropped

    def _sizes(self) -> Sizes:
        if self._buffers is None and self.backend is not None:
            return self._ring.sizes(self.backend, self._step)
        return super()._sizes()

    # Writing.

    def update(self, keys: Array, values: Array) -> tuple[Array, Array]:
        start, arena = self._offset, self._buffers
        if arena is None or self._points.scheduled:
            return self._updated_carefully(keys, values)
        stop = start + self._admission.validate(keys, values)
        if stop - arena.shift > arena.capacity or (self._ring.keep and stop > self._ring.size):
            return self._updated_carefully(keys, values)
        lead = 0 if self._ring.keep else max(0, start + 1 - self._window)
        shift = arena.shift
        try:
            columns = arena.append(keys, values, start - shift, stop - shift, lead - shift)
            if self._admission.requires_grad:
                first = start - shift - arena.sizes.span(lead - shift, stop - shift)[0]
                columns = arena.with_gradients(columns, (keys, values), first)
            self._commit(stop, lead)
        except BaseException:
            arena.take_back(stop - shift)
            raise
        return columns

    def _commit(self, stop: int, lead: int, wide: Int32s | None = None) -> None:
        """Count the tokens up to `stop` as held, and remember the columns of their update."""
        # One statement: no signal handler runs in between.
        self._first, self._latest, self._offset, self._lead, self._wide = (
            max(self._first, stop - self._window - self.slack),
            stop - self._offset,
            stop,
            lead,
            wide,
        )

    def _updated_carefully(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """Do any :meth:`update`, also one that moves tokens, drops some behind sinks, or is long."""
        update, undo = (keys, values), self.savepoint()
        try:
            stop = self._offset + self._admission.validate(keys, values)
            arena, lead = self._with_room(0), self._lead_of(stop)
            behind, growing = 0 < self._ring.keep < lead, self._checkpoint is not None
            placement = arena.placement(self._floor, stop, behind, growing)
            self._retain(arena, self._floor, self._offset, self._offset)
            if placement.wide:
                return self._updated_widely(arena, placement, update, stop)
            sinks = self._sinks_by(arena, update) if behind else ()
            if sinks or arena.moves_to(placement):
                self._spill()
            arena.make_room(placement, self._floor, self._offset, sinks)
            if behind and arena.backend.slices_are_views:
                return self._updated_behind_sinks(arena, update, lead, stop)
            slots = (arena.slot(position) for position in (self._offset, stop, lead))
            return self._counted(arena, arena.append(*update, *slots), update, stop)
        except BaseException:
            undo()
            raise

    def _counted(
        self, arena: Arena, columns: Arrays, update: Arrays, stop: int
    ) -> tuple[Array, Array]:
        """Count an update in the arena as held; return its columns, with gradients."""
        lead = self._lead_of(stop)
        if self._admission.requires_grad:
            first, _ = arena.sizes.span(*arena.bounds(lead, stop))
            columns = arena.with_gradients(columns, update, arena.slot(self._offset) - first)
        # Points inside: none needs a token before the windows of this update.
        self._retain(arena, lead, stop, stop - 1)
        self._commit(stop, lead)
        keys, values = columns
        return keys, values

    def _updated_behind_sinks(
        self, arena: Arena, update: Arrays, lead: int, stop: int
    ) -> tuple[Array, Array]:
        """Append an update, and return the sinks and the windows of its queries."""
        # A token to be dropped is among those overwritten, and counts until then.
        displaced = arena.rows_before(lead)
        try:
            arena.arrays = arena.written(update, arena.slot(self._offset), arena.slot(stop))
            arena.arrays = arena.with_sinks_before(lead, arena.sinks)
            columns = arena.view(*arena.bounds(lead, stop))
            return self._counted(arena, columns, update, stop)
        except BaseException:
            arena.arrays = arena.with_sinks_before(lead, displaced)
            raise

    def _updated_widely(
        self, arena: Arena, placement: Placement, update: Arrays, stop: int
    ) -> tuple[Array, Array]:
        """Append an update too long for the arena, which gets its last tokens only."""
        start, kept, sinks = self._offset, self._ring.first(stop), self._sinks_by(arena, update)
        positions = self._wide_columns(arena.sizes, arena.shift, stop)
        before = self._columns_before(arena, sinks, self._lead_of(stop))
        columns = arena.joined([*before, update])
        self._retain_from(arena, columns, positions, stop)
        self._spill()
        parts = [(arena.tokens(kept, start), kept)] if kept < start else []
        first, read = max(kept, start), arena.backend.read_slice
        latest = tuple([read(array, first - start, stop - start, arena.axis) for array in update])
        arena.refill(placement, [*parts, (latest, first)], sinks)
        if self._admission.requires_grad:
            first = sum(part[0].shape[arena.axis] for part in before)
            columns = arena.with_gradients(columns, update, first)
        self._commit(stop, 0, positions)
        return columns

    def _columns_before(self, arena: Arena, sinks: Arrays, lead: int) -> list[Arrays]:
        """Return the columns before those of a wide update."""
        parts = [sinks] if lead > self._ring.keep and sinks else []
        if arena.capacity and not arena.backend.slices_are_views:
            return [*parts, arena.whole()]  # as each length of a slice would be compiled
        return [*parts, arena.tokens(lead, self._offset)] if lead < self._offset else parts

    def _sinks_by(self, arena: Arena, update: Arrays) -> Arrays:
        """Return the sinks once `update` came, in arrays of their own; () for a ring without."""
        if arena.settled or not self._ring.keep:
            return arena.sinks
        there = min(self._ring.keep, self._offset)
        parts = [arena.tokens(0, there)] if there else []
        if there < self._ring.keep:
            read, stop = arena.backend.read_slice, self._ring.keep - self._offset
            parts.append(tuple([read(array, there - self._offset, stop, arena.axis) for array in update]))
        concat = arena.backend.concat
        return tuple([concat(arrays, arena.axis) for arrays in zip(*parts, strict=True)])

    @property
    def _floor(self) -> int:
        """First position held for whatever comes, a rollback included; sinks aside."""
        return self._first if self._checkpoint is None else self._checkpoint.first

    def _lead_of(self, stop: int) -> int:
        """Return the first column, sinks aside, of an update that ends at `stop`."""
        lead = max(0, self._offset + 1 - self._window)
        if not self._ring.keep:
            return lead
        # Sinks come right before what is held, and overwrite what lies there.
        held = self._floor if self._checkpoint else max(self._first, self._ring.first(stop))
        return min(lead, held) if min(lead, held) > self._ring.keep else 0

    def _with_room(self, slots: int, spare: bool = True) -> Arena:
        if self._buffers is None:
            backend, geometry = self._admission.bound()
            self._buffers = Arena(backend, geometry, self._step, self._ring)
            check_padding(self._padding, geometry.batch)
            self._pins = LayerPins(self._buffers, self._padding)
            slots = max(slots, min(self._room, self._ring.size)) if spare else slots
        self._buffers.grow(slots, spare)
        return self._buffers

    def _spill(self) -> None:
        """Copy pinned rows to the host, before their slots change."""
        if self._pins is not None and self._pins.rows:
            self._pins.spill()

    def _retain(self, arena: Arena, first: int, stop: int, reached: int) -> None:
        """Retain the rows for resume points up to `reached`, of the tokens ``[first, stop)``."""
        if self._points.scheduled and self._pins is not None:
            positions = self._between(first, stop, self._ring.keep)
            slots = arena.slots_of(positions)
            self._pins.retain_due(self._points, positions, slots, self.visibility, reached)

    def _retain_from(
        self, arena: Arena, columns: Arrays, positions: Int32s, stop: int
    ) -> None:
        """Retain rows for resume points inside an update, whose `columns` have all of them."""
        # Not its end: everything needed to resume there will be in the ring.
        due = self._points.due(stop - 1)
        if not due or self._pins is None:
            return
        # Hidden columns, position -1, sort to the front and are cut off.
        order = np.argsort(positions, kind="stable")[np.count_nonzero(positions < 0) :]
        for point in due:
            wanted = order[self.visibility.needed(positions[order], point)]
            layer = self._pins.rows_of(arena.read_tokens(columns, wanted))
            self._points.retain(point, TokenRows(positions[wanted], {0: layer}))

    # What is held.

    @staticmethod
    def _between(first: int, stop: int, sinks: int) -> Int32s:
        """Return the positions of so many sinks and of ``[first, stop)``."""
        if first <= sinks:
            return np.arange(stop, dtype=np.int32)
        return np.concatenate([np.arange(sinks), np.arange(first, stop)]).astype(np.int32)

    def _held(self) -> tuple[Int32s, Slots]:
        positions = self._between(self._first, self._offset, self._sinks)
        return positions, np.arange(0) if self._buffers is None else self._buffers.slots_of(positions)

    def _exact(self, buffers: GrowingBuffers) -> Arrays:
        backend, arena = buffers.backend, self._with_room(0)
        if backend.slices_are_views and self.len < self._offset and self._ring.keep:
            return self._held_of(arena, arena.arrays, backend)
        return super()._exact(buffers)

    def _slot(self, buffers: GrowingBuffers, position: int) -> int:
        return self._with_room(0).slot(position)

    def _columns(self) -> Int32s:
        if self._wide is not None:
            return self._wide
        if self._buffers is None:
            return np.empty(0, np.int32)
        return self._buffers.positions(self._lead, self._offset)

    def _next_columns(self, tokens: int) -> Int32s:
        stop, arena = self._offset + tokens, self._buffers
        sizes, shift, settled = self._sizes(), 0, False
        if arena is not None:
            shift, settled = arena.shift, arena.settled
        elif self._room:
            sizes = sizes.grown(min(self._room, self._ring.size))
        ring, lead, growing = self._ring, self._lead_of(stop), self._checkpoint is not None
        behind = 0 < self._ring.keep < lead
        placement = place(
            sizes, shift, ring, self._floor, stop, behind and not settled, growing
        )
        if placement.wide:
            return self._wide_columns(sizes, shift, stop)
        return arena_columns(ring, placement.sizes, placement.shift, settled or behind, lead, stop)

    def _wide_columns(self, sizes: Sizes, shift: int, stop: int) -> Int32s:
        """Return the positions of the columns of a wide update, to an arena as it was before."""
        start, lead = self._offset, self._lead_of(stop)
        first = np.arange(self._ring.keep if lead > self._ring.keep else 0, dtype=np.int32)
        window = np.arange(lead, start, dtype=np.int32)
        if sizes.capacity and not sizes.slices_are_views:  # then the whole arena comes
            window = np.arange(shift, shift + sizes.capacity, dtype=np.int32)
            window[(window < lead) | (window >= start)] = -1
        columns = np.concatenate([first, window, np.arange(start, stop, dtype=np.int32)])
        return padded_positions(columns, sizes.padded(columns.size))

    def _least_held(self, offset: int) -> int:
        return min(offset, self._ring.size)

    def _most_held(self, offset: int) -> int:
        return min(offset, self._ring.size + self.slack)

    def _set_padding(self, padding: Int32s | None) -> None:
        super()._set_padding(padding)
        self._ring = self._ring._replace(keep=self._sinks)

    @property
    def _sinks(self) -> int:
        """First columns to hold: the sinks of each row, behind its padding."""
        behind = 0 if self._padding is None else int(self._padding.max())
        return self.keep + behind if self.keep else 0

    def _slots_of_row(self, padding: int) -> Slots:
        held, slots = self._held()
        first = self._first - padding if self._first > self._ring.keep else 0
        own = held - padding
        row = (own >= 0) & ((own < self.keep) | (own >= first))
        return slots[row]

    def _positions_of_all(self, caches: Sequence[Self], stop: int) -> Int32s:
        short = max(stop - cache._offset for cache in caches)
        sinks = self.keep + short if self.keep else 0
        firsts = [c._first + stop - c._offset for c in caches if c._first > c._ring.keep]
        first = max([0, stop - self._window - self.slack, *firsts])
        return self._between(first, stop, sinks)

    def _order(self, held: int, offset: int) -> Int32s:
        # As in the form for programs, and then those of slack.
        latest = ring_positions(self._ring._replace(keep=self._sinks), offset)
        first = offset - self._window
        slack = np.arange(first - (held - latest.size), first, dtype=np.int32)
        return np.concatenate([latest, slack])

    def _held_of(self, buffers: GrowingBuffers, arrays: Arrays, backend: Backend) -> Arrays:
        arena, axis, first = self._with_room(0), buffers.axis, self._first
        stop = arena.slot(self._offset)
        if self.len == self._offset:
            width = round_up(self._offset, backend.config.padding)
            stop = min(arena.slot(0) + width, arena.capacity)
            return tuple([backend.slice(array, arena.slot(0), stop, axis) for array in arrays])
        if self._ring.keep != self._sinks:  # rows with more padding were dropped
            _, slots = self._held()
            return tuple([backend.gather(array, slots, axis) for array in arrays])
        window = [backend.slice(array, arena.slot(first), stop, axis) for array in arrays]
        if not self._ring.keep:
            return tuple(window)
        at = 0 if arena.settled else arena.slot(0)
        sinks = [backend.slice(array, at, at + self._ring.keep, axis) for array in arrays]
        return tuple([backend.concat(pair, axis) for pair in zip(sinks, window, strict=True)])

    def _place(self, arrays: Arrays, held: int, offset: int, spare: bool) -> GrowingBuffers:
        arena, ring = self._with_room(0, spare), self._ring
        sizes, axis = arena.sizes, arena.axis
        natural, width = arena.shift, arrays[0].shape[axis]
        resized = sizes.grown if spare else sizes.fitted
        self._first = 0 if held == offset else offset - (held - self._ring.keep)
        if held == offset:
            fits = sizes.limit is None or width - natural <= sizes.limit
            tokens = arrays if fits else self._cut(arena, arrays, 0, held)
            slots = tokens[0].shape[axis] - natural
            placement = Placement(resized(max(slots, arena.capacity)), natural)
            arena.refill(placement, [(tokens, 0)], ())
        else:
            sinks = self._cut(arena, arrays, 0, self._ring.keep) if self._ring.keep else ()
            placement = Placement(
                resized(arena.head + offset - self._first), self._first - arena.head
            )
            window = self._cut(arena, arrays, self._ring.keep, held)
            arena.refill(placement, [(window, self._first)], sinks)
        self._show_held()
        return arena

    @staticmethod
    def _cut(arena: Arena, arrays: Arrays, start: int, stop: int) -> Arrays:
        """Return copies of the tokens ``[start, stop)`` of `arrays`."""
        backend, axis = arena.backend, arena.axis
        return tuple([backend.concat([backend.slice(a, start, stop, axis)], axis) for a in arrays])

    def _show_held(self) -> None:
        """Let `positions` and masks speak of the tokens held, not of an update."""
        self._latest, self._wide = 0, None
        self._lead = 0 if self._first <= self._ring.keep else self._first

    # Masks.

    def _maskable(self) -> int:
        return self._offset if self._first <= self._ring.keep else max(1, self._latest)

    def _attended(self, window: int | None) -> Visibility:
        return Visibility(min(window or self._window, self._window) - 1, sinks=self.keep)

    # Snapshots.

    @property
    def visibility(self) -> Visibility:
        # One more than the next token sees: files and snapshots have a full window.
        return Visibility(self._window, sinks=self._sinks)

    def schedule(self, positions: Iterable[int]) -> None:
        self.check_not_exported()
        # Rows for earlier positions may be dropped already: too late to retain them.
        points = as_indices(positions, "positions")
        self._points.schedule(point for point in points if point >= self._offset)

    # Going back.

    def can_trim(self, tokens: int) -> bool:
        tokens = as_index(tokens, "tokens")
        needed = self._offset - tokens - self._window
        held = self._first <= self._ring.keep or needed >= self._first
        return super().can_trim(tokens) and (tokens == 0 or held)

    def check_trim(self, tokens: int) -> None:
        if super().can_trim(tokens) and not self.can_trim(tokens):
            raise TrimError(
                f"a rotating cache cannot trim once tokens were displaced: {self._offset} came, "
                f"it holds {self.len}. Use checkpoint() and rollback(), or a cache with slack."
            )
        super().check_trim(tokens)

    def _rewind(self, offset: int) -> None:
        super()._rewind(offset)
        self._show_held()

    def checkpoint(self) -> None:
        super().checkpoint()
        if self._checkpoint is not None:
            self._checkpoint = replace(self._checkpoint, first=self._first)

    def _return_to(self, checkpoint: Checkpoint, accepted: int) -> None:
        def go_back() -> None:
            offset = checkpoint.offset + accepted
            self._first = max(checkpoint.first, self._ring.first(offset))
            self._rewind(offset)
            # Points passed since were unscheduled when their rows were retained; both are undone.
            self._points.schedule(point for point in checkpoint.scheduled if point > offset)

        self._atomic(go_back)

    # Programs.

    def _exported(self, tokens: int) -> State:
        backend, geometry = self._admission.bound()
        arena, owner = self._with_room(0), new_owner()
        self._retain(arena, self._first, self._offset, self._offset)
        self._spill()
        slots = min(self._offset + tokens, self._ring.size)
        capacity = Sizes.on(backend, self._step, self._ring.size).grown(slots).capacity
        positions = ring_positions(self._ring, self._offset)
        held = np.pad(arena.slots_of(positions), (0, capacity - positions.size), "edge")
        make_state = self._state_maker(capacity, owner, arena.likes())
        keys, values = traced_forms(backend, arena.gathered(arena.arrays, held))
        state = self._given_away(arena, make_state(keys, values), owner)
        self._show_held()
        return state

    def _state_maker(
        self, capacity: int, owner: int, likes: tuple[Array, Array]
    ) -> Callable[[Array, Array], RingState]:
        padding = self._padding_array()
        ring, offset = self._ring, self._offset
        numbers = self._on_device(
            offset,
            padded_positions(ring_positions(ring, offset), capacity),
            owner,
            offset if offset < self._ring.size else ring_slot(ring, offset),
            ring.keep,
            ring.size if capacity >= ring.size else np.iinfo(np.int32).max,
        )
        offset_array, positions, owner_array, slot, sinks, size = numbers
        return lambda keys, values: RingState(
            keys, values, offset_array, positions, likes, owner_array, slot, sinks, size, padding
        )

    def _take_over(self, buffers: GrowingBuffers, state: State, offset: int) -> None:
        backend, capacity = buffers.backend, state.keys.shape[buffers.axis]
        check_room(offset, min(offset, self._ring.size), capacity)
        positions = ring_positions(self._ring, offset)
        # Also an older state whose arrays a later append has changed: one in place (NumPy, torch).
        if not np.array_equal(
            backend.to_host(state.positions), padded_positions(positions, capacity)
        ):
            raise StateError(
                f"the tokens of a ring are those before its offset, {offset}; a program has "
                "displaced some of them. Import the last state: a ring cannot go back in a program."
            )
        ascending = np.argsort(positions).astype(np.int32)
        index = backend.from_host(padded_index(backend, ascending))
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



def ring_slot(ring: Ring, position: int) -> int:
    """Return the slot of a position in the form for programs, which is no sink."""
    return ring.keep + (position - ring.keep) % ring.window


def ring_positions(ring: Ring, offset: int) -> Int32s:
    """Return the position in every slot of the form for programs, after `offset` tokens."""
    slots = np.arange(min(offset, ring.keep + ring.window), dtype=np.int32)
    latest = offset - 1
    # A slot holds the newest position that is congruent to it modulo the window.
    turned = latest - (latest - slots) % ring.window
    return np.where(slots < ring.keep, slots, turned).astype(np.int32)
