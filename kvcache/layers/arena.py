"""The buffers of a rotating cache: a window that moves through an arena of about twice its size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvcache._checks import NO_LIMIT
from kvcache._types import Indices, Int32s
from kvcache.backends import Backend
from kvcache.storage.admission import Geometry

from .buffers import Arrays, GrowingBuffers
from .columns import Sizes


class Ring(NamedTuple):
    """How many tokens a rotating cache keeps.

    window: latest tokens, the one that sees them included. keep: first tokens (sinks).
    slack: tokens before the window, kept so that as many can be taken back.
    """

    window: int
    keep: int
    slack: int

    def head(self, views: bool) -> int:
        """Return the number of slots in front of the window: for sinks, and for copies of them.

        views: whether slices are views; where they are not, whole buffers are returned, and the
        sinks need not be copied to the window.
        """
        return self.keep * (2 if views else 1)

    def sizes(self, backend: Backend, step: int) -> Sizes:
        """Return the sizes of an arena on `backend` that is not allocated yet."""
        # Of a buffer that is returned whole, free slots cost attention as much as others.
        spare = self.window if backend.slices_are_views else max(1, self.window // 8)
        return Sizes.on(
            backend, step, self.head(backend.slices_are_views) + self.window + self.slack + spare
        )

    @property
    def size(self) -> int:
        """Tokens that a query sees."""
        return self.window + self.keep

    def first(self, offset: int) -> int:
        """Return the first position held after `offset` tokens, sinks aside."""
        return max(0, offset - self.window - self.slack)

    # In the form for programs, which turns: the slot of a token is that of an earlier one.

    def slot(self, position: int) -> int:
        """Return the slot of a position, no sink, in the form for programs."""
        return self.keep + (position - self.keep) % self.window

    def positions(self, offset: int) -> Int32s:
        """Return the position in every slot of the form for programs, after `offset` tokens."""
        slots = np.arange(min(offset, self.size), dtype=np.int32)
        latest = offset - 1
        # A slot holds the newest position that is congruent to it modulo the window.
        turned = latest - (latest - slots) % self.window
        return np.where(slots < self.keep, slots, turned).astype(np.int32)


class Placement(NamedTuple):
    """Slots for an update.

    sizes: of the arena by then. shift: of its slots by then. wide: whether the update is too long
    for it, so that only its last tokens go there.
    """

    sizes: Sizes
    shift: int
    wide: bool = False


class Arena(GrowingBuffers):
    """Slots for the tokens of a rotating cache, ascending and without gaps.

    The token at position p is in slot ``p - shift``. Behind the last one are free slots; when they
    are used up, the tokens still held move to the front of new arrays, about once per window. So
    a window is a slice, and an update overwrites nothing that is held.

    Sinks lie where they came, until tokens behind them are dropped. Then they get the first slots
    (:attr:`settled`), and updates copy them right before the window, so that both are one slice:
    hence slots for two copies of them in front.
    """

    def __init__(self, backend: Backend, geometry: Geometry, step: int, ring: Ring) -> None:
        super().__init__(backend, geometry, ring.sizes(backend, step))
        self.ring = ring
        self.head = ring.head(backend.slices_are_views)
        self.shift = 0
        self.settled = False
        self.sinks: Arrays = ()
        """Copies of the sinks, once they are settled."""

    def slot(self, position: int) -> int:
        """Return the slot of a position; of a sink, while they are not settled."""
        return position - self.shift

    def slots_of(self, positions: Int32s) -> Indices:
        """Return the slots of positions that are held."""
        slots: Indices = positions.astype(np.int64) - self.shift
        return np.where(positions < self.ring.keep, positions, slots) if self.settled else slots

    def tokens(self, start: int, stop: int) -> Arrays:
        """Return the tokens ``[start, stop)``, held one after the other."""
        return self.slots(self.slot(start), self.slot(stop))

    def savepoint(self) -> Callable[[], None]:
        undo_moves = super().savepoint()
        shift, settled, sinks = self.shift, self.settled, self.sinks

        def undo() -> None:
            undo_moves()
            self.shift, self.settled, self.sinks = shift, settled, sinks

        return undo

    # Room.

    def placement(self, first: int, stop: int, settling: bool, growing: bool) -> Placement:
        """Return the slots for tokens up to `stop`, while those from `first` on are held.

        settling: whether the sinks move to the first slots, if they are not there.
        growing: whether the arena has to outgrow its limit rather than drop one of the tokens.
        """
        settling = settling and not self.settled
        return place(self.sizes, self.shift, self.ring, first, stop, settling, growing)

    def moves_to(self, placement: Placement) -> bool:
        """Return whether a placement takes other arrays, sinks that settle aside."""
        return placement.shift != self.shift or placement.sizes is not self.sizes

    def make_room(self, placement: Placement, first: int, start: int, sinks: Arrays) -> None:
        """Move the tokens held, ``[first, start)`` and `sinks`, to where `placement` wants them."""
        if placement.shift != self.shift or (sinks and not self.settled):
            first = max(first, self.ring.keep)
            self.refill(placement, [(self.tokens(first, start), first)], sinks)
        elif placement.sizes is not self.sizes:
            self._resize(placement.sizes)

    def refill(
        self, placement: Placement, parts: Sequence[tuple[Arrays, int]], sinks: Arrays
    ) -> None:
        """Replace the arrays by new ones that hold `parts` and `sinks`, settled, if there are any.

        parts: tokens, and the position of their first. sinks: all of them, in arrays that nobody
        writes to, which are kept.
        """
        arrays, write = self.alloc(placement.sizes.capacity), self.backend.write_slices
        if sinks:
            arrays = write(arrays, sinks, 0, self.ring.keep, self.axis)
        for tokens, position in parts:
            first = position - placement.shift
            stop = first + tokens[0].shape[self.axis]
            arrays = write(arrays, tokens, first, stop, self.axis)
        grown = 0 < self.capacity < placement.sizes.capacity
        # A lazy framework would keep the old arrays until it has read them.
        self.backend.evaluate(*arrays)
        self._replace(arrays, placement.sizes, self.growths + grown)
        self.shift, self.settled, self.sinks = placement.shift, bool(sinks), sinks
        self._dirty = 0

    def select(self, rows: Int32s) -> None:
        sinks = tuple([self.backend.gather(array, rows, 0) for array in self.sinks])
        super().select(rows)
        self.sinks = sinks

    # Sinks.

    def with_sinks_before(self, position: int, rows: Arrays) -> Arrays:
        """Return the arrays with `rows`, as many as sinks, before a position; see `written`."""
        stop = self.slot(position)
        return self.written(rows, stop - self.ring.keep, stop)

    def rows_before(self, position: int) -> Arrays:
        """Return copies of what :meth:`with_sinks_before` overwrites.

        Drop them before anything is evaluated, unless they are to be written back: a framework that
        is lazy makes no copies then. If it did, its writes would not be in place.
        """
        stop = self.slot(position)
        return self.backend.owned(self.slots(stop - self.ring.keep, stop))

    def bounds(self, lead: int, stop: int) -> tuple[int, int]:
        """Return the slots of sinks and of the tokens ``[lead, stop)``."""
        return _bounds(self.ring, self.shift, self.settled, lead, stop)

    def positions(self, lead: int, stop: int) -> Int32s:
        """Return the position in each column of a view of :meth:`bounds`."""
        return arena_columns(self.ring, self.sizes, self.shift, self.settled, lead, stop)


def place(
    sizes: Sizes, shift: int, ring: Ring, first: int, stop: int, settling: bool, growing: bool
) -> Placement:
    """Do :meth:`Arena.placement` for an arena of such sizes, which need not be allocated."""
    if stop - shift <= sizes.capacity and not settling:
        return Placement(sizes, shift)
    limit = NO_LIMIT if sizes.limit is None else sizes.limit
    head = ring.head(sizes.slices_are_views)
    full = head + 2 * ring.window
    if stop - shift <= limit and not settling:
        # Two windows as soon as one is full: from then on nothing grows.
        least = full if stop >= ring.window + ring.keep else 0
        return Placement(sizes.grown(max(stop - shift, least)), shift)
    moved = max(first, ring.keep) - head if settling or first > ring.keep else 0
    if stop - moved <= limit:
        return Placement(sizes.grown(max(stop - moved, full)), moved)
    if growing:
        unlimited = sizes._replace(limit=None).grown(stop - moved)
        return Placement(unlimited._replace(limit=sizes.limit), moved)
    kept = ring.first(stop)
    return Placement(sizes.grown(max(full, stop - kept + head)), kept - head, wide=True)


def arena_columns(
    ring: Ring, sizes: Sizes, shift: int, settled: bool, lead: int, stop: int
) -> Int32s:
    """Return the position in each column of a view of sinks and the tokens ``[lead, stop)``.

    -1 in columns of padding, and in those of tokens that were dropped.
    """
    own, end = _bounds(ring, shift, settled, lead, stop)
    first, last = sizes.span(own, end)
    positions = np.arange(first + shift, last + shift, dtype=np.int32)
    positions[
        (positions >= stop) | ((positions < lead) & (settled | (positions >= ring.keep)))
    ] = -1
    positions[positions < 0] = -1
    if settled:
        sinks = own - first if sizes.slices_are_views else 0
        positions[sinks : sinks + ring.keep] = np.arange(ring.keep)
    return positions


def _bounds(ring: Ring, shift: int, settled: bool, lead: int, stop: int) -> tuple[int, int]:
    if not ring.keep:
        return lead - shift, stop - shift
    return lead - shift - ring.keep if settled else -shift, stop - shift
