"""Passes that are not finished: their tokens are in the table, but not history yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvcache._types import Indices, Int32s

from .cells import CellTable
from .changes import Dropped
from .latest import NOTHING, PARTIAL, LatestPass, Progress
from .placement import Moved
from .plan import Pass

_NONE = np.empty(0, np.int32)


class OpenPasses:
    """The current pass of a pool, and the passes planned for programs that have not come back.

    A pass finds cells for its tokens and evicts others when it begins; its tokens become history
    when it is complete. Until then, whoever looks at a sequence sees it without them
    (:meth:`history`), and they can be taken back (:meth:`take_back`). A sequence that changes in
    the middle of a pass leaves it (:meth:`detach`): the pass goes on for the others.

    unfinished: tells whether the current pass is not complete, here or in another cache with the
        same passes.
    """

    def __init__(self, table: CellTable, unfinished: Callable[[], bool]) -> None:
        self._table, self._unfinished = table, unfinished
        self.current: Pass | None = None
        self.planned: list[Pass] = []
        """Passes planned since the state of the programs came back, oldest first."""
        self.held: list[Int32s] = []
        """Cells that a pass may still write to, though their sequences gave them up."""
        self._changed: set[int] = set()  # sequences changed since the oldest of the passes began
        self._reused = False  # True if evicted cells may have been given to a restored sequence

    def __reduce__(self) -> tuple[type[OpenPasses], tuple[object, ...]]:
        """Pickle without passes: only copies are pickled, and these have none."""
        return OpenPasses, (self._table, bool)

    @property
    def progress(self) -> Progress:
        """How far the passes of this pool have come."""
        if self.planned:
            return PARTIAL
        return NOTHING if self.current is None else self.current.progress

    @property
    def all(self) -> list[Pass]:
        """The planned passes and the current one, which may be one of them, oldest first."""
        current = self.current
        if current is None or (self.planned and self.planned[-1] is current):
            return self.planned
        return [*self.planned, current]

    # Beginning and finishing.

    def begin(self, forward_pass: Pass) -> None:
        """Make `forward_pass` the current pass."""
        if (self._changed or self._reused) and not self.planned:
            self._changed, self._reused = set(), False
        self.current = forward_pass

    def begun_after(self, before: Pass | None) -> list[Pass]:
        """Return the current pass alone; nothing if it is still `before`."""
        current = self.current
        return [] if current is None or current is before else [current]

    def plan(self, forward_pass: Pass) -> None:
        """Count a pass as planned: a program will write its tokens, and `put` has no part in it."""
        # A pool without layers has nothing to wait for.
        if forward_pass.expected and forward_pass not in self.planned:
            self.planned.append(forward_pass)

    def unplan(self, passes: Sequence[Pass]) -> None:
        """Count `passes` as not planned: no program has got their plans."""
        self.planned = [p for p in self.planned if p not in passes]

    def confirm(self) -> None:
        """Finish the planned passes: the state that came back holds their tokens."""
        for forward_pass in self.planned:
            forward_pass.put_layers.update(forward_pass.expected)
        self.planned = []

    def release(self) -> None:
        """Free the cells held for sequences that changed during passes, which are over."""
        while self.held:
            self._table.decref(self.held.pop())

    @property
    def references(self) -> Int32s:
        """Number of references to each cell that are held here, int32 [cells]."""
        counts = np.zeros(self._table.cells, np.int32)
        for cells in self.held:
            counts[cells] += 1
        return counts

    def settle(self) -> None:
        """Note that the current pass, a complete one, went through the whole model."""
        if self.current is not None:
            self.current.expected |= self.current.put_layers

    # Looking.

    def history(self, sequence: int) -> Int32s:
        """Return the cells of a sequence, ordered by position, without unfinished tokens."""
        cells = self._table.cells_of(sequence)
        unfinished = self.all if self._unfinished() else []
        for forward_pass in unfinished:
            if sequence in forward_pass.sequences and sequence not in forward_pass.detached:
                cells = cells[~np.isin(cells, forward_pass.cells)]
        return cells

    def find(self, sequence: int, position: int) -> int:
        """Return the number of cells in the history of a sequence below `position`."""
        cells = self.history(sequence)
        return int(np.searchsorted(self._table.positions[cells], position))

    def next_position(self, sequence: int) -> int:
        """Return the position after the last one in the history of a sequence; 0 without any."""
        cells = self.history(sequence)
        return int(self._table.positions[cells[-1]]) + 1 if cells.size else 0

    def leave_out(self, table: CellTable) -> None:
        """Take everything that is not history out of `table`, a copy for another cache."""
        for cells in self.held:
            table.decref(cells)
        for sequence in {s for p in self.all for s in p.sequences.tolist() if p.stores}:
            table.set_row(sequence, self.history(sequence))

    def latest(self, sequence: int) -> LatestPass:
        """Return what the current pass brings to a sequence, and the layers put so far."""
        current = self.current
        if current is None:
            return LatestPass()
        takes_part = sequence in current.sequences and sequence not in current.detached
        start = int(current.positions[current.sequences == sequence].min()) if takes_part else None
        put, expected = frozenset(current.put_layers), current.expected
        return LatestPass(start, put | expected, not put <= expected)

    # Changes in the middle of a pass.

    def detach(self, sequence: int) -> None:
        """Take a sequence about to change out of all passes; its unfinished tokens are dropped.

        Its cells stay as they are until the pass is over, which may still write to some of them.
        """
        self._changed.add(sequence)
        passes = [
            forward_pass
            for forward_pass in self.all
            if sequence in forward_pass.sequences and sequence not in forward_pass.detached
        ]
        if not passes:
            return
        row, history = self._table.cells_of(sequence).copy(), self.history(sequence).copy()
        if self._unfinished():
            self.held.append(row)
            self._table.incref(row)
        elif not any(p.expected or p.put_layers for p in passes):
            row = _NONE  # without any layer a complete pass takes no put after this, and no get
        as_read = row, self._table.positions[row] if row.size else row
        for forward_pass in passes:
            forward_pass.detached[sequence] = as_read
        self._table.set_row(sequence, history)

    def restored(self, sequence: int) -> None:
        """Note that a sequence was filled, with cells that passes may have evicted."""
        self._changed.add(sequence)
        self._reused = True

    # Taking back.

    def take_back_all(self) -> dict[int, int]:
        """Take back every pass, complete or not; return as :meth:`take_back`."""
        taken = self.take_back(self.all)
        self.release()
        return taken

    def take_back(self, passes: Sequence[Pass]) -> dict[int, int]:
        """Take the tokens of `passes`, the newest ones, out of the table.

        Cells that these passes evicted go back to their sequences, as far as nothing was written
        to them since. Return the sequences that lost tokens, each with the first position lost.
        """
        written = [p.cells for p in passes if p.put_layers or p in self.planned]
        copied = [p.moved.rows.cells for p in passes if p.moved is not None]
        overwritten = np.concatenate([_NONE, *written, *copied])
        taken: dict[int, int] = {}
        for forward_pass in reversed(passes):
            if forward_pass.stores:
                taken |= self._remove_tokens(forward_pass)
            if forward_pass.moved is not None and not self._reused:
                self._move_back(forward_pass, forward_pass.moved, overwritten)
            if forward_pass.dropped is not None and not self._reused:
                self._give_back(forward_pass.dropped.as_arrays(), overwritten)
        self.planned = [p for p in self.planned if p not in passes]
        self.current = None
        return taken

    def _remove_tokens(self, forward_pass: Pass) -> dict[int, int]:
        taken: dict[int, int] = {}
        for sequence in set(forward_pass.sequences.tolist()).difference(forward_pass.detached):
            taken[sequence] = int(forward_pass.positions[forward_pass.sequences == sequence].min())
            cells = self._table.cells_of(sequence)
            self._table.set_row(sequence, cells[~np.isin(cells, forward_pass.cells)])
        return taken

    def _move_back(self, forward_pass: Pass, moved: Moved, overwritten: Indices | Int32s) -> None:
        """Move tokens back to the cells that they had before a pass, where these are intact."""
        ids = moved.tails.ids.tolist()
        owners = np.repeat(moved.tails.ids, moved.tails.counts)
        lost = {*owners[np.isin(moved.tails.cells, overwritten)].tolist(), *self._changed}
        back = [s for s in ids if s not in lost and self._table.move_back(s, moved)]
        if back == ids:
            forward_pass.moved = None

    def _give_back(self, dropped: Dropped, overwritten: Indices | Int32s) -> None:
        """Give evicted cells back to their sequences, the newest ones that are all intact."""
        sequences, cells, positions = dropped
        for sequence in set(sequences.tolist()).difference(self._changed):
            own = np.flatnonzero(sequences == sequence)
            lost = np.flatnonzero(np.isin(cells[own], overwritten))
            intact = own[lost[-1] + 1 :] if lost.size else own
            self._table.positions[cells[intact]] = positions[intact]
            held = self._table.cells_of(sequence)
            row = np.concatenate([self._table.joined(cells[intact], held), held])
            self._table.set_row(sequence, row.astype(np.int32))

    def conflicting(self, positions: Int32s, sequences: Int32s) -> list[Pass]:
        """Return the planned passes that a new plan of these tokens replaces.

        A token planned again means that the program of its pass has failed; programs of later
        passes had no state to go on from.
        """
        for number, forward_pass in enumerate(self.planned):
            tokens = zip(
                forward_pass.sequences.tolist(), forward_pass.positions.tolist(), strict=True
            )
            for sequence, position in tokens:
                if (positions[sequences == sequence] <= position).any():
                    return self.planned[number:]
        return []
