"""Any sequence of calls of a recurrent layer's cache, on every backend, against the oracle."""

from __future__ import annotations

import pickle
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvcache import Backend, KVCacheError, Snapshot, StateCache, TrimError

from .state_oracle import StateOracle, check_state, dtypes_of, state

WHICH, SHARE, TOKENS = st.integers(0, 2), st.integers(0, 8), st.integers(1, 6)


@dataclass
class Pair:
    """A cache and its oracle. snapshots: taken of it, with the states by position, and open."""

    cache: StateCache
    oracle: StateOracle
    snapshots: list[tuple[Snapshot, dict[int, int]]] = field(default_factory=list)

    def pinned(self):
        return [
            stamp
            for snapshot, states in self.snapshots
            if snapshot.resident
            for stamp in states.values()
        ]


class StateMachine(RuleBasedStateMachine):
    """The calls. A subclass says on which backend."""

    backend: Backend
    dtypes: tuple[str, str]

    def __init__(self):
        super().__init__()
        self.stamp = 0
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self):
        self.folder.cleanup()

    @initialize()
    def start(self):
        self.pairs = [Pair(StateCache(self.backend), StateOracle())]

    @invariant()
    def every_cache_agrees_with_its_oracle(self):
        for pair in getattr(self, "pairs", []):
            check_state(pair.cache, pair.oracle, self.dtypes, pair.pinned())

    def pair(self, which):
        return self.pairs[which % len(self.pairs)]

    def new(self):
        """A state that no other one equals, and its name."""
        self.stamp += 1
        return state(self.backend, self.stamp, self.dtypes), self.stamp

    def add(self, cache, oracle):
        self.pairs = [*self.pairs, Pair(cache, oracle)][-3:]

    # Updates.

    @rule(which=WHICH, tokens=TOKENS)
    def advance(self, which, tokens):
        pair = self.pair(which)
        arrays, stamp = self.new()
        pair.cache.advance(tokens, *arrays)
        pair.oracle.advance(tokens, stamp)

    @rule(which=WHICH, tokens=TOKENS, left_out=st.sets(st.integers(0, 6)), given_up=st.booleans())
    def advance_with_cuts(self, which, tokens, left_out, given_up):
        self.announce(which, tokens, left_out)
        if not given_up:
            self.advance(which, tokens)

    @rule(which=WHICH, tokens=TOKENS, left_out=st.sets(st.integers(0, 6)), by=st.integers(1, 3))
    def another_update_comes(self, which, tokens, left_out, by):
        """States of an update that was given up are not those of the next one."""
        self.announce(which, tokens, left_out)
        self.advance(which, tokens + by)

    def announce(self, which, tokens, left_out):
        pair = self.pair(which)
        cuts = pair.cache.cuts(tokens)
        assert cuts == pair.oracle.cuts(tokens)
        pair.oracle.announce(tokens)
        for number, position in enumerate(cuts):
            if number not in left_out:
                arrays, stamp = self.new()
                pair.cache.record(position, *arrays)
                pair.oracle.recorded[position] = stamp

    @rule(which=WHICH, ahead=st.lists(st.integers(-2, 9), max_size=3))
    def schedule(self, which, ahead):
        pair = self.pair(which)
        positions = [pair.oracle.offset + by for by in ahead]
        pair.cache.schedule(positions)
        pair.oracle.schedule(positions)

    # Going back.

    @rule(which=WHICH)
    def checkpoint(self, which):
        pair = self.pair(which)
        pair.cache.checkpoint()
        pair.oracle.checkpoint()

    @rule(which=WHICH, share=SHARE)
    def rollback(self, which, share):
        pair = self.pair(which)
        cache, oracle = pair.cache, pair.oracle
        if oracle.mark is None:
            with pytest.raises(TrimError, match="open checkpoint"):
                cache.rollback()
            return
        accepted = (oracle.offset - oracle.mark) * share // 8
        if oracle.can_go(oracle.mark + accepted):
            cache.rollback(accepted)
            oracle.go(oracle.mark + accepted)
        else:
            with pytest.raises(TrimError, match="was not recorded; accepted can be"):
                cache.rollback(accepted)

    @rule(which=WHICH, share=SHARE)
    def trim(self, which, share):
        pair = self.pair(which)
        tokens = pair.oracle.offset * share // 8
        if pair.oracle.can_go(pair.oracle.offset - tokens):
            pair.cache.trim(tokens)
            pair.oracle.go(pair.oracle.offset - tokens)
        else:
            with pytest.raises(TrimError, match="goes back only to positions with a state"):
                pair.cache.trim(tokens)

    @rule(which=WHICH)
    def reset(self, which):
        pair = self.pair(which)
        pair.cache.reset()
        pair.oracle = StateOracle()
        assert pair.cache.dtype is None

    # Copies, files, snapshots.

    @rule(which=WHICH, how=st.sampled_from(["copy", "file", "pickle", "numpy"]))
    def copy(self, which, how):
        pair = self.pair(which)
        cache = pair.cache
        if how == "copy":
            twin = cache.copy()
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(cache))
        elif how == "numpy":
            twin = cache.to_backend("numpy").to_backend(self.backend)
        else:
            path = Path(self.folder.name) / "cache"
            cache.save(path)
            StateCache.load(path).save(path)
            twin = StateCache.load(path, self.backend)
        self.add(twin, pair.oracle.copied())

    @rule(which=WHICH, share=SHARE, resident=st.booleans())
    def snapshot(self, which, share, resident):
        pair = self.pair(which)
        stop = pair.oracle.offset
        if stop:
            start = (stop - 1) * share // 8
            snapshot = pair.cache.snapshot(start, stop)
            states = pair.oracle.snapshot(start, stop)
            assert snapshot.parts[0].rows.positions.tolist() == [p - 1 for p in sorted(states)]
            if not resident:
                snapshot.to_host()
            pair.snapshots = [*pair.snapshots, (snapshot, states)]

    @rule(which=WHICH)
    def close(self, which):
        pair = self.pair(which)
        for snapshot, _ in pair.snapshots[:1]:
            snapshot.close()
        pair.snapshots = pair.snapshots[1:]

    @rule(which=WHICH, share=SHARE)
    def restore(self, which, share):
        """At the end of a snapshot, or of a piece of it: only where it has a state."""
        pair = self.pair(which)
        whole = [(s, states) for s, states in pair.snapshots if s.start == 0]
        if not whole:
            return
        snapshot, states = whole[-1]
        at = max(1, snapshot.stop * share // 8)
        piece, _ = snapshot.copy().split(at) if at < snapshot.stop else (snapshot.copy(), None)
        twin = StateCache(self.backend)
        if at in states:
            twin.restore(piece)
            self.add(twin, StateOracle(at, {at: states[at]}))
        else:
            with pytest.raises(KVCacheError, match="last place to go on"):
                twin.restore(piece)
        piece.close()


SHARES = {"numpy": 150, "torch": 60, "array_api": 30, "mlx": 50, "jax": 25}
"""Examples out of a hundred: what a backend's speed affords."""


@pytest.mark.slow
def test_any_sequence_of_states(backend):
    class Machine(StateMachine):
        pass

    Machine.backend, Machine.dtypes = backend, dtypes_of(backend)
    count = max(1, settings().max_examples * SHARES[backend.name] // 100)
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=count, stateful_step_count=30)
    )
