"""The rotating per-layer cache: a bounded number of tokens in a ring."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, TypeVar

import numpy as np

from kvcache._types import Indices, Int32s
from kvcache.backends import Array, Backend
from kvcache.errors import StateError, TrimError
from kvcache.snapshots.rows import Slots, TokenRows
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.layout import TOKENS
from kvcache.storage.lengths import padded_positions

from .buffers import Arrays, GrowingBuffers
from .checkpoint import Checkpoint, Update
from .columns import Sizes
from .exports import State
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
        self.check_not_exported()
        return self._columns(self._offset, self._extra, self._sizes())

    def _columns(self, stop: int, extra: int, sizes: Sizes) -> Int32s:
        start = stop - extra
        ring = self._ring_positions(start)
        columns = padded_positions(ring, sizes.width(ring.size))
        if not extra:
            return columns
        columns = np.concatenate([columns, np.arange(start, stop, dtype=np.int32)])
        return padded_positions(columns, sizes.padded(columns.size))

    def _extra_of(self, tokens: int) -> int:
        return tokens if tokens > 1 and self._offset + tokens > self.max_size else 0

    # Writing.

    def update(self, keys: Array, values: Array) -> tuple[Array, Array]:
        start = self._offset
        tokens = self._admission.validate(keys, values)
        stop = start + tokens
        buffers = self._buffers
        if buffers is None or min(stop, self.max_size) > buffers.capacity:
            buffers = self._grown(min(stop, self.max_size))
        if self._checkpoint is not None:  # now, while the rows to be displaced are still there
            self._record(self._checkpoint, buffers, (keys, values))
        if stop <= self.max_size:
            slot = start
        elif tokens == 1:
            # It displaces the one token that its query no longer sees, so the ring after the
            # write is the answer. Of several tokens, the first ones still see others displaced.
            self._before_displacing()
            slot = self._ring_slot(start)
        else:
            return self._update_beyond(buffers, (keys, values), tokens)
        self._extra = 0
        columns = buffers.append(keys, values, slot, slot + tokens, min(stop, self.max_size))
        self._offset = stop
        if self._admission.requires_grad:
            return buffers.with_gradients(columns, (keys, values), slot)
        return columns

    def _update_beyond(
        self, buffers: GrowingBuffers, update: Arrays, tokens: int
    ) -> tuple[Array, Array]:
        """Append several tokens that displace others still visible to the first queries.

        Return the ring as it was before, followed by the update.
        """
        self._before_displacing()
        columns = buffers.held_and_update(update, self.len)
        self._store(buffers, update)
        self._extra = tokens
        self._offset += tokens
        if self._points.scheduled:
            self._retain_from(buffers, columns)
        if self._admission.requires_grad:
            held = self._columns(self._offset - tokens, 0, buffers.sizes)
            return buffers.with_gradients(columns, update, held.size)
        keys, values = columns
        return keys, values

    def _before_displacing(self) -> None:
        """Retain rows due for resume points, and spill pinned ones, before slots change."""
        if self._pins is None:
            return
        if self._points.scheduled:
            held = self._held()
            self._pins.retain_due(self._points, *held, self.visibility, self._offset)
        if self._pins.rows:  # all of them: a full ring gets round to every slot
            self._pins.spill()

    def _retain_from(self, buffers: GrowingBuffers, columns: Arrays) -> None:
        """Retain rows for resume points inside the last update, whose `columns` still have all."""
        positions = self.positions
        # Padding, position -1, sorts to the front and is cut off.
        order = np.argsort(positions)[np.count_nonzero(positions < 0) :]
        # Not the offset itself: everything needed to resume there is in the ring.
        for point in self._points.due(self._offset - 1):
            wanted = order[self.visibility.needed(positions[order], point)]
            layer = buffers.read_tokens(columns, wanted)
            self._points.retain(point, TokenRows(positions[wanted], {0: layer}))

    def _store(self, buffers: GrowingBuffers, update: Arrays) -> None:
        """Write an update, except tokens displaced by later ones of the same update."""
        tokens = update[0].shape[TOKENS]
        positions, slots = self._destinations(tokens)
        if positions.size < tokens:
            update = buffers.take_tokens(update, positions - self._offset)
        buffers.write_rows(update, slots)

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
        """Return the position in every slot of the ring after `offset` tokens."""
        slots = np.arange(min(offset, self.max_size), dtype=np.int32)
        latest = offset - 1
        # A slot holds the newest position that is congruent to it modulo the window.
        turned = latest - (latest - slots) % self._window
        return np.where(slots < self.keep, slots, turned).astype(np.int32)

    def _slots(self, offset: int) -> int:
        return min(offset, self.max_size)

    def _held(self) -> tuple[Int32s, Slots]:
        positions = self._ring_positions(self._offset)
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

    def _before_export(self) -> None:
        self._before_displacing()
        self._extra = 0

    def _state_maker(
        self, capacity: int, owner: int, like: Array
    ) -> Callable[[Array, Array], RingState]:
        offset, positions, owner_array, slot, sinks, size = self._on_device(
            self._offset,
            self._slot_positions(self._offset, capacity),
            owner,
            self._next_slot(self._offset),
            self.keep,
            self.max_size if capacity >= self.max_size else np.iinfo(np.int32).max,
        )
        return lambda keys, values: RingState(
            keys, values, offset, positions, like, owner_array, slot, sinks, size
        )

    def _slot_positions(self, offset: int, capacity: int) -> Int32s:
        """Return the position in each of `capacity` slots after `offset` tokens, -1 for none."""
        return padded_positions(self._ring_positions(offset), capacity)

    def _next_slot(self, offset: int) -> int:
        """Return the slot of the token at position `offset`."""
        return offset if offset < self.max_size else self._ring_slot(offset)

    def _check_written(self, buffers: GrowingBuffers, state: State, offset: int) -> int:
        expected = self._slot_positions(offset, buffers.capacity)
        # Also an older state whose arrays a later append has changed: one in place (NumPy, torch).
        if not np.array_equal(buffers.backend.to_host(state.positions), expected):
            raise StateError(
                f"the tokens of a ring are those before its offset, {offset}; a program has "
                "displaced some of them. Import the last state: a ring cannot go back in a program."
            )
        return self._slots(offset)

    # Snapshots.

    @property
    def visibility(self) -> Visibility:
        # One more than the next token sees, so that every slot of a restored ring is filled.
        return Visibility(self._window, sinks=self.keep)

    def schedule(self, positions: Iterable[int]) -> None:
        self.check_not_exported()
        # Rows for earlier positions may be displaced already: too late to retain them.
        self._points.schedule(position for position in positions if position >= self._offset)

    # Going back.

    def can_trim(self, tokens: int) -> bool:
        return super().can_trim(tokens) and (tokens == 0 or self._offset <= self.max_size)

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

    def _record(self, checkpoint: Checkpoint, buffers: GrowingBuffers, update: Arrays) -> None:
        """Record copies of an update, and of the rows displaced by it, for a rollback."""
        tokens = update[0].shape[TOKENS]
        _, slots = self._destinations(tokens)
        kept = buffers.take_tokens(update, np.arange(tokens))
        checkpoint.updates.append(Update(kept, slots, buffers.read_rows(slots)))

    def _return_to(self, checkpoint: Checkpoint, accepted: int) -> None:
        """Undo all updates since `checkpoint`, then repeat their first `accepted` tokens."""
        if self._pins is None or self._buffers is None:  # no update since
            self._rewind(checkpoint.offset)
            return
        self._pins.spill()
        # The newest first: a slot written several times ends up with its oldest content.
        for update in reversed(checkpoint.updates):
            self._buffers.write_rows(update.displaced, update.slots)
        self._rewind(checkpoint.offset)  # closes the checkpoint: repeated updates go unrecorded
        # Points passed since were unscheduled when their rows were retained; now both are undone.
        self._points.schedule(point for point in checkpoint.scheduled if point > checkpoint.offset)
        for update in checkpoint.updates:
            tokens = min(accepted, update.arrays[0].shape[TOKENS])
            if tokens:
                keys, values = self._buffers.take_tokens(update.arrays, np.arange(tokens))
                self.update(keys, values)
            accepted -= tokens
        self._extra = 0  # nobody was given the columns of the repeated updates
