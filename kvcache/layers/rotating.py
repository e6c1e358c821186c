"""The rotating per-layer cache: a bounded number of tokens in a ring."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import ClassVar, TypeVar

import numpy as np

from kvcache._types import Indices, Int32s
from kvcache.backends import Array, Backend
from kvcache.errors import TrimError
from kvcache.snapshots.rows import Slots, TokenRows
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.layout import TOKENS
from kvcache.storage.lengths import padded_positions

from .buffers import Arrays, GrowingBuffers
from .checkpoint import Checkpoint, Update
from .growing import KVCache
from .state import RingState

Position = TypeVar("Position", int, Int32s)


class RotatingKVCache(KVCache):
    """Bounded cache for one layer: the first `keep` tokens and the latest others.

    A query sees itself, the ``max_size - keep - 1`` tokens before it, and the first `keep`
    tokens (attention sinks, StreamingLLM, arXiv:2309.17453), however many tokens an update
    brings: one of several tokens returns the columns of all their windows, and the mask tells
    them apart. Columns are in no particular order; :attr:`positions` gives their positions.

    max_size: tokens held, sinks included. keep: sinks. Others as for :class:`KVCache`.
    """

    kind: ClassVar[str] = "rotating"
    _changing: ClassVar[tuple[str, ...]] = (*KVCache._changing, "_extra")

    def __init__(
        self,
        max_size: int,
        keep: int = 0,
        backend: str | Backend | None = None,
        step: int = 256,
        dtype: str | None = None,
    ) -> None:
        max_size, keep, step = (operator.index(number) for number in (max_size, keep, step))
        if max_size < 1:
            raise ValueError(f"max_size must be >= 1 token; got {max_size}.")
        if not 0 <= keep < max_size:
            raise ValueError(
                f"keep must be 0 to max_size - 1, so that a window is left; "
                f"got keep={keep} with max_size={max_size}."
            )
        self.max_size = max_size
        self.keep = keep
        self._window = max_size - keep
        self._configure(backend, step, dtype, limit=max_size)

    def _start(self) -> None:
        super()._start()
        # Tokens of the last update returned as further columns after those of the ring.
        self._extra = 0

    @property
    def options(self) -> Mapping[str, int | str | None]:
        return {"max_size": self.max_size, "keep": self.keep, **super().options}

    @property
    def len(self) -> int:
        return min(self._offset, self.max_size)

    @property
    def positions(self) -> Int32s:
        return self._columns(self._offset - self._extra, self._extra)

    def _columns(self, start: int, tokens: int) -> Int32s:
        """Return the positions in the ring of `start` tokens, and of `tokens` returned after it."""
        ring = self._ring_positions(start)
        if not tokens or self._buffers is None:
            return ring
        columns = np.concatenate([ring, np.arange(start, start + tokens, dtype=np.int32)])
        return padded_positions(columns, self._buffers.padded(columns.size))

    # Writing.

    def update(self, keys: Array, values: Array) -> tuple[Array, Array]:
        start, buffers = self._offset, self._buffers
        if buffers is None or self._checkpoint is not None:
            return self._updated_carefully(keys, values)
        tokens = self._admission.validate(keys, values)
        stop = start + tokens
        if stop <= self.max_size:
            if stop > buffers.capacity:
                return self._updated_carefully(keys, values)
            columns = buffers.append(keys, values, start, stop, stop)
            self._offset, self._extra = stop, 0
            return columns
        if tokens > 1 or buffers.capacity < self.max_size or self._displaces_pinned():
            return self._updated_carefully(keys, values)
        # The token displaces the one that its query no longer sees, so the ring after the write is
        # the answer. One statement: should the write raise, the old token still counts, and no
        # signal handler runs once the old token is gone and the new one does not count yet.
        slot = self._ring_slot(start)
        written = buffers.written
        buffers.arrays, self._offset, self._extra = written((keys, values), slot, slot + 1), stop, 0
        new_keys, new_values = buffers.arrays
        return new_keys, new_values

    def _displaces_pinned(self) -> bool:
        """Return whether rows may have to be retained or spilled before slots change."""
        return bool(self._points.scheduled or (self._pins is not None and self._pins.rows))

    def _updated_carefully(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """Do any :meth:`update`, also one that grows, is recorded, or displaces much or pinned."""
        update, undo = (keys, values), self.savepoint()
        try:
            tokens = self._admission.validate(keys, values)
            start, stop = self._offset, self._offset + tokens
            buffers = self._with_room(self._slots(stop))
            recorded = self._recorded(buffers, update)
            if stop > self.max_size:
                self._before_displacing()
                return self._displaced_by(buffers, update, recorded)
            columns = buffers.append(keys, values, start, stop, stop)
            self._offset, self._extra, self._checkpoint = stop, 0, recorded
            return columns
        except BaseException:
            undo()
            raise

    def _displaced_by(
        self, buffers: GrowingBuffers, update: Arrays, recorded: Checkpoint | None
    ) -> tuple[Array, Array]:
        """Append an update that displaces tokens; return the columns that its queries see.

        Of several tokens, the first ones still see tokens displaced by the last: they get the ring
        as it was before, followed by the update.

        recorded: the open checkpoint with this update.
        """
        start, tokens = self._offset, update[0].shape[TOKENS]
        positions, slots = self._destinations(tokens)
        staying = update
        if positions.size < tokens:  # the first ones are displaced by the last of this update
            staying = buffers.take_tokens(update, positions - start)
        displaced = buffers.read_rows(slots)
        columns: Arrays = ()
        if tokens > 1:
            columns = buffers.held_and_update(update, self.len)
            self._retain_from(buffers, columns, start, tokens)
        try:
            buffers.arrays = buffers.with_rows(staying, slots)
            # Nobody is given the ring itself, so it would not be computed along with `columns`.
            buffers.backend.evaluate(*buffers.arrays)
            keys, values = columns or buffers.arrays
            extra = len(columns) and tokens
            self._offset, self._extra, self._checkpoint = start + tokens, extra, recorded
            return keys, values
        except BaseException:
            buffers.arrays = buffers.with_rows(displaced, slots)
            raise

    def _before_displacing(self) -> None:
        """Retain rows due for resume points, and spill pinned ones, before slots change."""
        if self._pins is None:
            return
        if self._points.scheduled:
            held = self._held()
            self._pins.retain_due(self._points, *held, self.visibility, self._offset)
        if self._pins.rows:  # all of them: a full ring gets round to every slot
            self._pins.spill()

    def _retain_from(
        self, buffers: GrowingBuffers, columns: Arrays, start: int, tokens: int
    ) -> None:
        """Retain rows for resume points inside an update of `tokens`, whose `columns` have all."""
        # Not its end: everything needed to resume there will be in the ring.
        due = self._points.due(start + tokens - 1)
        if not due:
            return
        positions = self._columns(start, tokens)
        # Padding, position -1, sorts to the front and is cut off.
        order = np.argsort(positions)[np.count_nonzero(positions < 0) :]
        for point in due:
            wanted = order[self.visibility.needed(positions[order], point)]
            layer = buffers.read_tokens(columns, wanted)
            self._points.retain(point, TokenRows(positions[wanted], {0: layer}))

    # Slots.

    def _destinations(self, tokens: int) -> tuple[Int32s, Int32s]:
        """Return the positions of the next `tokens` that stay, and their slots."""
        start, stop = self._offset, self._offset + tokens
        positions = np.arange(start, stop, dtype=np.int32)
        positions = positions[(positions < self.keep) | (positions >= stop - self._window)]
        slots = np.where(positions < self.keep, positions, self._ring_slot(positions))
        return positions, slots

    def _ring_slot(self, position: Position) -> Position:
        """Return the slot of a position, or of an array of them, sinks excluded."""
        return self.keep + (position - self.keep) % self._window

    def _ring_positions(self, offset: int) -> Int32s:
        """Return the position in every column of the ring after `offset` tokens."""
        slots = np.arange(min(offset, self.max_size), dtype=np.int32)
        latest = offset - 1
        # A slot holds the newest position that is congruent to it modulo the window.
        turned = latest - (latest - slots) % self._window
        positions = np.where(slots < self.keep, slots, turned).astype(np.int32)
        return padded_positions(positions, self._width(slots.size))

    def _slots(self, offset: int) -> int:
        return min(offset, self.max_size)

    def _held(self) -> tuple[Int32s, Slots]:
        positions = self._ring_positions(self._offset)[: self.len]
        slots = np.argsort(positions)
        return positions[slots], slots

    def _slots_of(self, positions: Int32s) -> Slots:
        slots: Indices = np.where(
            positions < self.max_size, positions, self._ring_slot(positions)
        ).astype(np.int64)
        return slots

    # Masks.

    def _maskable(self) -> int:
        return self._offset if self._offset <= self.max_size else max(1, self._extra)

    def _attended(self, window: int | None) -> Visibility:
        return Visibility(min(window or self._window, self._window) - 1, sinks=self.keep)

    # Programs.

    def _exported(self, buffers: GrowingBuffers, offset: Array) -> RingState:
        """Return the ring as a state; pinned rows are spilled, as programs may write any slot."""
        self._before_displacing()
        self._extra = 0
        ring = self._ring_positions(self._offset)
        positions = np.full(buffers.capacity, -1)
        positions[: self.len] = ring[: self.len]
        slot = self._offset if self._offset < self.max_size else self._ring_slot(self._offset)
        numbers = slot, self.keep, min(self.max_size, buffers.capacity)
        on_device, like = self._on_device, buffers.empty()
        places, counts = on_device(positions), tuple(map(on_device, numbers))
        keys, values = buffers.export_state()  # last, because it consumes the buffers
        return RingState(keys, values, offset, places, like, *counts)

    # Snapshots.

    @property
    def visibility(self) -> Visibility:
        # One more than the next token sees, so that every slot of a restored ring is filled.
        return Visibility(self._window, sinks=self.keep)

    def schedule(self, positions: Iterable[int]) -> None:
        # Rows for earlier positions may be displaced already: too late to retain them.
        self._points.schedule(position for position in positions if position >= self._offset)

    # Going back.

    def can_trim(self, tokens: int) -> bool:
        return tokens == 0 or (super().can_trim(tokens) and self._offset <= self.max_size)

    def check_trim(self, tokens: int) -> None:
        if super().can_trim(tokens) and not self.can_trim(tokens):
            raise TrimError(
                f"a rotating cache cannot trim once tokens were displaced: {self._offset} came, "
                f"it holds {self.max_size}. Use checkpoint() and rollback()."
            )
        super().check_trim(tokens)

    def _rewind(self, offset: int) -> None:
        super()._rewind(offset)
        self._extra = 0

    def _recorded(self, buffers: GrowingBuffers, update: Arrays) -> Checkpoint | None:
        """Return the open checkpoint, if any, with an update and the rows displaced by it."""
        checkpoint = self._checkpoint
        if checkpoint is None:
            return None
        tokens = update[0].shape[TOKENS]
        _, slots = self._destinations(tokens)
        kept, displaced = buffers.take_tokens(update, np.arange(tokens)), buffers.read_rows(slots)
        # Copies not yet made would keep the buffer that they are of, and its writes from being in
        # place.
        buffers.backend.evaluate(*kept, *displaced)
        return replace(checkpoint, updates=(*checkpoint.updates, Update(kept, slots, displaced)))

    def _return_to(self, checkpoint: Checkpoint, accepted: int) -> None:
        """Undo all updates since `checkpoint`, except their first `accepted` tokens."""
        buffers, offset = self._buffers, checkpoint.offset + accepted
        undo = self.savepoint()
        try:
            if self._pins is not None:
                self._pins.spill()
            self._rewind(offset)
            # Points passed since were unscheduled when their rows were retained; both are undone.
            self._points.schedule(point for point in checkpoint.scheduled if point > offset)
            if buffers is not None and checkpoint.updates:
                buffers.arrays = self._with_accepted(buffers, checkpoint, accepted)
                buffers.backend.evaluate(*buffers.arrays)
        except BaseException:
            undo()
            raise

    def savepoint(self) -> Callable[[], None]:
        undo_on_host, checkpoint, buffers = super().savepoint(), self._checkpoint, self._buffers
        if checkpoint is None or buffers is None or not checkpoint.updates:
            return undo_on_host
        since = self._offset - checkpoint.offset

        def undo() -> None:
            if self._checkpoint is not checkpoint:  # a rollback may have overwritten slots
                buffers.arrays = self._with_accepted(buffers, checkpoint, since)
            undo_on_host()

        return undo

    def _with_accepted(
        self, buffers: GrowingBuffers, checkpoint: Checkpoint, accepted: int
    ) -> Arrays:
        """Return the arrays as after the first `accepted` tokens since `checkpoint`.

        Consumes the present ones; call it in the statement that assigns the result.
        """
        updates = checkpoint.updates
        # As if rows were written one after the other, the last one to a slot staying: what was
        # displaced, the oldest last, and then the accepted tokens.
        tokens = np.arange(checkpoint.offset, checkpoint.offset + accepted, dtype=np.int32)
        slots = np.concatenate([*(u.slots for u in reversed(updates)), self._slots_of(tokens)])
        unique, latest = np.unique(slots[::-1], return_index=True)
        parts = [*(u.displaced for u in reversed(updates)), *(u.arrays for u in updates)]
        concat = buffers.backend.concat
        sources = tuple(concat(arrays, TOKENS) for arrays in zip(*parts, strict=True))
        rows = buffers.take_tokens(sources, slots.size - 1 - latest)
        return buffers.with_rows(rows, unique.astype(np.int32))
