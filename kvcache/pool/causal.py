"""The causal cache: many sequences in one pool, with sliding windows and chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Self, TypeAlias

import numpy as np

from kvcache._checks import (
    NO_LIMIT,
    as_batch_indices,
    as_index,
    as_indices,
    as_limit,
    as_room,
    as_sizes,
    as_tokens_or_none,
    check_ids,
    check_range,
)
from kvcache._locks import Lock
from kvcache._types import Int32s
from kvcache.backends import Array, Backend, CacheConfig, get_backend
from kvcache.errors import KVCacheError, NotSupportedError, SharedCellsError
from kvcache.snapshots.snapshot import CacheSpec, Part
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.lengths import round_up
from kvcache.storage.masks import device_mask

from .base import Cache, Commit
from .batch import Batch
from .buffers import PoolBuffers, kv_layouts
from .cells import CellTable
from .passes import CellPool
from .plan import ForwardPlan, PoolState
from .programs import plan_current, plan_steps

Shift: TypeAlias = Callable[[int, Array, Array], Array]
"""``shift(layer, keys, offsets) -> keys``: move keys by `offsets` positions, int32 [tokens]."""


class CausalCache(Cache):
    """Causal attention over many sequences, within an optional window or chunk.

    window: a token sees itself and the ``window - 1`` tokens before it; None, or a number beyond
        every position such as ``2**31 - 1``: all of them.
    memory: tokens kept per sequence, to resume it further back; at least `window`, the default.
        With several sequences, at least one more than the window is kept.
    chunk: a token sees only its own chunk of so many positions (chunked attention, Llama 4).
    shift: moves keys when the middle of a sequence is removed; None: not supported.

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
    ) -> None:
        super().__init__()
        self.window = as_limit(window, "window")
        # Kept as it is: None stands for the window here, and a huge number for everything.
        self.memory = as_tokens_or_none(memory, "memory")
        self.chunk = as_limit(chunk, "chunk")
        self.shift = shift
        self._config: CacheConfig | None = None
        self._cell_pool: CellPool | None = None
        self._mask: Array | None = None
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
        retained = self._tokens_retained(max_sequences, capacity)
        cells = max_sequences * capacity
        if retained is not None:
            cells = max_sequences * (retained - 1) + max_batch
        cells = round_up(cells, config.padding)
        if cells > NO_LIMIT:
            raise ValueError(f"a pool has at most 2**31 - 1 tokens, of all sequences; got {cells}.")
        buffers = PoolBuffers(target, kv_layouts(config), dtype, cells)
        self._cell_pool = self._pool_of(
            CellTable(cells, max_sequences), buffers, config, retained, self.lock
        )

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
        )

    def _tokens_retained(self, max_sequences: int, capacity: int) -> int | None:
        """Return the number of tokens kept per sequence, the newest included; None for all."""
        needed = NO_LIMIT if self.window is None else self.window
        if self.memory is not None and self.memory < needed:
            raise ValueError(
                f"memory must be at least the window; got {self.memory} for {self.window}."
            )
        if self.window is None:
            return None
        retained = self.memory or self.window
        if max_sequences > 1:
            # One more, to resume a sequence before its stop token, which later prompts leave out.
            retained = max(retained, self.window + 1)
        # A window beyond the capacity never drops anything.
        return None if retained > capacity else retained

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
        """Allocate the buffers of `layers` now instead of at their first put.

        value_dim: head_dim of the values, if it differs from that of the keys; 0: keys only.

        Raises: ValueError for sizes below 1, KVCacheError before :meth:`init`, ShapeError for a
            layer that exists with other sizes.
        """
        kv_heads, head_dim = as_sizes(kv_heads=kv_heads, head_dim=head_dim)
        kv_heads, head_dim = as_room(kv_heads, "kv_heads"), as_room(head_dim, "head_dim")
        width = head_dim if value_dim is None else as_index(value_dim, "value_dim")
        if width < 0:
            raise ValueError(f"value_dim must be >= 0, 0 for keys only; got {width}.")
        width = as_room(width, "value_dim")
        for layer in as_indices(layers, "layers"):
            self._pool.buffers.allocate(layer, kv_heads, (head_dim, width) if width else [head_dim])

    # Passes.

    def prepare_forward(self, batch: Batch, reserve: bool) -> Commit:
        begin = self._pool.prepare(batch, reserve)

        def commit() -> None:
            begin()
            self._mask = None  # made by the first get, for all layers of the pass

        return commit

    def set_causal(self, except_: Sequence[int] = ()) -> None:
        forward_pass = self._pool.current_pass()
        ahead = frozenset(as_batch_indices(except_, forward_pass.cells.size, "except_"))
        if forward_pass.ahead != ahead:
            forward_pass.ahead = ahead
            self._mask = None

    # Layers.

    def set_layer(self, layer: int) -> None:
        self._layer = layer if type(layer) is int else as_index(layer, "layer")

    def put(self, keys: Array, values: Array | None = None) -> None:
        pool = self._pool
        arrays = (keys,) if values is None else (keys, values)
        pool.buffers.put(self._layer, arrays, pool.current_pass())

    def get(self) -> tuple[Array, Array | None, Array]:
        pool = self._pool
        forward_pass = pool.current_pass()
        arrays = pool.buffers.get(self._layer, forward_pass)
        if self._mask is None:
            with self.lock:  # other threads may change sequences, and so the table, during a pass
                visible = forward_pass.mask()
            self._mask = device_mask(pool.buffers.backend, pool.config.mask_dtype, visible)
        return arrays[0], arrays[1] if len(arrays) > 1 else None, self._mask

    # Programs.

    @property
    def program_state(self) -> PoolState:
        """Buffers of all layers, by layer, for :mod:`kvcache.functional`.

        A program consumes buffers donated to it: assign the state that it returns.

        Raises: on assignment, ShapeError if layers, shapes or dtypes differ.
        """
        return self._pool.buffers.export_state()

    @program_state.setter
    def program_state(self, state: PoolState) -> None:
        self._pool.buffers.import_state(state)

    def plan(self, batch: Batch | None = None, tokens: int | None = None) -> ForwardPlan:
        """Begin the pass of `batch`, as :meth:`start_forward` does, and return it as a plan.

        batch: None for the current pass (begun by a wrapper, or changed by set_causal).
        tokens: repeat the last token up to so many, so that a program is compiled for few
            lengths. The arrays given to the program have to repeat it, too.

        Raises: as start_forward; ValueError for more tokens than `tokens`, NotSupportedError for
            a reserve pass.
        """
        count = len(self._pool.current_pass().cells if batch is None else batch)
        tokens = None if tokens is None else as_room(tokens, "tokens")
        if tokens is not None and tokens < count:
            raise ValueError(f"a pass is padded to its length or more; got {tokens} for {count}.")
        if batch is not None:
            self.start_forward(batch)
        with self.lock:
            return plan_current(self._pool, count, tokens)

    def plan_steps(self, batch: Batch, steps: int) -> ForwardPlan:
        """Return the plans of `steps` decode steps: `batch`, then its positions + 1, and so on.

        Every leaf of the plan has one more axis in front, the steps, for ``lax.scan`` or a loop.

        Raises: CacheFullError if a step does not fit; ValueError if `batch` has two tokens of one
            sequence, or a token that does not come after its last. Nothing has changed then.
        """
        [steps] = as_sizes(steps=steps)
        with self.lock:
            return plan_steps(self._pool, batch, steps, self.start_forward)

    # Sequences.

    def can_resume(self, sequence: int, position: int) -> bool:
        table = self._pool.table
        sequence, position = as_index(sequence, "sequence"), as_index(position, "position")
        check_ids(table.max_sequences, sequence)
        with self.lock:
            lowest = int(self._pool.attended.lowest(np.array(position)))
            # Positions are unique, so a full count means that none is missing.
            held = table.find(sequence, position) - table.find(sequence, lowest)
            return held == position - lowest

    def prepare_copy_prefix(self, source: int, target: int, length: int) -> Commit:
        table = self._pool.table
        check_ids(table.max_sequences, source, target)
        if length < 0:
            raise ValueError(f"a prefix has a length >= 0; got {length}.")
        if not self.holds_tokens(source) and not self.can_resume(source, length):
            raise ValueError(f"copy_prefix needs a source that holds tokens; {source} is empty.")
        kept = table.find(source, length)
        if source == target:
            return lambda: self._truncate(source, kept)
        return lambda: self._share(source, target, kept)

    def holds_tokens(self, sequence: int) -> bool:
        return bool(self._pool.table.cells_of(sequence).size)

    def _truncate(self, sequence: int, length: int) -> None:
        self._pool.table.truncate(sequence, length)
        self._changed(sequence)

    def _changed(self, sequence: int) -> None:
        """Drop rows retained beyond the end of a changed sequence, and end a pass over it."""
        pool = self._pool
        pool.pins.forget(sequence, pool.table.next_position(sequence))
        pool.end_pass_of(sequence)

    def _share(self, source: int, target: int, length: int) -> None:
        pool = self._pool
        pool.pins.forget(target, 0)  # rows retained from its old content
        pool.table.share(source, target, length)
        pool.maybe_expired.add(target)
        self._changed(target)

    def prepare_remove(self, sequence: int, start: int, stop: int | None) -> Commit:
        table = self._pool.table
        check_ids(table.max_sequences, sequence)
        check_range(start, stop)
        first = table.find(sequence, start)
        last = table.cells_of(sequence).size if stop is None else table.find(sequence, stop)
        moving = table.cells_of(sequence)[last:].copy()  # the view changes with its row
        if stop is None or not moving.size:
            return lambda: self._truncate(sequence, first)
        if start == stop:
            return lambda: None
        # The keys are shifted now, because that may raise; the commit only stores them.
        keys = self._shifted(sequence, moving, stop, start - stop)
        return lambda: self._remove_middle(sequence, start, range(first, last), start - stop, keys)

    def _shifted(self, sequence: int, cells: Int32s, stop: int, offset: int) -> dict[int, Array]:
        """Return the shifted keys of `cells` by layer; nothing is stored yet."""
        pool = self._pool
        pool.pins.spill(cells)  # first: a pin counts as a reference, but can give way
        if pool.table.is_shared(cells):
            raise SharedCellsError(
                f"cells that move must belong to one sequence; some at or behind position {stop} "
                f"of sequence {sequence} are shared. Remove the other sequences first."
            )
        if self.shift is None:
            raise NotSupportedError(
                "removing from the middle moves later tokens, and this cache has no shift. "
                "Make it with CausalCache(shift=...)."
            )
        shift, buffers = self.shift, pool.buffers
        offsets = buffers.backend.from_host(np.full(cells.size, offset, np.int32))
        return buffers.shifted_keys(cells, lambda layer, keys: shift(layer, keys, offsets))

    def _remove_middle(
        self, sequence: int, start: int, removed: range, offset: int, keys: dict[int, Array]
    ) -> None:
        pool = self._pool
        pool.pins.forget(sequence, start)
        moved = pool.table.remove_middle(sequence, removed.start, removed.stop, offset)
        pool.buffers.set_keys(moved, keys)
        self._changed(sequence)

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
            return self._pool.table.next_position(sequence)

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        sequence, points = as_index(sequence, "sequence"), as_indices(positions, "positions")
        check_ids(self._pool.table.max_sequences, sequence)
        if self._pool.retained is not None:  # otherwise no token is ever dropped
            with self.lock:
                self._pool.pins.schedule(sequence, points)

    def capture(self, sequence: int, start: int, stop: int) -> list[Part]:
        [spec] = self.specs
        return [Part(spec, self._pool.pins.capture(sequence, start, stop))]

    def prepare_restore(
        self, sequence: int, parts: Sequence[Sequence[Part]], position: int
    ) -> Commit:
        pool, rows = self._pool, [part.rows for [part] in parts]
        restore = pool.pins.prepare_restore(sequence, rows, position)

        def commit() -> None:
            restore()
            pool.maybe_expired.add(sequence)

        return commit

    def to_backend(self, backend: str | Backend) -> Self:
        target, clone = get_backend(backend), self._shallow_copy()
        clone._mask = None
        pool = self._cell_pool
        if pool is not None:
            config = self._config or target.config
            cells = round_up(pool.table.cells, config.padding)
            table = pool.table.copy(cells)
            pool.pins.unpin_in_copy(table)  # snapshots keep cells of this cache, not of its copy
            buffers = pool.buffers.to_backend(target, kv_layouts(config), cells)
            clone._cell_pool = clone._pool_of(table, buffers, config, pool.retained, clone.lock)
            clone._cell_pool.maybe_expired = set(pool.maybe_expired)
        return clone

    def close(self) -> None:
        with self.lock:
            if self._cell_pool is not None:
                self._cell_pool.pins.spill()  # snapshots outlive the cache
                self._cell_pool.buffers.free()
            self._cell_pool = None
