"""Any sequence of calls of a recurrent pool, on every backend, against the oracle."""

from __future__ import annotations

import copy
import pickle

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

from kvcache import Backend, Batch, KVCacheError, NotSupportedError, RecurrentCache, TrimError

from .state_oracle import LAYERS, PoolOracle, check_rows, check_states, states

SEQUENCES = 3
SEQUENCE, SHARE = st.integers(0, SEQUENCES - 1), st.integers(0, 8)
RUNS = st.dictionaries(SEQUENCE, st.integers(1, 5), min_size=1)
LEFT_OUT = st.sets(st.integers(0, 9))


class PoolMachine(RuleBasedStateMachine):
    """The calls. A subclass says on which backend, and how many states there is room for."""

    backend: Backend
    resume_points: int

    @initialize()
    def start(self):
        self.cache = RecurrentCache(self.resume_points)
        self.cache.init(self.backend, max_sequences=SEQUENCES, max_batch=8)
        self.oracle = PoolOracle([{} for _ in range(SEQUENCES)])
        self.snapshots = []
        self.stamp = 0

    @invariant()
    def every_sequence_holds_its_states(self):
        if not hasattr(self, "cache"):
            return
        for sequence in range(SEQUENCES):
            end = self.oracle.end(sequence)
            assert self.cache.next_position(sequence) == end
            self._forget_what_gave_way(sequence)
            held = self.oracle.held[sequence]
            seen = [p for p in range(end + 9) if self.cache.can_resume(sequence, p)]
            assert seen == sorted({0, *held})
            with self.cache.snapshot(sequence) as snapshot:
                check_rows(self.backend, snapshot, self.oracle.snapshot(sequence, 0, end))
        for snapshot, stamps in self.snapshots:
            check_rows(self.backend, snapshot, stamps)

    def _forget_what_gave_way(self, sequence):
        """Kept states may be dropped, if there is room for few of them; the end never is."""
        if self.resume_points < 100:
            held, end = self.oracle.held[sequence], self.oracle.end(sequence)
            self.oracle.held[sequence] = {
                p: s for p, s in held.items() if p == end or self.cache.can_resume(sequence, p)
            }

    def new(self, count):
        self.stamp += count
        return list(range(self.stamp - count + 1, self.stamp + 1))

    # Passes.

    def begin(self, tokens):
        positions = [
            p
            for sequence, count in tokens.items()
            for p in range(self.oracle.end(sequence), self.oracle.end(sequence) + count)
        ]
        sequences = [sequence for sequence, count in tokens.items() for _ in range(count)]
        self.cache.start_forward(Batch(positions, sequences))

    def put(self, layer, ends, at_cuts):
        """Look at the states of a layer, and put new ones. ends, at_cuts: their stamps."""
        self.cache.set_layer(layer)
        before = [self.oracle.held[run.sequence].get(run.position) for run in self.cache.runs]
        check_states(self.backend, self.cache.get_states(), layer, before)
        kept = {cut: states(self.backend, layer, [stamp]) for cut, stamp in at_cuts.items()}
        self.cache.put_states(*states(self.backend, layer, ends), kept=kept)

    def stamped(self, tokens, left_out):
        """New stamps for the ends of a pass, and for its cuts."""
        runs = self.cache.runs
        assert [(run.sequence, run.end - run.position) for run in runs] == [*tokens.items()]
        for run in runs:
            wanted = self.oracle.cuts(run.sequence, tokens[run.sequence])
            assert run.cuts == wanted or self.resume_points < 100
            assert set(run.cuts) <= set(wanted)
        cuts = [(run.sequence, position) for run in runs for position in run.cuts]
        given = [cut for number, cut in enumerate(cuts) if number not in left_out]
        return self.new(len(runs)), dict(zip(given, self.new(len(given)), strict=True))

    @rule(tokens=RUNS, left_out=LEFT_OUT)
    def forward(self, tokens, left_out):
        self.begin(tokens)
        ends, at_cuts = self.stamped(tokens, left_out)
        for layer in range(LAYERS):
            self.put(layer, ends, at_cuts)
        for (sequence, count), stamp in zip(tokens.items(), ends, strict=True):
            recorded = {cut[1]: kept for cut, kept in at_cuts.items() if cut[0] == sequence}
            self.oracle.store(sequence, count, stamp, recorded)

    @rule(tokens=RUNS, layers=st.integers(0, LAYERS - 1), aborted=st.booleans())
    def given_up(self, tokens, layers, aborted):
        """An unfinished pass leaves nothing; before there are layers it is nothing at all."""
        if self.cache.nbytes:
            self.begin(tokens)
            ends, at_cuts = self.stamped(tokens, set())
            for layer in range(layers):
                self.put(layer, ends, at_cuts)
            if aborted:
                self.cache.abort()

    @rule(tokens=RUNS, sequence=SEQUENCE, how=st.sampled_from(["remove", "copy"]))
    def changed_in_a_pass(self, tokens, sequence, how):
        """A sequence that changes in a pass leaves it, and the pass goes on."""
        if not self.cache.nbytes:
            return
        self.begin(tokens)
        ends, at_cuts = self.stamped(tokens, set())
        before = copy.deepcopy(self.oracle)
        self.put(0, ends, at_cuts)
        others = [s for s in range(SEQUENCES) if s != sequence and self.oracle.end(s)]
        if how == "remove" or not others:
            self.cache.remove(sequence, 0)
            change = lambda oracle: oracle.copy(sequence, sequence, 0)  # noqa: E731
        else:
            self.cache.copy_prefix(others[0], sequence, 100)
            change = lambda oracle: oracle.copy(others[0], sequence, 100)  # noqa: E731
        self.oracle = before
        self.put(1, ends, at_cuts)
        change(self.oracle)
        for (own, count), stamp in zip(tokens.items(), ends, strict=True):
            if own != sequence:
                recorded = {cut[1]: kept for cut, kept in at_cuts.items() if cut[0] == own}
                self.oracle.store(own, count, stamp, recorded)

    # Sequences.

    @rule(sequence=SEQUENCE, ahead=st.lists(st.integers(-2, 9), max_size=3))
    def schedule(self, sequence, ahead):
        positions = [self.oracle.end(sequence) + by for by in ahead]
        self.cache.schedule(sequence, positions)
        self.oracle.schedule(sequence, positions)

    @rule(sequence=SEQUENCE)
    def checkpoint(self, sequence):
        self.cache.checkpoint(sequence)
        self.oracle.checkpoint(sequence)

    @rule(sequence=SEQUENCE, others=RUNS, count=st.integers(1, 5), share=SHARE)
    def draft(self, sequence, others, count, share):
        """A draft beside passes of other sequences, of which as much as possible is accepted."""
        self.checkpoint(sequence)
        start = self.oracle.end(sequence)
        self.forward({**others, sequence: count}, set())
        goal = start + count * share // 8
        if self.resume_points < 100:
            self._forget_what_gave_way(sequence)
            goal = max(p for p in {0, *self.oracle.held[sequence]} if p <= goal)
        self.cache.remove(sequence, goal)
        self.oracle.copy(sequence, sequence, goal)

    @rule(source=SEQUENCE, goal=SEQUENCE, share=SHARE)
    def copy_prefix(self, source, goal, share):
        end = self.oracle.end(source)
        length = end * share // 8
        if not end:
            with pytest.raises(ValueError, match="needs a source that holds tokens"):
                self.cache.copy_prefix(source, goal, length)
        elif self.oracle.can_go(source, length):
            self.cache.copy_prefix(source, goal, length)
            self.oracle.copy(source, goal, length)
        else:
            with pytest.raises(TrimError, match="only to positions with a state"):
                self.cache.copy_prefix(source, goal, length)

    @rule(sequence=SEQUENCE, share=SHARE)
    def remove(self, sequence, share):
        start = self.oracle.end(sequence) * share // 8
        if self.oracle.can_go(sequence, start):
            self.cache.remove(sequence, start)
            self.oracle.copy(sequence, sequence, start)
        else:
            with pytest.raises(TrimError, match="only to positions with a state"):
                self.cache.remove(sequence, start)

    @rule(sequence=SEQUENCE, share=SHARE)
    def remove_middle(self, sequence, share):
        end = self.oracle.end(sequence)
        start = end * share // 8
        if start < end - 1:
            with pytest.raises(NotSupportedError, match="cannot forget tokens before its last"):
                self.cache.remove(sequence, start, end - 1)

    # Snapshots and copies.

    @rule(sequence=SEQUENCE, share=SHARE, resident=st.booleans())
    def snapshot(self, sequence, share, resident):
        stop = self.oracle.end(sequence)
        if stop:
            start = (stop - 1) * share // 8
            snapshot = self.cache.snapshot(sequence, start, stop)
            if not resident:
                snapshot.to_host()
            self.snapshots.append((snapshot, self.oracle.snapshot(sequence, start, stop)))

    @rule()
    def close(self):
        for snapshot, _ in self.snapshots[:1]:
            snapshot.close()
        self.snapshots = self.snapshots[1:]

    @rule(sequence=SEQUENCE, which=st.integers(0, 9), share=SHARE)
    def restore(self, sequence, which, share):
        whole = [pair for pair in self.snapshots if pair[0].start == 0]
        if not whole:
            return
        snapshot, stamps = whole[which % len(whole)]
        stop = max(1, snapshot.stop * share // 8)
        if stop not in stamps:
            with pytest.raises(KVCacheError, match="last place to go on"):
                self.cache.restore(sequence, snapshot, stop=stop)
        elif self.oracle.end(sequence):
            with pytest.raises(ValueError, match="goes to an empty sequence"):
                self.cache.restore(sequence, snapshot, stop=stop)
        else:
            self.cache.restore(sequence, snapshot, stop=stop)
            self.oracle.restore(sequence, stop, stamps[stop])

    @rule(how=st.sampled_from(["copy", "pickle", "numpy"]))
    def go_on_with_a_copy(self, how):
        if how == "copy":
            self.cache = self.cache.copy()
        elif how == "pickle":
            self.cache = pickle.loads(pickle.dumps(self.cache))
        else:
            self.cache = self.cache.to_backend("numpy").to_backend(self.backend)
        for sequence, points in enumerate(self.oracle.points):
            self.oracle.held[sequence] = self.oracle.lasting(sequence, self.oracle.end(sequence))
            self.oracle.marks[sequence], self.oracle.drafted[sequence] = None, set()
            points &= set(self.oracle.held[sequence])


SHARES = {"numpy": 100, "torch": 50, "array_api": 25, "mlx": 40, "jax": 15}
"""Examples out of a hundred: what a backend's speed affords."""


@pytest.mark.slow
@pytest.mark.parametrize("resume_points", [0, 2, 100])
def test_any_sequence_of_states(backend, resume_points):
    class Machine(PoolMachine):
        pass

    Machine.backend, Machine.resume_points = backend, resume_points
    count = max(1, settings().max_examples * SHARES[backend.name] // 100)
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=count, stateful_step_count=30)
    )
