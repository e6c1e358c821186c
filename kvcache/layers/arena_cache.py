"""Updates of a rotating cache, and the columns that they return."""

from __future__ import annotations

import numpy as np

from kvcache._types import Int32s
from kvcache.backends import Array
from kvcache.snapshots.rows import Slots, TokenRows
from kvcache.storage.lengths import padded_positions

from .arena import Arena, Placement, Ring, arena_columns, place
from .buffers import Arrays, GrowingBuffers
from .columns import Sizes
from .growing import KVCache
from .padding import check_padding
from .pinning import LayerPins


class ArenaCache(KVCache):
    """A cache whose tokens move through an :class:`Arena`."""

    _buffers: Arena | None
    _ring: Ring
    """Layout of the arena."""
    _first: int
    """First position held, sinks aside."""
    _whole: int
    """First position from which on all rows are there, sinks aside: of rows that were joined, some
    may have dropped tokens that others hold."""
    # Of the last update: its first column behind the sinks, its tokens, and the positions of its
    # columns if they are no slots.
    _lead: int
    _latest: int
    _wide: Int32s | None
    max_size: int
    keep: int
    slack: int
    _window: int

    # Writing.

    def update(self, keys: Array, values: Array) -> tuple[Array, Array]:
        start, arena = self._offset, self._buffers
        if arena is None or self._points.scheduled:
            return self._updated_carefully(keys, values)
        stop, shift = start + self._admission.validate(keys, values), arena.shift
        if stop - shift > arena.capacity:
            return self._updated_carefully(keys, values)
        if self._ring.keep and stop > self._ring.size:
            return self._updated_with_sinks(arena, (keys, values), stop)
        lead = start + 1 - self._window
        if lead < 0 or self._ring.keep:
            lead = 0
        first = stop - self._window - self.slack
        first = max(first, self._first)
        try:
            columns = arena.append(keys, values, start - shift, stop - shift, lead - shift)
            if self._admission.requires_grad:
                before = start - shift - arena.sizes.span(lead - shift, stop - shift)[0]
                columns = arena.with_gradients(columns, (keys, values), before)
            # One statement, as in `_commit`, whose call would cost a tenth of this one.
            self._offset, self._first, self._lead, self._latest, self._wide = (
                stop,
                first,
                lead,
                stop - start,
                None,
            )
        except BaseException:
            arena.take_back(stop - shift)
            raise
        return columns

    def _updated_with_sinks(self, arena: Arena, update: Arrays, stop: int) -> tuple[Array, Array]:
        """Do an :meth:`update` of a ring that drops tokens and has sinks.

        Most move nothing but copies of the sinks, and need no savepoint.
        """
        lead, pins = self._lead_of(stop), self._pins
        is_moved = pins is None or pins.rows or self._checkpoint is not None
        if is_moved or not (arena.settled and arena.backend.slices_are_views and lead):
            return self._updated_carefully(*update)
        before = self._first, self._latest, self._offset, self._lead, self._wide
        try:
            return self._updated_behind_sinks(arena, update, lead, stop)
        except BaseException:
            self._first, self._latest, self._offset, self._lead, self._wide = before
            arena.take_back(arena.slot(stop))
            raise

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
        """Do any :meth:`update`, also one that moves tokens, has sinks to copy, or is long."""
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
        arrived = min(self._ring.keep, self._offset)
        parts = [arena.tokens(0, arrived)] if arrived else []
        if arrived < self._ring.keep:
            read, stop = arena.backend.read_slice, self._ring.keep - self._offset
            parts.append(
                tuple([read(array, arrived - self._offset, stop, arena.axis) for array in update])
            )
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

    def _retain_from(self, arena: Arena, columns: Arrays, positions: Int32s, stop: int) -> None:
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
        first = 0 if self._first <= self._ring.keep else self._first
        positions = self._between(first, self._offset, self._sinks)
        arena = self._buffers
        slots = np.arange(0) if arena is None else arena.slots_of(positions)
        return positions, slots

    def _exact(self, buffers: GrowingBuffers) -> Arrays:
        backend, arena = buffers.backend, self._with_room(0)
        if not backend.slices_are_views or self.len == self._offset or not self._ring.keep:
            return super()._exact(buffers)
        if self._ring.keep != self._sinks:  # rows with more padding were dropped
            return arena.gathered(arena.arrays, self._held()[1])
        return self._held_of(arena, arena.arrays, backend)

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
        placement = place(sizes, shift, ring, self._floor, stop, behind and not settled, growing)
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

    @property
    def _held_columns(self) -> int:
        all_held = self._first <= self._ring.keep
        return self._offset if all_held else self._offset - self._first + self._ring.keep

    @property
    def _sinks(self) -> int:
        """First columns to hold: the sinks of each row, behind its padding."""
        behind = 0 if self._padding is None else int(self._padding.max())
        return self.keep + behind if self.keep else 0

    def _show_held(self) -> None:
        """Let `positions` and masks speak of the tokens held, not of an update."""
        self._latest, self._wide = 0, None
        self._lead = 0 if self._first <= self._ring.keep else self._first
