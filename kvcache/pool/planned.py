"""What compiled programs need of a cache over a pool of cells."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

import numpy as np

from kvcache._checks import check_ids, check_sizes
from kvcache.errors import CacheFullError, KVCacheError, NotSupportedError

from .base import Cache
from .batch import Batch
from .buffers import PoolBuffers
from .cells import CellTable
from .pinning import PoolPins
from .plan import ForwardPlan, Pass, PoolState


class PlannedCache(Cache):
    """A cache over a table of cells and their buffers, whose passes can be had as plans.

    The host plans a pass, :mod:`kvcache.functional` applies it in a program that was compiled
    once::

        cache.allocate(range(layers), kv_heads, head_dim)
        state = cache.program_state
        for batch in batches:
            logits, state = step(weights, state, cache.plan(batch), ids)
        cache.program_state = state
    """

    _state: tuple[CellTable, PoolBuffers] | None
    _pins: PoolPins
    _pass: Pass | None
    _maybe_expired: set[int]

    @property
    def _table(self) -> CellTable:
        return self._initialised()[0]

    @property
    def _buffers(self) -> PoolBuffers:
        return self._initialised()[1]

    def _initialised(self) -> tuple[CellTable, PoolBuffers]:
        if self._state is None:
            raise KVCacheError("a cache is sized before it is used. Call init first.")
        return self._state

    @property
    def cells(self) -> int:
        """Size of the pool: tokens that all sequences together can hold."""
        return self._table.size

    def _current(self) -> Pass:
        if self._pass is None:
            raise KVCacheError("put and get belong to a pass. Call start_forward first.")
        return self._pass

    def allocate(
        self, layers: Iterable[int], kv_heads: int, head_dim: int, value_dim: int | None = None
    ) -> None:
        """Make the buffers of some layers now, as their first put would.

        value_dim: head_dim of the values, if it differs from that of the keys; 0: keys only.
        """
        width = head_dim if value_dim is None else value_dim
        check_sizes(kv_heads=kv_heads, head_dim=head_dim)
        if width < 0:
            raise ValueError(f"value_dim must be >= 0, 0 for keys only; got {width}.")
        for layer in layers:
            self._buffers.allocate(layer, kv_heads, head_dim, width)

    @property
    def program_state(self) -> PoolState:
        """The buffers of all layers, for :mod:`kvcache.functional`, by layer.

        A program that they are donated to consumes them: assign what it returns.
        """
        return self._buffers.export_state()

    @program_state.setter
    def program_state(self, state: PoolState) -> None:
        self._buffers.import_state(state)

    def plan(self, batch: Batch | None = None, tokens: int | None = None) -> ForwardPlan:
        """The pass of `batch`, begun as :meth:`start_forward` does, as arrays for a program.

        batch: None for the pass that was begun last (by a wrapper, or before set_causal).
        tokens: repeat the last token up to so many, so that a program is compiled for few
            lengths. What the program is given has to repeat it, too.

        Raises: as start_forward; ValueError for more tokens than `tokens`.
        """
        count = len(self._current().cells if batch is None else batch)
        if tokens is not None and tokens < count:
            raise ValueError(f"a pass is padded to its length or more; got {tokens} for {count}.")
        if batch is not None:
            self.start_forward(batch)
        which = self._current()
        if not which.stores:
            raise NotSupportedError("a reserve pass has no plan: it stores nothing. Use allocate.")
        extra = (0, (tokens or count) - count)
        with self.lock:
            cells, visible = np.pad(which.cells, extra, "edge"), which.mask()
        return self._buffers.plan(cells, which.start, np.pad(visible, (extra, (0, 0)), "edge"))

    def plan_steps(self, batch: Batch, steps: int) -> ForwardPlan:
        """The passes of `steps` decode steps: `batch`, then its positions + 1, and so on.

        Every leaf of the plan has one more axis in front, for ``lax.scan`` or a loop.

        Raises: CacheFullError if one of them does not fit; ValueError if `batch` has two tokens
            of one sequence, or one that does not go on behind its last. Nothing has changed then.
        """
        check_sizes(steps=steps)
        with self.lock:
            self._check_steps(batch)
            if self._table.free >= steps * len(batch):
                return self._planned(batch, steps)
            return self._planned_or_undone(batch, steps)

    def _planned_or_undone(self, batch: Batch, steps: int) -> ForwardPlan:
        residents = self._pins
        residents.collect()
        # Nothing is kept on schedule on the way: it could have to leave before it is written.
        residents.paused, mark = True, residents.save_pins()
        before = vars(deepcopy(self._table)), self._maybe_expired, self._pass
        try:
            return self._planned(batch, steps)
        except CacheFullError:
            table, self._maybe_expired, self._pass = before
            vars(self._table).update(table)  # the pass refers to this one
            residents.restore_pins(mark)
            raise
        finally:
            residents.paused = False

    def _check_steps(self, batch: Batch) -> None:
        sequences = batch.sequences.tolist()
        check_ids(self._table.max_sequences, *sequences)
        if len(set(sequences)) < len(sequences):
            raise ValueError(f"a decode step has one token per sequence; got {sequences}.")
        for sequence, position in zip(sequences, batch.positions.tolist(), strict=True):
            if position < self._table.next_position(sequence):
                raise ValueError(
                    f"decode steps go on behind the last token; sequence {sequence} has "
                    f"{self._table.next_position(sequence)}, got position {position}."
                )

    def _planned(self, batch: Batch, steps: int) -> ForwardPlan:
        passes, seen = [], []
        for step in range(steps):
            self.start_forward(Batch(batch.positions + step, batch.sequences))
            passes.append(self._current())
            # Later steps change the table: what this one sees is written down now.
            seen.append([cells.copy() for cells in passes[-1].visible()])
        start, stop = self._buffers.range(
            min(each.start for each in passes), max(each.stop for each in passes)
        )
        visible = np.zeros((steps, len(batch), stop - start), np.bool_)
        for step, token in np.ndindex(visible.shape[:2]):
            visible[step, token, seen[step][token] - start] = True
        return self._buffers.plan(
            np.stack([each.cells for each in passes]), [start] * steps, visible
        )
