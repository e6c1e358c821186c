"""Batches of all layers of a model together: rows selected, split and joined in all, or in none."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvcache import (
    LayerCaches,
    NotSupportedError,
    TrimError,
)

from .rows import affordable, check_held, content
from .stacks import check_state, record_all, stack_of, update_all
from .state_oracle import StateOracle


class StackMachine(RuleBasedStateMachine):
    """Four layers of several rows.

    numbers: of each row, one in each column up to the offset; 0 for padding that came by joining.
    """

    backend = None

    @initialize(padding=st.lists(st.integers(0, 5), min_size=1, max_size=3))
    def make(self, padding):
        self.next, self.snapshots, self.joined = 1, [], False
        self.caches, self.states = stack_of(self.backend), StateOracle()
        self.caches.pad(padding)
        self.padding, self.numbers = padding, [[] for _ in padding]

    def choose(self, data):
        rows = st.lists(st.integers(0, len(self.padding) - 1), min_size=1, max_size=4)
        return data.draw(rows)

    def choose_rows(self, rows):
        self.padding = [self.padding[row] for row in rows]
        self.numbers = [[*self.numbers[row]] for row in rows]

    @rule(
        tokens=st.integers(1, 9), recording=st.booleans(), selecting=st.booleans(), data=st.data()
    )
    def update(self, tokens, recording, selecting, data):
        """What was recorded for the coming update is selected with the rest."""
        numbers = self.next + np.arange(len(self.padding) * tokens).reshape(-1, tokens)
        self.next += numbers.size
        if recording:
            cuts = self.states.cuts(tokens)
            assert self.caches[2].cuts(tokens) == cuts
            record_all(self.caches[2], numbers)
            self.states.announce(tokens)
            self.states.recorded = dict.fromkeys(cuts, 0)
            if selecting and self.caches[2].rows:
                rows = self.choose(data)
                self.caches.select(rows)
                self.choose_rows(rows)
                numbers = numbers[rows]
        update_all(self.caches, numbers)
        self.states.advance(tokens, 0)
        for row, own in zip(self.numbers, numbers.tolist(), strict=True):
            row.extend(own)

    @rule(data=st.data())
    def select(self, data):
        rows, offset = self.choose(data), self.caches.offset
        known = self.caches[0].rows is not None  # by tokens or padding
        self.caches.select(rows)
        if known:
            self.choose_rows(rows)
        assert self.caches.offset == offset

    @rule(data=st.data())
    def split_and_join(self, data):
        if not self.caches.offset:
            return
        singles = self.caches.split()
        own = [row[padding:] for row, padding in zip(self.numbers, self.padding, strict=True)]
        states = [moved(self.states, -padding) for padding in self.padding]
        for single, row, held in zip(singles, own, states, strict=True):
            assert single[1] is single[3], "a shared cache stays shared"
            self.check(single, [row], [0], held)
        if not all(own):
            return
        order = self.choose(data)
        stop = max(len(own[row]) for row in order)
        short = [stop - len(own[row]) for row in order]
        self.caches = LayerCaches.concat([singles[row] for row in order])
        assert self.caches[1] is self.caches[3]
        self.padding, self.joined = short, True
        pairs = zip(short, order, strict=True)
        self.numbers = [[0] * missing + own[row] for missing, row in pairs]
        pairs = zip(short, order, strict=True)
        self.states = common([moved(states[row], missing) for missing, row in pairs])

    @rule(tokens=st.integers(0, 6))
    def trim(self, tokens):
        if self.caches.can_trim(tokens):
            self.caches.trim(tokens)
            self.go(self.caches.offset)
        else:
            with pytest.raises(TrimError):
                self.caches.trim(tokens)

    def go(self, position):
        assert self.states.can_go(position)
        self.states.go(position)
        for row in self.numbers:
            del row[position:]

    @rule(ahead=st.lists(st.integers(0, 9), max_size=3))
    def schedule(self, ahead):
        points = [self.caches.offset + number for number in ahead]
        self.caches.schedule(points)
        self.states.schedule(points)

    @rule()
    def checkpoint(self):
        self.caches.checkpoint()
        self.states.checkpoint()

    @rule(accepted=st.integers(0, 4))
    def rollback(self, accepted):
        mark = self.states.mark
        if mark is not None and accepted <= self.states.offset - mark:
            if self.states.can_go(mark + accepted):
                self.caches.rollback(accepted)
                self.go(mark + accepted)
            else:
                with pytest.raises(TrimError):
                    self.caches.rollback(accepted)

    @rule()
    def snapshot(self):
        snapshot = self.taken()
        if snapshot:
            self.snapshots = [*self.snapshots, (snapshot, content(snapshot))][-2:]

    def taken(self):
        """A snapshot; None without tokens, or of joined rows that lack some of each other's."""
        try:
            return self.caches.snapshot() if self.caches.offset else None
        except NotSupportedError as error:
            if not self.joined or "joined after some had dropped tokens" not in str(error):
                raise
            return None

    @rule()
    def restore(self):
        snapshot = self.taken()
        if not snapshot:
            return
        with snapshot:
            caches = stack_of(self.backend)
            caches.pad(self.padding)
            caches.restore(snapshot)
        self.caches, offset = caches, self.caches.offset
        self.states = StateOracle(offset, {offset: 0})

    @rule()
    def copy(self):
        self.caches, self.states = self.caches.copy(), self.states.copied()

    @invariant()
    def everything_is_right(self):
        if hasattr(self, "caches"):
            self.check(self.caches, self.numbers, self.padding, self.states)
            for snapshot, before in self.snapshots:
                assert content(snapshot) == before, "a snapshot changed"

    def check(self, caches, numbers, padding, states):
        grown, ring, state, _ = caches
        assert caches.offset == states.offset
        for cache in (grown, ring, state):
            told = [0] * len(padding) if cache.padding is None else cache.padding.tolist()
            assert told == padding
        for cache in (grown, ring):
            check_held(cache, [row[gap:] for row, gap in zip(numbers, padding, strict=True)])
        assert state.kept == tuple(sorted(states.held))
        if state.offset:
            self.check_states(state, numbers)

    def check_states(self, state, numbers):
        """The present state, and that of every resume point, to which a copy goes back."""
        twin = state.copy()
        for position in reversed(twin.kept):
            twin.trim(twin.offset - position)
            check_state(twin, [row[position - 1] for row in numbers])


def moved(states, by):
    """The oracle of a copy whose positions are moved."""
    copy = states.copied()
    held = {p + by: stamp for p, stamp in copy.held.items() if p + by > 0}
    offset = max(0, copy.offset + by)
    return StateOracle(offset, held, {p for p in held if p < offset})


def common(several):
    """The oracle of joined rows: positions behind which all have a state."""
    positions = set.intersection(*(set(states.held) for states in several))
    offset = several[0].offset
    return StateOracle(offset, dict.fromkeys(positions, 0), {p for p in positions if p < offset})


@pytest.mark.slow
def test_any_sequence_of_calls(backend):
    class Machine(StackMachine):
        pass

    Machine.backend = backend
    run_state_machine_as_test(Machine, settings=affordable(backend))
