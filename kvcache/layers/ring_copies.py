"""Copies of rotating caches, and of rows of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from kvcache._types import Int32s
from kvcache.backends import Backend
from kvcache.snapshots.rows import Slots
from kvcache.storage.lengths import round_up

from .arena import Arena, Placement
from .arena_cache import ArenaCache
from .buffers import Arrays, GrowingBuffers


class CopyableRing(ArenaCache):
    """A rotating cache that is copied, filled from copies, split and joined."""

    def _least_held(self, offset: int) -> int:
        return min(offset, self._ring.size)

    def _most_held(self, offset: int) -> int:
        return min(offset, self._ring.size + self.slack)

    def _drop_buffers(self) -> None:
        super()._drop_buffers()
        self._ring = self._ring._replace(keep=self.keep)
        self._first, self._whole = 0, 0
        self._show_held()

    def _set_padding(self, padding: Int32s | None) -> None:
        super()._set_padding(padding)
        self._ring = self._ring._replace(keep=max(self._ring.keep, self._sinks))

    def _clone(self, backend: str | Backend | None) -> Self:
        clone = super()._clone(backend)
        clone._ring, clone._whole = self._ring, self._whole
        return clone

    def _slots_of_row(self, padding: int) -> Slots:
        held, slots = self._held()
        first = self._first - padding if self._first > self._ring.keep else 0
        first = max(first, self._offset - padding - self._window - self.slack)
        first = first if first > self.keep else 0
        own = held - padding
        row = (own >= 0) & ((own < self.keep) | (own >= first))
        return slots[row]

    def _positions_of_all(self, caches: Sequence[Self], stop: int, padding: int) -> Int32s:
        sinks = self.keep + padding if self.keep else 0
        firsts = [self._dropped_by(cache, stop) for cache in caches]
        first = max([0, stop - self._window - self.slack, *firsts])
        return self._between(first, stop, sinks)

    def _note_joined(self, caches: Sequence[Self]) -> None:
        if self._first <= self._ring.keep:
            self._whole = max(0, *(self._dropped_by(cache, self._offset) for cache in caches))

    @staticmethod
    def _dropped_by(cache: CopyableRing, stop: int) -> int:
        """Return how many first positions of rows that end at `stop` a cache dropped."""
        dropped = max(cache._first if cache._first > cache._ring.keep else 0, cache._whole)
        return dropped + stop - cache._offset if dropped else 0

    def _order(self, held: int, offset: int) -> Int32s:
        # As in the form for programs, and then those of slack.
        latest = self._ring._replace(keep=self._sinks).positions(offset)
        first = offset - self._window
        slack = np.arange(first - (held - latest.size), first, dtype=np.int32)
        return np.concatenate([latest, slack])

    def _held_of(self, buffers: GrowingBuffers, arrays: Arrays, backend: Backend) -> Arrays:
        arena, axis, first = self._with_room(0), buffers.axis, self._first
        stop = arena.slot(self._offset)
        if first <= self._ring.keep:
            width = round_up(self._offset, backend.config.padding)
            stop = min(arena.slot(0) + width, arena.capacity)
            return tuple([backend.slice(array, arena.slot(0), stop, axis) for array in arrays])
        window = [backend.slice(array, arena.slot(first), stop, axis) for array in arrays]
        if not self._ring.keep:
            return tuple(window)
        at = 0 if arena.settled else arena.slot(0)
        sinks = [backend.slice(array, at, at + self._ring.keep, axis) for array in arrays]
        return tuple([backend.concat(pair, axis) for pair in zip(sinks, window, strict=True)])

    def _place(self, arrays: Arrays, held: int, offset: int, spare: bool) -> GrowingBuffers:
        arena = self._with_room(0, spare)
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

    def _adopt(self, source: Self, buffers: GrowingBuffers) -> None:
        self._first = source._first
        self._show_held()
        super()._adopt(source, buffers)

    @staticmethod
    def _cut(arena: Arena, arrays: Arrays, start: int, stop: int) -> Arrays:
        """Return copies of the tokens ``[start, stop)`` of `arrays`."""
        backend, axis = arena.backend, arena.axis
        return tuple([backend.concat([backend.slice(a, start, stop, axis)], axis) for a in arrays])
