"""A per-layer cache that holds a bounded number of tokens in a ring."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvcache.backends import Array, Backend, HostArray
from kvcache.snapshots.rows import Slots, TokenRows, Visibility
from kvcache.storage.layout import TOKENS

from .growing import Checkpoint, KVCache, Positions, padded
from .pinning import read_tokens
from .state import RingState


@dataclass
class Update:
    """One update since a checkpoint: what came, and the rows that it displaced."""

    keys: Array
    values: Array
    slots: HostArray
    displaced: tuple[Array, Array]


class RotatingKVCache(KVCache):
    """A bounded cache for one layer: the first `keep` tokens and the latest others.

    A query sees itself, the ``max_size - keep - 1`` tokens before it, and the first `keep`
    tokens (attention sinks, StreamingLLM, arXiv:2309.17453), in whatever chunks the tokens
    come: a chunk of several returns the columns of all their windows, with the mask to tell
    them apart. Columns are in no particular order; :attr:`positions` has their positions.

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
        self._options = {
            "max_size": max_size,
            "keep": keep,
            "backend": backend,
            "step": step,
            "dtype": dtype,
        }
        self._start()

    def _start(self) -> None:
        super()._start()
        # Tokens of the last update that stand as columns of their own behind the ring's.
        self._extra = 0

    @property
    def len(self) -> int:
        return min(self._offset, self.max_size)

    @property
    def positions(self) -> Positions:
        start = self._offset - self._extra
        ring = self._ring_positions(start)
        if not self._extra:
            return ring
        columns = np.concatenate([ring, np.arange(start, self._offset, dtype=np.int32)])
        return padded(columns, self._buffers.padded(columns.size))

    def update(self, keys: Array, values: Array) -> tuple[Array, Array]:
        buffers = self._buffers
        start = self._offset
        tokens = buffers.validate(keys, values)
        stop = start + tokens
        if min(stop, self.max_size) > buffers.capacity:
            buffers.grow(min(stop, self.max_size))
        if self._checkpoint is not None:
            self._record(self._checkpoint, keys, values)
        if stop <= self.max_size:
            self._extra = 0
            buffers.write(keys, values, start, stop)
        elif tokens == 1:
            self._before_displacing()
            self._extra = 0
            slot = self._turn(start)
            buffers.write(keys, values, slot, slot + 1)
        else:
            return self._update_beyond(keys, values, tokens)
        self._offset = stop
        return buffers.view(self.len)

    def _update_beyond(self, keys: Array, values: Array, tokens: int) -> tuple[Array, Array]:
        """Several tokens, some of which displace others that the first queries still see."""
        self._before_displacing()
        columns = self._buffers.held_and_update(keys, values, self.len)
        self._store(keys, values)
        self._extra = tokens
        self._offset += tokens
        if self._pins.scheduled:
            self._keep_from(columns)
        return columns

    def _before_displacing(self) -> None:
        """Save what snapshots need of the slots that the next update writes to."""
        if self._pins.scheduled:
            self._pins.collect(*self._held(), self.visibility, self._offset)
        if self._pins.rows:
            self._pins.spill()

    def _keep_from(self, columns: tuple[Array, Array]) -> None:
        """Keep what is scheduled inside the last update, some of which no slot holds any more."""
        positions = self.positions
        order = np.argsort(positions)[np.count_nonzero(positions < 0) :]
        for place in sorted(each for each in self._pins.scheduled if each < self._offset):
            wanted = order[self.visibility.needed(positions[order], place)]
            backend: Any = self.backend
            self._pins.keep(TokenRows(positions[wanted], read_tokens(backend, *columns, wanted)))
            self._pins.scheduled.remove(place)

    @property
    def visibility(self) -> Visibility:
        return Visibility(self._window, sinks=self.keep)

    def schedule(self, positions: Iterable[int]) -> None:
        self._pins.scheduled.update(each for each in positions if each >= self._offset)

    def _held(self) -> tuple[Positions, Slots]:
        positions = self._ring_positions(self._offset)[: self.len]
        slots = np.argsort(positions)
        return positions[slots], slots

    def _places(self, positions: Positions) -> Slots:
        return np.where(positions < self.max_size, positions, self._turn(positions)).astype(int)

    def _store(self, keys: Array, values: Array) -> None:
        """Write those tokens of an update that will be held after it."""
        positions, slots = self._destinations(keys.shape[TOKENS])
        if positions.size < keys.shape[TOKENS]:
            keys, values = self._buffers.take_tokens(keys, values, positions - self._offset)
        self._buffers.write_rows(keys, values, slots)

    def _destinations(self, tokens: int) -> tuple[Positions, Positions]:
        """Positions, of the next `tokens`, that will be held, and their slots."""
        start, stop = self._offset, self._offset + tokens
        positions = np.arange(start, stop, dtype=np.int32)
        positions = positions[(positions < self.keep) | (positions >= stop - self._window)]
        slots = np.where(positions < self.keep, positions, self._turn(positions))
        return positions, slots

    def _turn(self, position: Any) -> Any:
        """Slot of a position (an int or an array) that is no sink: they take turns."""
        return self.keep + (position - self.keep) % self._window

    def _ring_positions(self, offset: int) -> Positions:
        """Position in every column of the ring when `offset` tokens have been seen."""
        slots = np.arange(min(offset, self.max_size), dtype=np.int32)
        latest = offset - 1
        turned = latest - (latest - slots) % self._window
        positions = np.where(slots < self.keep, slots, turned).astype(np.int32)
        return padded(positions, self._buffers.width(slots.size))

    def _slots(self, offset: int) -> int:
        return min(offset, self.max_size)

    def _exported(self, keys: Array, values: Array, offset: Array) -> RingState:
        self._before_displacing()
        self._extra = 0
        ring = self._ring_positions(self._offset)
        positions = np.full(self._buffers.capacity, -1)
        positions[: self.len] = ring[: self.len]
        slot = self._offset if self._offset < self.max_size else self._turn(self._offset)
        numbers = slot, self.keep, min(self.max_size, self._buffers.capacity)
        return RingState(
            keys,
            values,
            offset,
            self._on_device(positions),
            self._buffers.empty(),
            *map(self._on_device, numbers),
        )

    def can_trim(self, tokens: int) -> bool:
        return tokens == 0 or (super().can_trim(tokens) and self._offset <= self.max_size)

    def _why_not(self, tokens: int) -> str:
        if super().can_trim(tokens):
            return (
                f"a rotating cache cannot trim once tokens were displaced: {self._offset} came, "
                f"it holds {self.max_size}. Use checkpoint() and rollback()."
            )
        return super()._why_not(tokens)

    def _maskable(self) -> int:
        return self._offset if self._offset <= self.max_size else max(1, self._extra)

    def _visible(
        self, queries: Positions, columns: Positions, window: int | None
    ) -> npt.NDArray[np.bool_]:
        visible = super()._visible(queries, columns, min(window or self._window, self._window))
        return visible | ((columns >= 0) & (columns < self.keep) & (columns <= queries))

    def _rewind(self, offset: int) -> None:
        super()._rewind(offset)
        self._extra = 0

    def _record(self, mark: Checkpoint, keys: Array, values: Array) -> None:
        """Keep what a rollback needs: copies of the update and of the rows it displaces."""
        tokens = keys.shape[TOKENS]
        _, slots = self._destinations(tokens)
        kept = self._buffers.take_tokens(keys, values, np.arange(tokens))
        mark.updates.append(Update(*kept, slots, self._buffers.read_rows(slots)))

    def _return_to(self, mark: Checkpoint, accepted: int) -> None:
        self._pins.spill()
        for update in reversed(mark.updates):
            keys, values = update.displaced
            self._buffers.write_rows(keys, values, update.slots)
        self._rewind(mark.offset)
        self._pins.scheduled |= {place for place in mark.scheduled if place > mark.offset}
        for update in mark.updates:
            tokens = min(accepted, update.keys.shape[TOKENS])
            if tokens:
                first = np.arange(tokens)
                self.update(*self._buffers.take_tokens(update.keys, update.values, first))
            accepted -= tokens
        self._extra = 0
