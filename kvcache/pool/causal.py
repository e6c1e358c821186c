"""The causal cache: many sequences in one pool, with sliding windows and chunks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Self

import numpy as np

from kvcache._checks import (
    as_index,
    as_indices,
    as_limit,
    as_sizes,
    as_tokens_or_none,
    check_ids,
    check_range,
)
from kvcache._interrupts import uninterrupted
from kvcache._locks import Lock
from kvcache.backends import Array, Backend, CacheConfig, get_backend
from kvcache.errors import KVCacheError, NotSupportedError
from kvcache.snapshots.snapshot import CacheSpec, Part
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.lengths import round_up
from kvcache.storage.masks import device_mask

from .ahead import TokensAhead, seen_ahead, tell_owners
from .attention import as_scoring, attend
from .batch import Batch
from .buffers import PoolBuffers
from .cells import CellTable
from .edits import prepare_copy, prepare_removal
from .latest import LatestPass, Progress
from .layouts import kv_layouts, layer_sizes
from .originals import Shift
from .owned import Commit
from .page_calls import PageCalls
from .paged_table import as_page, new_table
from .passes import CellPool, cells_of, tokens_retained
from .plan import ForwardPlan, PoolState
from .planning import Planned, PlanningCache
from .programs import plan_current, plan_steps


class CausalCache(PageCalls, PlanningCache[ForwardPlan, PoolState]):
    """Causal attention over many sequences, within an optional window or chunk.

    window: a token sees itself and the ``window - 1`` tokens before it; None, or a number beyond
        every position such as ``2**31 - 1``: all of them.
    memory: tokens kept per sequence, to resume it further back; at least `window`, the default.
        With several sequences, at least one more than the window is kept.
    chunk: a token sees only its own chunk of so many positions (chunked attention, Llama 4).
    shift: ``shift(layer, keys, offsets)`` moves keys by `offsets` positions, int32 [tokens], when
        the middle of a sequence is removed; None: not supported. Shifts of a key add up: it is
        given the key as it was put, and its whole way from there, so that it is rounded once. For
        that, the first removal from the middle allocates a second buffer of keys for each layer.
    page: cells handed out together, a power of two: the tokens of a sequence fill pages in order,
        as kernels for paged attention read them (:meth:`block_table`). 1: any free cells.

    Sequences with a common prefix share its cells, as in llama.cpp's unified KV cache.

    Passes are also available as plans: the host plans a pass, and :mod:`kvcache.functional`
    applies it in a program compiled once::

        cache.allocate(range(layers), kv_heads, head_dim)
        state = cache.program_state
        for batch in batches:
            logits, state = step(weights, state, cache.plan(batch), ids)
        cache.program_state = state
    """

    def __init__(
        self,
        window: int | None = None,
        memory: int | None = None,
        chunk: int | None = None,
        shift: Shift | None = None,
        page: int = 1,
    ) -> None:
        super().__init__()
        self.window = as_limit(window, "window")
        # Kept as it is: None stands for the window here, and a huge number for everything.
        self.memory = as_tokens_or_none(memory, "memory")
        self.chunk = as_limit(chunk, "chunk")
        self.shift = shift
        self.page = as_page(page)
        self._config: CacheConfig | None = None
        self._cell_pool: CellPool | None = None
        self._layer = 0

    # Before the first pass.

    def set_config(self, config: CacheConfig) -> None:
        if self._cell_pool is not None:
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
        max_sequences, capacity, max_batch = as_sizes(
            max_sequences=max_sequences, capacity=capacity, max_batch=max_batch
        )
        target = get_backend(backend)
        config = self._config or target.config
        retained = tokens_retained(self.window, self.memory, max_sequences, capacity)
        cells = cells_of(max_sequences, capacity, max_batch, retained, self.page, config.padding)
        buffers = PoolBuffers(target, kv_layouts(config), dtype, cells)
        table = new_table(cells, max_sequences, self.page)
        self._cell_pool = self._pool_of(table, buffers, config, retained, self.lock)
        self.owners.all_gone()

    def _pool_of(
        self,
        table: CellTable,
        buffers: PoolBuffers,
        config: CacheConfig,
        retained: int | None,
        lock: Lock,
    ) -> CellPool:
        """Return a pool over `table` and `buffers` with the rules of this cache."""
        before = None if self.window is None else self.window - 1
        return CellPool(
            table,
            buffers,
            attended=Visibility(before, self.chunk),
            # At least the last token, which tells a sequence its position, even for a window of 1.
            resumed=Visibility(None if before is None else max(1, before), self.chunk),
            retained=retained,
            config=config,
            lock=lock,
            unfinished=self.is_unfinished,
        )

    @property
    def _pool(self) -> CellPool:
        if self._cell_pool is None:
            raise KVCacheError("a cache is sized before it is used. Call init first.")
        return self._cell_pool

    @property
    def backend(self) -> Backend | None:
        return None if self._cell_pool is None else self._cell_pool.buffers.backend

    @property
    def cells(self) -> int:
        """Size of the pool in tokens, for all sequences together."""
        return self._pool.table.cells

    def allocate(
        self, layers: Iterable[int], kv_heads: int, head_dim: int, value_dim: int | None = None
    ) -> None:
        """Allocate the buffers of all `layers` now, or of none, instead of at their first put.

        value_dim: head_dim of the values, if it differs from that of the keys; 0: keys only.

        Raises: ValueError for sizes below 1, KVCacheError before :meth:`init`, ShapeError for a
            layer that exists with other sizes.
        """
        kv_heads, dims = layer_sizes(kv_heads, head_dim, value_dim)
        self._pool.buffers.allocate(as_indices(layers, "layers"), kv_heads, dims)

    # Passes.

    def prepare_forward(self, batch: Batch, reserve: bool) -> Commit:
        return self._pool.prepare(batch, reserve, self)

    def revert_forward(self) -> None:
        self._pool.revert()

    def pass_progress(self) -> Progress:
        return self._pool.passes.progress if self._cell_pool else Progress.NOTHING

    def note_whole(self) -> None:
        self._pool.passes.settle()

    def drop_pass(self) -> None:
        self._pool.take_back()

    def set_causal(self, except_: TokensAhead = ()) -> None:
        forward_pass = self._pool.current_pass()
        ahead = seen_ahead(except_, forward_pass.positions, forward_pass.sequences)
        if forward_pass.ahead != ahead:
            forward_pass.ahead, forward_pass.device_mask = ahead, None
            forward_pass.reads = forward_pass.blocks = None
            with self.lock:
                tell_owners(self.owners, ahead, forward_pass.positions, forward_pass.sequences)

    # Layers.

    def set_layer(self, layer: int) -> None:
        self._layer = layer if type(layer) is int else as_index(layer, "layer")

    def put(
        self, keys: Array, values: Array | None = None, frames: Sequence[int] | None = None
    ) -> None:
        if frames is not None:
            raise NotSupportedError("frames are of encoder output; this cache stores tokens.")
        pool, arrays = self._pool, (keys,) if values is None else (keys, values)
        forward_pass = pool.current_pass()
        if forward_pass.detached and not self.is_unfinished():
            raise KVCacheError(
                "a pass is over once every layer was put and a sequence of it has changed: its "
                "cells may belong to another one. Call start_forward."
            )
        pool.buffers.put(self._layer, arrays, forward_pass)
        forward_pass.put_layers.add(self._layer)

    def get(self) -> tuple[Array, Array | None, Array]:
        pool = self._pool
        forward_pass = pool.current_pass()
        arrays = pool.buffers.get(self._layer, forward_pass)
        mask = forward_pass.device_mask
        if mask is None:
            with self.lock:  # other threads may change sequences, and so the table, during a pass
                visible = forward_pass.mask()
            mask = device_mask(pool.buffers.backend, pool.config.mask_dtype, visible)
            forward_pass.device_mask = mask
        return arrays[0], arrays[1] if len(arrays) > 1 else None, mask

    def attend(
        self,
        q: Array,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Array | None = None,
    ) -> Array:
        pool = self._pool
        forward_pass = pool.current_pass()
        if self._layer not in forward_pass.put_layers:
            raise KVCacheError(f"layer {self._layer} was not put in this pass. Put it first.")
        buffers, tokens = pool.buffers, forward_pass.cells.size
        scoring = as_scoring(buffers, self._layer, q, tokens, scale, softcap, sinks)
        return attend(buffers, self._layer, q, forward_pass, scoring, self.lock)

    # Programs.

    def export_programs(self) -> PoolState:
        return self._pool.buffers.export_state()

    def prepare_import(self, state: PoolState) -> Commit:
        pool = self._pool
        take_over = pool.buffers.prepare_import(state)

        def commit() -> None:
            take_over()
            pool.passes.confirm()

        return commit

    def has_plans(self) -> bool:
        return bool(self._pool.passes.planned)

    def prepare_replan(self, batch: Batch) -> Commit:
        pool = self._pool
        failed = pool.passes.conflicting(batch.positions, batch.sequences)
        return (lambda: pool.drop(failed, None, maybe_written=True)) if failed else (lambda: None)

    def tokens_begun(self) -> int:
        return len(self._pool.current_pass().cells)

    def pass_savepoint(self) -> Commit:
        pool, before = self._pool, self._pool.passes.current

        def undo() -> None:
            if begun := pool.passes.begun_after(before):
                pool.drop(begun, before)

        return undo

    def plan_begun(self, tokens: int | None, reads: bool) -> ForwardPlan:
        return plan_current(self._pool, self.tokens_begun(), tokens, reads)

    def begin_steps(self, batch: Batch, steps: int, reads: bool) -> Planned[ForwardPlan]:
        return plan_steps(self._pool, batch, steps, partial(self.begin_pass, reserve=False), reads)

    # Sequences.

    def latest_pass(self, sequence: int) -> LatestPass:
        with self.lock:
            return self._pool.passes.latest(sequence) if self._cell_pool else LatestPass()

    def can_resume(self, sequence: int, position: int) -> bool:
        pool = self._pool
        sequence, position = as_index(sequence, "sequence"), as_index(position, "position")
        check_ids(pool.table.max_sequences, sequence)
        with self.lock:
            lowest = int(pool.attended.lowest(np.array(position)))
            # Positions are unique, so a full count means that none is missing.
            held = pool.passes.find(sequence, position) - pool.passes.find(sequence, lowest)
            return held == position - lowest

    def prepare_copy_prefix(self, source: int, target: int, length: int) -> Commit:
        pool = self._pool
        check_ids(pool.table.max_sequences, source, target)
        if length < 0:
            raise ValueError(f"a prefix has a length >= 0; got {length}.")
        if not self.can_resume(source, length):
            self.check_source(source)
        return prepare_copy(pool, source, target, length)

    def holds_tokens(self, sequence: int) -> bool:
        return bool(self._pool.passes.history(sequence).size)

    def prepare_remove(self, sequence: int, start: int, stop: int | None) -> Commit:
        check_ids(self._pool.table.max_sequences, sequence)
        check_range(start, stop)
        return prepare_removal(self._pool, self.shift, sequence, start, stop)

    # Snapshots.

    def share_lock(self, lock: Lock) -> None:
        super().share_lock(lock)
        if self._cell_pool is not None:
            self._cell_pool.pins.lock = lock

    @property
    def max_sequences(self) -> int:
        return self._pool.table.max_sequences

    @property
    def specs(self) -> list[CacheSpec]:
        return [CacheSpec("causal", self._pool.resumed, self._pool.buffers.dtype)]

    def next_position(self, sequence: int) -> int:
        sequence = as_index(sequence, "sequence")
        check_ids(self._pool.table.max_sequences, sequence)
        with self.lock:
            return self._pool.passes.next_position(sequence)

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        sequence, points = as_index(sequence, "sequence"), as_indices(positions, "positions")
        check_ids(self._pool.table.max_sequences, sequence)
        if self._pool.retained is not None:  # otherwise no token is ever dropped
            with self.lock, uninterrupted():
                self._pool.pins.schedule(sequence, points)

    def capture(self, sequence: int, start: int, stop: int) -> list[Part]:
        return [Part(self.specs[0], self._pool.pins.capture(sequence, start, stop))]

    def prepare_restore(
        self, sequence: int, parts: Sequence[Sequence[Part]], position: int
    ) -> Commit:
        pool, rows = self._pool, [part.rows for [part] in parts]
        if not self.is_unfinished():
            pool.passes.release()  # the last pass is over, though no other has begun
        restore = pool.pins.prepare_restore(sequence, rows, position)

        def commit() -> None:
            pool.passes.detach(sequence)  # tokens of an unfinished pass are all it may have
            pool.passes.restored(sequence)
            restore()
            pool.maybe_expired |= {sequence}

        return commit

    def to_backend(self, backend: str | Backend) -> Self:
        target, clone = get_backend(backend), self._shallow_copy()
        with self.lock:  # other threads may change sequences meanwhile
            if self._cell_pool is not None:
                clone._cell_pool = clone._copy_of(self._cell_pool, target)
        return clone

    def _copy_of(self, pool: CellPool, target: Backend) -> CellPool:
        """Return a copy of `pool` on `target`, with the lock of this cache."""
        config = self._config or target.config
        cells = round_up(pool.table.cells, math.lcm(config.padding, self.page))
        table = pool.table.copy(cells)
        pool.pins.unpin_in_copy(table)  # snapshots keep cells of that cache, not of its copy
        pool.passes.leave_out(table)
        buffers = pool.buffers.to_backend(target, kv_layouts(config), cells)
        copied = self._pool_of(table, buffers, config, pool.retained, self.lock)
        copied.maybe_expired = pool.maybe_expired
        return copied

    def prepare_close(self) -> Commit:
        pool = self._cell_pool
        if pool is None:
            return lambda: None
        spill = pool.pins.prepare_spill()  # snapshots outlive the cache

        def commit() -> None:
            spill()
            self._cell_pool = None
            pool.buffers.free()

        return commit
