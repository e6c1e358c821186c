"""The passes over one pool: cells for their tokens, and cells dropped by windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from kvcache._checks import NO_LIMIT
from kvcache._interrupts import uninterrupted
from kvcache._locks import Lock
from kvcache._types import Indices, Int32s
from kvcache.backends import CacheConfig
from kvcache.errors import CacheFullError, ExportedError, KVCacheError
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.lengths import ceil_div, padded_range, round_up

from .batch import Batch
from .buffers import PoolBuffers
from .cells import CellTable
from .changes import Dropped, DroppedCell, Eviction, RowEnds
from .owned import Commit, OwnedCache
from .pinning import PoolPins
from .placement import Moved, TailCopy
from .plan import Pass
from .rows import PendingRows
from .single import SingleTokenStep, commit_single, plan_single
from .sorted_batch import SortedBatch
from .unfinished import OpenPasses

_Before: TypeAlias = tuple[
    RowEnds | SingleTokenStep,
    Dropped | DroppedCell | None,
    Pass | None,
    frozenset[int],
    Moved | None,
]
"""State of a pool before a pass: the ends of all rows (or the step that tells those of the only
row it changes), the cells that are evicted, the current pass, the sequences maybe expired, the
tokens moved to other cells."""


class CellPool:
    """The cells of an initialised cache, their buffers, and the current pass.

    attended: rule for the tokens that a token sees.
    resumed: rule for the tokens to hold when resuming at a position.
    retained: tokens kept per sequence, the newest included; None for all.
    config: padding of ranges, dtype of masks.
    lock: held while rows are pinned or unpinned.
    unfinished: tells whether the current pass is not complete; see :class:`OpenPasses`.
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
        unfinished: Callable[[], bool],
    ) -> None:
        self.table = table
        self.buffers = buffers
        self.passes = OpenPasses(table, unfinished)
        self.pins = PoolPins(table, buffers, resumed, lock, self.passes.history)
        self.retained = retained
        # Sequences with new tokens since they were last cut down to the tokens retained.
        self.maybe_expired: frozenset[int] = frozenset()
        self._last_ids = b"", self.maybe_expired  # sequences of the last pass, in two forms
        self.attended, self.resumed = attended, resumed
        self.config = config
        self._layers: frozenset[int] = frozenset()
        self._before: _Before | None = None  # the state before the commit under way

    def current_pass(self) -> Pass:
        """Return the current pass. Raises: KVCacheError if there is none."""
        if self.passes.current is None:
            raise KVCacheError("put and get belong to a pass. Call start_forward first.")
        return self.passes.current

    # Beginning a pass.

    def prepare(self, batch: Batch, reserve: bool, cache: OwnedCache) -> Commit:
        """Check a pass and return its commit. Spills snapshots if it needs their cells.

        The pass before is over: what it held is freed. cache: of this pool, whose owners learn of
        tokens inserted before others.

        Raises: CacheFullError, ValueError.
        """
        self._before = None
        if self.passes.held:
            self.passes.release()
        positions, sequences = batch.positions, batch.sequences
        if reserve:
            return lambda: self._reserve(positions, sequences)
        if self.pins.scheduled:
            self.pins.retain_due()  # now, before this pass drops cells
        if len(batch) == 1 and (step := self._plan_single(int(sequences[0]), int(positions[0]))):
            return lambda: self._commit_single(step, positions, sequences)
        groups = self.table.group(positions, sequences)
        eviction = None if self.retained is None else self._expired(groups, self.retained)
        self._make_room(groups, eviction)
        moved = self._prepare_move(groups, eviction)
        return lambda: self._commit_batch(positions, sequences, groups, eviction, moved, cache)

    def _make_room(self, groups: SortedBatch, eviction: Eviction | None) -> None:
        """Spill snapshots until there is room after `eviction`, or raise CacheFullError."""
        while True:
            try:
                return self.table.check_room_for(groups, eviction)
            except CacheFullError:
                if not self.pins.spill_one(eviction):
                    raise

    def _prepare_move(self, groups: SortedBatch, eviction: Eviction | None) -> Moved | None:
        """Return the tokens that a pass moves to other cells, and the copied rows; None usually.

        Raises: ExportedError while programs have the buffers, whose content is not known here.
        """
        tails = self.table.tails_to_copy(groups, eviction)
        if tails is None:
            return None
        if self.passes.planned:
            raise ExportedError(
                f"sequences {tails.ids.tolist()} share their last page, which is copied before "
                "they go on, and programs have the buffers. Assign program_state, and plan again."
            )
        targets = np.zeros(tails.cells.size, np.int64)
        return Moved(tails, self.buffers.prepare_copy(tails.cells, targets))

    def revert(self) -> None:
        """Undo the commit of a pass that was interrupted, at whatever point."""
        if self._before is None:  # it had not begun
            return
        ends, dropped, current, maybe_expired, moved = self._before
        if isinstance(ends, SingleTokenStep):
            table, step = self.table, ends
            table.first[step.sequence], table.last[step.sequence] = step.first, step.last
            ends = RowEnds(table.rows, table.first, table.last)
        table = self.table
        table.rows, table.first, table.last = ends
        if moved is not None:
            moved.tails.put_back(table.rows)
            self.buffers.pending.discard(moved.rows)
        if dropped is not None:  # their positions may have been overwritten
            _, cells, positions = dropped.as_arrays()
            table.positions[cells] = positions
        references = self.pins.references + self.passes.references
        for sequence in range(table.max_sequences):
            references[table.cells_of(sequence)] += 1
            table.recompute_range(sequence)
        table.allocator.reset(references)
        self.passes.current, self.maybe_expired = current, maybe_expired

    def _row_ends(self, inserts: bool) -> RowEnds:
        """Return the ends of all rows before a pass, for :meth:`revert`.

        A pass changes the content of no row that it does not insert tokens into.
        """
        table = self.table
        rows = table.rows.copy() if inserts else table.rows
        return RowEnds(rows, table.first.copy(), table.last.copy())

    def take_back(self, passes: list[Pass] | None = None) -> None:
        """Take back the tokens of `passes`, the newest ones; None: of all, complete or not."""
        known = self.passes
        taking = list(known.all if passes is None else passes)
        moves = [forward_pass.moved for forward_pass in taking]
        for forward_pass in taking:
            self.maybe_expired |= forward_pass.maybe_expired
        taken = known.take_back_all() if passes is None else known.take_back(passes)
        for sequence, position in taken.items():
            self.pins.take_back(sequence, position)
        self.maybe_expired |= taken.keys()
        for forward_pass, moved in zip(taking, moves, strict=True):
            if moved is not None and forward_pass.moved is None:
                self.buffers.pending.discard(moved.rows)  # their cells are free again

    def drop(self, passes: list[Pass], current: Pass | None, maybe_written: bool = False) -> None:
        """Take back `passes`, begun in vain; `current` is the current pass again.

        maybe_written: True if their plans were handed out, so that programs may have written to
        their cells.
        """
        with uninterrupted():
            if not maybe_written:
                self.passes.unplan(passes)
            self.take_back(passes)
            self.passes.current = current

    def _reserve(self, positions: Int32s, sequences: Int32s) -> None:
        """Begin the largest possible pass: it reads the whole pool, and stores nothing."""
        cells = np.arange(positions.size, dtype=np.int32)
        ends = self._row_ends(inserts=False)
        self._before = ends, None, self.passes.current, self.maybe_expired, None
        self._begin(cells, 0, self.table.cells, positions, sequences, stores=False)

    def _plan_single(self, sequence: int, position: int) -> SingleTokenStep | None:
        """Return the plan of the fast path; None where it does not apply."""
        if self.retained is None:
            return plan_single(self.table, sequence, position, 0)
        if self.maybe_expired != {sequence}:  # other sequences may have cells to drop, too
            return None
        return plan_single(self.table, sequence, position, position - (self.retained - 1))

    def _commit_single(self, step: SingleTokenStep, positions: Int32s, sequences: Int32s) -> None:
        dropped = None
        if step.dropped is not None:
            position = int(self.table.positions[step.dropped])
            dropped = DroppedCell(step.sequence, step.dropped, position)
        self._before = step, dropped, self.passes.current, self.maybe_expired, None
        commit_single(self.table, step)
        cells = np.array([step.cell], np.int32)
        start, stop = self._range(step.low, step.high + 1)
        self._begin(cells, start, stop, positions, sequences, dropped)

    def _expired(self, groups: SortedBatch, retained: int) -> Eviction:
        """Return the cells too far back to be retained.

        Of the sequences in the batch, and of sequences idle since their last pass: its first
        tokens still saw cells that no later token sees.
        """
        ids, nexts = groups.ids, groups.positions[groups.starts].astype(np.int64)
        present = self._as_set(ids)
        # The same object if the last pass had the same sequences, as most passes do.
        idle = () if present is self.maybe_expired else self.maybe_expired - present
        if idle:
            ids = np.append(ids, np.array([*idle], np.int32))
            nexts = np.append(nexts, [self.table.next_position(sequence) for sequence in idle])
        return self.table.expired(ids, nexts - (retained - 1))

    def _as_set(self, ids: Indices) -> frozenset[int]:
        """Return `ids` as a set: the same object as last time for the same ids."""
        key = ids.tobytes()
        if key != self._last_ids[0]:
            self._last_ids = key, frozenset(ids.tolist())
        return self._last_ids[1]

    def _commit_batch(
        self,
        positions: Int32s,
        sequences: Int32s,
        groups: SortedBatch,
        eviction: Eviction | None,
        moved: Moved | None,
        cache: OwnedCache,
    ) -> None:
        """Evict first, so that tokens may reuse the cells; then insert and begin the pass."""
        table = self.table
        if groups.inserts:
            cache.owners.inserted(cache, positions, sequences)
        dropped = None if eviction is None else table.to_drop(eviction)
        ends = self._row_ends(groups.inserts)
        self._before = ends, dropped, self.passes.current, self.maybe_expired, moved
        if eviction is not None:
            table.evict(eviction, dropped)
            self.maybe_expired = self._as_set(groups.ids)
        if moved is not None:
            self._move(*moved)
        cells = table.insert(groups)
        start, stop = self._range(*table.span(groups.ids))
        self._begin(cells, start, stop, positions, sequences, dropped)
        if moved is not None:
            self.passes.all[-1].moved = moved

    def _move(self, tails: TailCopy, rows: PendingRows) -> None:
        """Move tokens to other cells, to which their copied rows are queued to be written."""
        rows.cells[:] = self.table.move_tails(tails)
        self.buffers.pending.enqueue(rows)

    def _range(self, start: int, stop: int) -> tuple[int, int]:
        buffers = self.buffers
        return padded_range(buffers.backend, start, stop, self.config.padding, buffers.cells)

    def _begin(
        self,
        cells: Int32s,
        start: int,
        stop: int,
        positions: Int32s,
        sequences: Int32s,
        dropped: Dropped | DroppedCell | None = None,
        stores: bool = True,
    ) -> None:
        """Make a pass with these cells, reading ``[start, stop)``, the current one."""
        layers = self.buffers.layers
        if len(layers) != len(self._layers):  # layers come, and go only if their first put fails
            self._layers = frozenset(layers)
        self.passes.begin(
            Pass(
                self.table,
                cells,
                start,
                stop,
                positions,
                sequences,
                self.attended,
                self._layers,
                dropped,
                self._before[3] if self._before else frozenset(),
                stores,
            )
        )

    def range_of(self, passes: list[Pass]) -> tuple[int, int]:
        """Return a range to read around the ranges of all `passes`."""
        return self._range(min(p.start for p in passes), max(p.stop for p in passes))


def tokens_retained(
    window: int | None, memory: int | None, max_sequences: int, capacity: int
) -> int | None:
    """Return the number of tokens kept per sequence, the newest included; None for all.

    Raises: ValueError for a memory smaller than the window.
    """
    if memory is not None and memory < (NO_LIMIT if window is None else window):
        raise ValueError(f"memory must be at least the window; got {memory} for {window}.")
    if window is None:
        return None
    retained = memory or window
    if max_sequences > 1:
        # One more, to resume a sequence before its stop token, which later prompts leave out.
        retained = max(retained, window + 1)
    # A window beyond the capacity never drops anything.
    return None if retained > capacity else retained


def cells_of(
    max_sequences: int, capacity: int, max_batch: int, retained: int | None, page: int, padding: int
) -> int:
    """Return the size of a pool in cells, a multiple of `page` and of `padding`.

    Room for `capacity` tokens of every sequence; where only so many are `retained`, for these and a
    pass of `max_batch`. Every sequence may need a part of a page more at its end, and with a window
    at its beginning, too.

    Raises: ValueError for more than positions can count, or for a page above the capacity.
    """
    if page > capacity:
        raise ValueError(
            f"a page holds at most the tokens of one sequence; got page={page} for a capacity of "
            f"{capacity}. Give a smaller page, or more capacity."
        )
    if retained is None:
        pages = max_sequences * ceil_div(capacity, page)
    else:
        # So many tokens, which begin anywhere in a page; none where a sequence keeps one in all.
        kept = 0 if retained == 1 else ceil_div(retained - 2, page) + 1
        # The tokens of a pass begin another page in each sequence at worst.
        new = min(max_batch, (max_batch + max_sequences * (page - 1)) // page)
        pages = max_sequences * kept + new
    cells = round_up(pages * page, math.lcm(page, padding))
    if cells > NO_LIMIT:
        raise ValueError(f"a pool has at most 2**31 - 1 tokens, of all sequences; got {cells}.")
    return cells
