"""The passes over one pool: cells for their tokens, and cells dropped by windows."""

from __future__ import annotations

import numpy as np

from kvcache._locks import Lock
from kvcache._types import Int32s
from kvcache.backends import CacheConfig
from kvcache.errors import CacheFullError, KVCacheError
from kvcache.snapshots.visibility import Visibility

from .base import Commit
from .batch import Batch
from .buffers import PoolBuffers
from .cells import CellTable, Eviction
from .pinning import PoolPins
from .plan import Pass
from .single import SingleTokenStep, commit_single, plan_single
from .sorted_batch import SortedBatch


class CellPool:
    """The cells of an initialised cache, their buffers, and the current pass.

    attended: rule for the tokens that a token sees.
    resumed: rule for the tokens to hold when resuming at a position.
    retained: tokens kept per sequence, the newest included; None for all.
    config: padding of ranges, dtype of masks.
    lock: held while rows are pinned or unpinned.
    """

    def __init__(
        self,
        table: CellTable,
        buffers: PoolBuffers,
        *,
        attended: Visibility,
        resumed: Visibility,
        retained: int | None,
        config: CacheConfig,
        lock: Lock,
    ) -> None:
        self.table = table
        self.buffers = buffers
        self.pins = PoolPins(table, buffers, resumed, lock)
        self.retained = retained
        self.current: Pass | None = None
        # Sequences with new tokens since they were last cut down to the tokens retained.
        self.maybe_expired: set[int] = set()
        self.attended, self.resumed = attended, resumed
        self.config = config

    def current_pass(self) -> Pass:
        """Return the current pass. Raises: KVCacheError if there is none."""
        if self.current is None:
            raise KVCacheError("put and get belong to a pass. Call start_forward first.")
        return self.current

    def end_pass_of(self, sequence: int) -> None:
        """End the current pass if it has tokens of `sequence`, whose cells may be reused now."""
        if self.current is not None and sequence in self.current.sequences:
            self.current = None

    # Beginning a pass.

    def prepare(self, batch: Batch, reserve: bool) -> Commit:
        """Check a pass and return its commit. Spills snapshots if it needs their cells.

        Raises: CacheFullError, ValueError.
        """
        positions, sequences = batch.positions, batch.sequences
        if reserve:
            return lambda: self._reserve(positions, sequences)
        if self.pins.scheduled:
            self.pins.retain_due()  # now, before this pass drops cells
        if len(batch) == 1 and (step := self._plan_single(int(sequences[0]), int(positions[0]))):
            return lambda: self._commit_single(step, positions, sequences)
        groups = self.table.group(positions, sequences)
        eviction = None if self.retained is None else self._expired(groups, self.retained)
        self._make_room(len(batch), eviction)
        return lambda: self._commit_batch(positions, sequences, groups, eviction)

    def _make_room(self, tokens: int, eviction: Eviction | None) -> None:
        """Spill snapshots until there is room after `eviction`, or raise CacheFullError."""
        while True:
            try:
                return self.table.check_room(tokens, eviction)
            except CacheFullError:
                if not self.pins.spill_one(eviction):
                    raise

    def _reserve(self, positions: Int32s, sequences: Int32s) -> None:
        """Begin the largest possible pass: it reads the whole pool, and stores nothing."""
        cells = np.arange(positions.size, dtype=np.int32)
        self._begin(cells, 0, self.table.cells, positions, sequences, stores=False)

    def _plan_single(self, sequence: int, position: int) -> SingleTokenStep | None:
        """Return the plan of the fast path; None where it does not apply."""
        if self.retained is None:
            return plan_single(self.table, sequence, position, 0)
        if self.maybe_expired != {sequence}:  # other sequences may have cells to drop, too
            return None
        return plan_single(self.table, sequence, position, position - (self.retained - 1))

    def _commit_single(self, step: SingleTokenStep, positions: Int32s, sequences: Int32s) -> None:
        commit_single(self.table, step)
        cells = np.array([step.cell], np.int32)
        self._begin(cells, *self._range(step.low, step.high + 1), positions, sequences)

    def _expired(self, groups: SortedBatch, retained: int) -> Eviction:
        """Return the cells too far back to be retained.

        Of the sequences in the batch, and of sequences idle since their last pass: its first
        tokens still saw cells that no later token sees.
        """
        ids, nexts = groups.ids, groups.positions[groups.starts].astype(np.int64)
        idle = self.maybe_expired.difference(ids.tolist())
        if idle:
            ids = np.append(ids, np.array([*idle], np.int32))
            nexts = np.append(nexts, [self.table.next_position(sequence) for sequence in idle])
        return self.table.expired(ids, nexts - (retained - 1))

    def _commit_batch(
        self,
        positions: Int32s,
        sequences: Int32s,
        groups: SortedBatch,
        eviction: Eviction | None,
    ) -> None:
        """Evict first, so that tokens may reuse the cells; then insert and begin the pass."""
        table = self.table
        if eviction is not None:
            table.evict(eviction)
            self.maybe_expired = set(groups.ids.tolist())
        cells = table.insert(groups)
        self._begin(cells, *self._range(*table.span(groups.ids)), positions, sequences)

    def _range(self, start: int, stop: int) -> tuple[int, int]:
        return self.buffers.range(start, stop, self.config.padding)

    def _begin(
        self,
        cells: Int32s,
        start: int,
        stop: int,
        positions: Int32s,
        sequences: Int32s,
        stores: bool = True,
    ) -> None:
        """Make a pass with these cells, reading ``[start, stop)``, the current one."""
        self.current = Pass(
            self.table, cells, start, stop, positions, sequences, self.attended, stores
        )

    def range_of(self, passes: list[Pass]) -> tuple[int, int]:
        """Return a range to read around the ranges of all `passes`."""
        return self._range(min(p.start for p in passes), max(p.stop for p in passes))
