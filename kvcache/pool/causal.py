"""The causal cache: many sequences in one pool of cells, with sliding windows and chunks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from typing import Self, TypeAlias

import numpy as np

from kvcache._checks import check_ids, check_range, check_sizes
from kvcache._types import Int32s
from kvcache.backends import Array, Backend, CacheConfig, get_backend
from kvcache.errors import CacheFullError, KVCacheError, NotSupportedError, SharedCellsError
from kvcache.snapshots.rows import Visibility
from kvcache.snapshots.snapshot import CacheSpec, Part
from kvcache.storage.masks import device_mask

from .base import Commit
from .batch import Batch
from .buffers import PoolBuffers
from .cells import CellTable, Eviction, SingleTokenStep, SortedBatch
from .pinning import PoolPins
from .plan import Pass
from .planned import PlannedCache

Shift: TypeAlias = Callable[[int, Array, Array], Array]
"""``shift(layer, keys, offsets) -> keys``: move keys by `offsets` positions, int32 [tokens]."""


class CausalCache(PlannedCache):
    """Every token sees those before it in its sequence, within an optional window or chunk.

    window: a token sees itself and the ``window - 1`` before it; None: all.
    memory: tokens kept per sequence, so that it can be resumed further back; at least `window`,
        which is the default. With several sequences, one more than the window at least.
    chunk: a token sees only its own chunk of so many positions (chunked attention, Llama 4).
    shift: moves keys when the middle of a sequence is removed; None: that is not supported.
    """

    def __init__(
        self,
        window: int | None = None,
        memory: int | None = None,
        chunk: int | None = None,
        shift: Shift | None = None,
    ) -> None:
        for name, value in (("window", window), ("memory", memory), ("chunk", chunk)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1 token, or None for no limit; got {value}.")
        self.window = window
        self.memory = memory
        self.chunk = chunk
        self.shift = shift
        self._config: CacheConfig | None = None
        self._state: tuple[CellTable, PoolBuffers] | None = None
        self._pass: Pass | None = None
        self._mask: Array | None = None
        self._layer = 0

    # Before the first pass.

    def set_config(self, config: CacheConfig) -> None:
        if self._state is not None:
            raise KVCacheError("set_config comes before init. Make a new cache.")
        self._config = config

    def init(
        self,
        backend: str | Backend,
        dtype: str = "float32",
        *,
        max_sequences: int = 1,
        capacity: int,
        max_batch: int,
    ) -> None:
        check_sizes(max_sequences=max_sequences, capacity=capacity, max_batch=max_batch)
        where = get_backend(backend)
        config = self._config or where.config
        self._tokens_retained = self._tokens_kept(max_sequences, capacity)
        cells = max_sequences * capacity
        if self._tokens_retained is not None:
            cells = max_sequences * (self._tokens_retained - 1) + max_batch
        cells = -(-cells // config.padding) * config.padding
        self._begin_with(CellTable(cells, max_sequences), PoolBuffers(where, config, dtype, cells))
        # Sequences that were stored since they were last trimmed to what is kept.
        self._maybe_expired: set[int] = set()

    def _begin_with(self, table: CellTable, buffers: PoolBuffers) -> None:
        self._state = table, buffers
        self._pins = PoolPins(table, buffers, self._visibility, self.lock)

    @property
    def _visibility(self) -> Visibility:
        return Visibility(None if self.window is None else max(1, self.window - 1), self.chunk)

    def _tokens_kept(self, max_sequences: int, capacity: int) -> int | None:
        """Tokens that a sequence keeps, the newest included; None for all."""
        if self.memory is not None and (self.window is None or self.memory < self.window):
            raise ValueError(
                f"memory must be at least the window; got {self.memory} for {self.window}."
            )
        if self.window is None:
            return None
        kept = self.memory or self.window
        if max_sequences > 1:
            # So that a sequence can go on from before its stop token, which nobody builds on.
            kept = max(kept, self.window + 1)
        return None if kept > capacity else kept

    # Passes.

    def prepare_forward(self, batch: Batch, reserve: bool) -> Commit:
        self._initialised()
        positions, sequences = batch.positions, batch.sequences
        if reserve:
            return lambda: self._reserve(positions, sequences)
        if self._pins.scheduled:
            self._pins.collect()
        if len(batch) == 1 and (step := self._plan_single(int(sequences[0]), int(positions[0]))):
            return lambda: self._commit_single(step, positions, sequences)
        groups = self._table.group(positions, sequences)
        eviction = (
            None if self._tokens_retained is None else self._expired(groups, self._tokens_retained)
        )
        self._check_room(len(batch), eviction)
        return lambda: self._commit_batch(positions, sequences, groups, eviction)

    def _check_room(self, tokens: int, eviction: Eviction | None) -> None:
        """Let snapshots leave until there is room, or raise CacheFullError."""
        while True:
            try:
                return self._table.check_room(tokens, eviction)
            except CacheFullError:
                if not self._pins.spill_one(eviction):
                    raise

    def _reserve(self, positions: Int32s, sequences: Int32s) -> None:
        """The largest pass there can be: it reads the whole pool, and stores nothing."""
        cells = np.arange(positions.size, dtype=np.int32)
        self._begin(cells, 0, self._table.size, positions, sequences, stores=False)

    def _plan_single(self, sequence: int, position: int) -> SingleTokenStep | None:
        """The short way, where only one sequence could have anything to let go of."""
        if self._tokens_retained is None:
            return self._table.plan_single(sequence, position, 0)
        if self._maybe_expired != {sequence}:
            return None
        return self._table.plan_single(sequence, position, position - (self._tokens_retained - 1))

    def _commit_single(self, step: SingleTokenStep, positions: Int32s, sequences: Int32s) -> None:
        self._table.commit_single(step)
        cells = np.array([step.cell], np.int32)
        self._begin(cells, *self._buffers.range(step.low, step.high + 1), positions, sequences)

    def _expired(self, groups: SortedBatch, kept: int) -> Eviction:
        """What lies too far back, for the batch's sequences and those idle since their last."""
        ids, nexts = groups.ids, groups.positions[groups.starts].astype(np.int64)
        idle = self._maybe_expired.difference(ids.tolist())
        if idle:
            ids = np.append(ids, np.array([*idle], np.int32))
            nexts = np.append(nexts, [self._table.next_position(sequence) for sequence in idle])
        return self._table.expired(ids, nexts - (kept - 1))

    def _commit_batch(
        self, positions: Int32s, sequences: Int32s, groups: SortedBatch, eviction: Eviction | None
    ) -> None:
        table = self._table
        if eviction is not None:
            table.evict(eviction)
            self._maybe_expired = set(groups.ids.tolist())
        cells = table.insert(groups)
        start, stop = table.span(groups.ids)
        self._begin(cells, *self._buffers.range(start, stop), positions, sequences)

    def _begin(
        self,
        cells: Int32s,
        start: int,
        stop: int,
        positions: Int32s,
        sequences: Int32s,
        stores: bool = True,
    ) -> None:
        limits = self.window, self.chunk
        self._pass = Pass(self._table, cells, start, stop, positions, sequences, *limits, stores)
        self._mask = None

    def set_causal(self, except_: Sequence[int] = ()) -> None:
        plan = self._current()
        if plan.ahead != frozenset(except_):
            plan.ahead = frozenset(except_)
            self._mask = None

    # LayerRows.

    def set_layer(self, layer: int) -> None:
        self._layer = layer

    def put(self, keys: Array, values: Array | None = None) -> None:
        self._buffers.put(self._layer, keys, values, self._current())

    def get(self) -> tuple[Array, Array | None, Array]:
        plan, buffers = self._current(), self._buffers
        keys, values = buffers.get(self._layer, plan)
        if self._mask is None:
            with self.lock:  # sequences of others may be moved about in the table
                visible = plan.mask()
            self._mask = device_mask(buffers.backend, buffers.config.mask_dtype, visible)
        return keys, values, self._mask

    # Sequences.

    def can_resume(self, sequence: int, position: int) -> bool:
        check_ids(self._table.max_sequences, sequence)
        with self.lock:
            return self._can_resume(sequence, position)

    def _can_resume(self, sequence: int, position: int) -> bool:
        lowest = 0
        if self.window is not None:
            lowest = max(lowest, position - (self.window - 1))
        if self.chunk is not None:
            lowest = max(lowest, position - position % self.chunk)
        held = self._table.find(sequence, position) - self._table.find(sequence, lowest)
        return held == position - lowest

    def prepare_copy_prefix(self, source: int, target: int, length: int) -> Commit:
        table = self._table
        check_ids(table.max_sequences, source, target)
        if length < 0:
            raise ValueError(f"a prefix has a length >= 0; got {length}.")
        if not table.cells_of(source).size:
            raise ValueError(f"copy_prefix needs a source that holds tokens; {source} is empty.")
        kept = table.find(source, length)
        if source == target:
            return lambda: self._truncate(source, kept)
        return lambda: self._share(source, target, kept)

    def _truncate(self, sequence: int, length: int) -> None:
        self._table.truncate(sequence, length)
        self._changed(sequence)

    def _changed(self, sequence: int) -> None:
        """What was said of a sequence, from its end on, is not true any more."""
        self._pins.forget(sequence, self._table.next_position(sequence))
        if self._pass is not None and sequence in self._pass.sequences:
            self._pass = None  # it speaks of cells that may be others' by now

    def _share(self, source: int, target: int, length: int) -> None:
        self._pins.forget(target, 0)  # what it was: the source had none of it
        self._table.share(source, target, length)
        self._maybe_expired.add(target)
        self._changed(target)

    def prepare_remove(self, sequence: int, start: int, stop: int | None) -> Commit:
        table = self._table
        check_ids(table.max_sequences, sequence)
        check_range(start, stop)
        first = table.find(sequence, start)
        last = table.cells_of(sequence).size if stop is None else table.find(sequence, stop)
        moving = table.cells_of(sequence)[last:].copy()
        if stop is None or not moving.size:
            return lambda: self._truncate(sequence, first)
        if start == stop:
            return lambda: None
        keys = self._shifted(sequence, moving, stop, start - stop)
        return lambda: self._remove_middle(sequence, start, range(first, last), start - stop, keys)

    def _shifted(self, sequence: int, cells: Int32s, stop: int, offset: int) -> dict[int, Array]:
        """Keys that the shift makes of those in `cells`, by layer; nothing is stored yet."""
        self._pins.spill(cells)
        if self._table.is_shared(cells):
            raise SharedCellsError(
                f"cells that move must belong to one sequence; some at or behind position {stop} "
                f"of sequence {sequence} are shared. Remove the other sequences first."
            )
        if self.shift is None:
            raise NotSupportedError(
                "removing from the middle moves later tokens, and this cache has no shift. "
                "Make it with CausalCache(shift=...)."
            )
        shift, buffers = self.shift, self._buffers
        offsets = buffers.backend.from_host(np.full(cells.size, offset, np.int32))
        return buffers.changed_keys(cells, lambda layer, keys: shift(layer, keys, offsets))

    def _remove_middle(
        self, sequence: int, start: int, removed: range, offset: int, keys: dict[int, Array]
    ) -> None:
        self._pins.forget(sequence, start)
        moved = self._table.remove_middle(sequence, removed.start, removed.stop, offset)
        self._buffers.set_keys(moved, keys)
        self._changed(sequence)

    # Snapshots.

    def share_lock(self, lock: threading.RLock) -> None:
        super().share_lock(lock)
        if self._state is not None:
            self._pins.lock = lock

    @property
    def max_sequences(self) -> int:
        return self._table.max_sequences

    @property
    def specs(self) -> list[CacheSpec]:
        return [CacheSpec("causal", self._visibility, self._buffers.dtype)]

    def next_position(self, sequence: int) -> int:
        with self.lock:
            return self._table.next_position(sequence)

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        check_ids(self._table.max_sequences, sequence)
        if self._tokens_retained is not None:  # else nothing is ever let go of
            with self.lock:
                self._pins.schedule(sequence, positions)

    def capture(self, sequence: int, start: int, stop: int) -> list[Part]:
        [(kind, visibility, dtype)] = self.specs
        return [Part(kind, visibility, self._pins.capture(sequence, start, stop), dtype)]

    def prepare_restore(
        self, sequence: int, parts: Sequence[Sequence[Part]], position: int
    ) -> Commit:
        rows = [part.rows for [part] in parts]
        seat = self._pins.prepare_restore(sequence, rows, position)

        def commit() -> None:
            seat()
            self._maybe_expired.add(sequence)

        return commit

    def to_backend(self, backend: str | Backend) -> Self:
        where, twin = get_backend(backend), copy(self)
        vars(twin).pop("lock", None)
        twin._pass = twin._mask = None
        if self._state is not None:
            table, buffers = self._state
            config = self._config or where.config
            cells = -(-table.size // config.padding) * config.padding
            there = table.copy(cells)
            self._pins.unpin_in_copy(there)
            twin._begin_with(there, buffers.to_backend(where, config, cells))
            twin._maybe_expired = set(self._maybe_expired)
        return twin

    def close(self) -> None:
        with self.lock:
            if self._state is not None:
                self._pins.spill()
                self._buffers.free()
            self._state = self._pass = None
