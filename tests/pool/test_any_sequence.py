"""Any sequence of calls, good and bad, on every backend, against the oracle.

One cache, or a wrapper of two, takes whatever Hypothesis thinks of. After every call the cells are
what the oracle says and the table is in order; after every refused call everything is, to the
byte, what it was; and every token of every pass attends to exactly what it should.
"""

from __future__ import annotations

import operator
from itertools import repeat

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import kvcache
from kvcache import (
    Batch,
    CacheConfig,
    CacheFullError,
    CausalCache,
    KVCacheError,
    NotSupportedError,
    WrapperCache,
)
from kvcache.backends.products import NEVER, ReadCosts

from .. import peek
from .oracle import (
    LAYERS,
    Oracle,
    add_positions,
    attended,
    check_attention,
    check_held,
    check_table,
    fingerprint,
    put_tokens,
    rows,
)
from .paging import check_block_table, is_full, refuses_removal

LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "window": st.integers(1, 6),
        "chunk": st.integers(1, 5),
        "memory": st.integers(0, 4),  # more than the window
        "shift": st.just(True),
    },
)
SIZES = st.fixed_dictionaries(
    {
        "max_sequences": st.integers(1, 4),
        "capacity": st.integers(2, 12),
        "max_batch": st.integers(1, 6),
    }
)
REFUSALS = {"bad": ValueError, "full": CacheFullError, "before": NotSupportedError}
WRONG_PUTS = ("tokens", "rank", "dtype", "heads", "width", "no values", "values' tokens", "thing")


class CacheMachine(RuleBasedStateMachine):
    """backend: what it runs on. paddings: what is drawn from, few where programs are compiled."""

    backend = kvcache.get_backend("numpy")
    paddings: tuple[int, ...] = (1, 1, 1, 4, 7)
    page = 1

    @initialize(parts=st.lists(LIMITS, min_size=1, max_size=2), sizes=SIZES, data=st.data())
    def make(self, parts, sizes, data):
        self.padding = data.draw(st.sampled_from(self.paddings))
        self.mask_dtype = data.draw(st.sampled_from(["bool", "float32"]))
        self.sizes = sizes = {**sizes, "capacity": max(sizes["capacity"], self.page)}
        self.parts, self.oracles = [], []
        for drawn in parts:
            limits = dict(drawn)
            if "window" not in limits:
                limits.pop("memory", None)
            elif "memory" in limits:
                limits["memory"] += limits["window"]
            if "shift" in limits:
                limits["shift"] = add_positions(self.backend)
            self.parts.append(CausalCache(**limits, page=self.page))
            self.oracles.append(Oracle(**sizes, padding=self.padding, page=self.page, **limits))
        # Attention reads in many pieces or few: what it gives is the same.
        self.backend = kvcache.get_backend(self.backend.spec)
        costs = [ReadCosts(1, 2, 1), ReadCosts(64, 9), ReadCosts(64, NEVER, packed=True)]
        self.backend.read_costs = data.draw(st.sampled_from(costs))
        self.cache = self.parts[0] if len(parts) == 1 else WrapperCache(*self.parts)
        self.cache.set_config(CacheConfig(padding=self.padding, mask_dtype=self.mask_dtype))
        self.cache.init(self.backend, **sizes)
        self.tokens = 1

    @property
    def count(self):
        return self.sizes["max_sequences"]

    # Passes.

    @rule(data=st.data())
    def prefill(self, data):
        """A pass of several tokens: of any sequences, in any order, perhaps with gaps."""
        pairs = []
        for sequence in data.draw(st.sets(st.integers(0, self.count - 1), min_size=1)):
            start = max(oracle.next(sequence) for oracle in self.oracles)
            start += data.draw(st.sampled_from([0, 0, 0, 0, 1, 3, -1]))
            tokens = data.draw(st.integers(1, 6))
            step = data.draw(st.sampled_from([1, 1, 1, 2]))
            pairs += [(start + step * i, sequence) for i in range(tokens)]
        pairs = data.draw(st.permutations(pairs)) if data.draw(st.booleans()) else pairs
        self.forward(data, *zip(*pairs, strict=True))

    @rule(data=st.data(), count=st.integers(1, 12))
    def decode(self, data, count):
        """Some passes of one token each for the same sequences."""
        ids = data.draw(st.sets(st.integers(0, self.count - 1), min_size=1, max_size=2))
        for _ in range(count):
            nexts = [max(oracle.next(s) for oracle in self.oracles) for s in ids]
            if not self.forward(data, nexts, list(ids)):
                break

    def forward(self, data, positions, sequences):
        """One pass; returns whether it was one."""
        positions, sequences = list(positions), list(sequences)
        batch = lambda: Batch(positions, sequences)  # noqa: E731 - Batch itself may refuse
        verdicts = self.verdicts(positions, sequences)
        if verdicts != {None}:
            kinds = [REFUSALS[verdict] for verdict in verdicts - {None}]
            self.refused(lambda: self.cache.start_forward(batch()), *kinds)
            return False
        if self.tokens > 1 and data.draw(st.integers(0, 5)) == 0:
            self.abandon(batch(), data.draw(st.booleans()))
        self.cache.start_forward(batch())
        tokens = list(range(self.tokens, self.tokens + len(positions)))
        self.tokens += len(tokens)
        for part, oracle in zip(self.parts, self.oracles, strict=True):
            oracle.store(positions, sequences, tokens)
            put_tokens(self.backend, part, tokens, positions)
            self.check_range(part, sequences)
            check_block_table(part, positions, sequences)
        self.look(positions, sequences, ())
        if data.draw(st.integers(0, 3)) == 0:
            ahead = data.draw(st.sets(st.integers(0, len(positions) - 1)))
            for index in range(len(self.parts)):
                if len(self.parts) > 1:
                    self.cache.set_layer_type(index)
                self.cache.set_causal(ahead)
            self.look(positions, sequences, ahead)
        return True

    def verdicts(self, positions, sequences):
        """What each part has against a pass."""
        if self.page == 1:
            return {oracle.refuses(positions, sequences) for oracle in self.oracles}
        return set(
            map(
                self.verdict_of_pages,
                self.parts,
                self.oracles,
                *map(repeat, (positions, sequences)),
            )
        )

    def verdict_of_pages(self, part, oracle, positions, sequences):
        table, verdict = peek.table(part), oracle.refuses(positions, sequences)
        if verdict == "bad":
            return "bad"
        if any(p < oracle.next(s) for p, s in zip(positions, sequences, strict=True)):
            return "before"
        full = is_full(table, oracle.trimmed(positions, sequences), positions, sequences)
        assert not full or oracle.kept is None or len(positions) > self.sizes["max_batch"]
        return "full" if full else None

    def abandon(self, batch, aborted):
        """A pass that is begun and not finished leaves no trace."""
        self.cache.start_forward(batch)
        for sequence in range(self.count):
            for part, oracle in zip(self.parts, self.oracles, strict=True):
                if oracle.kept is not None:  # what the pass evicts is gone until it is over
                    continue
                assert part.next_position(sequence) == oracle.next(sequence)
                for position in range(0, oracle.next(sequence) + 2, 3):
                    resumable = oracle.can_resume(sequence, position)
                    assert part.can_resume(sequence, position) is resumable
        if aborted:
            self.cache.abort()
            for part, oracle in zip(self.parts, self.oracles, strict=True):
                check_held(part, oracle)
                check_table(peek.table(part))

    def look(self, positions, sequences, ahead):
        """Every token attends to what it should, in every layer."""
        for part, oracle in zip(self.parts, self.oracles, strict=True):
            expected = [
                oracle.visible(s, p, i in ahead)
                for i, (p, s) in enumerate(zip(positions, sequences, strict=True))
            ]
            for layer in range(LAYERS):
                assert attended(self.backend, part, layer) == expected
            check_attention(self.backend, part, expected)

    def check_range(self, part, sequences):
        """What get returns is the smallest padded range around the batch's sequences."""
        part.set_layer(0)
        length = part.get()[0].shape[1]
        cells = np.concatenate([peek.table(part).cells_of(s) for s in set(sequences)])
        first = cells.min() // self.padding * self.padding
        last = -(-(cells.max() + 1) // self.padding) * self.padding
        if self.backend.slices_are_views:
            assert (peek.forward_pass(part).start, peek.forward_pass(part).stop) == (first, last)
        assert peek.forward_pass(part).start <= first
        assert peek.forward_pass(part).stop >= last
        assert length == peek.forward_pass(part).stop - peek.forward_pass(part).start
        assert length % self.padding == 0

    @rule(tokens=st.integers(1, 20), sequence=st.integers(0, 3))
    def reserve(self, tokens, sequence):
        """Lays out a pass and changes nothing."""
        before = [fingerprint(part)[:3] for part in self.parts]
        contents = [fingerprint(part)[4] for part in self.parts]
        batch = Batch(range(tokens), [sequence % self.count] * tokens)
        self.cache.start_forward(batch, reserve=True)
        for part, had in zip(self.parts, contents, strict=True):
            put_tokens(self.backend, part, [9] * tokens, [9] * tokens)
            assert part.get()[0].shape[1] == peek.table(part).cells
            assert attended(self.backend, part, 0) == [[]] * tokens
            after = fingerprint(part)[4]
            assert all(after[layer] == bits for layer, bits in had.items())
        assert [fingerprint(part)[:3] for part in self.parts] == before

    # Sequences.

    @rule(data=st.data())
    def copy_prefix(self, data):
        source, target = (data.draw(st.integers(0, self.count - 1)) for _ in range(2))
        length = data.draw(st.integers(0, 14))
        before = [peek.table(part).free for part in self.parts]
        empty = [not oracle.held[target] for oracle in self.oracles]
        call = lambda: self.cache.copy_prefix(source, target, length)  # noqa: E731
        holds = [bool(oracle.held[source]) for oracle in self.oracles]
        resumes = [oracle.can_resume(source, length) for oracle in self.oracles]
        if not any(holds) or not all(map(operator.or_, holds, resumes)):
            self.refused(call, ValueError)
            return
        call()
        for oracle in self.oracles:
            oracle.copy(source, target, length)
        for part, free, fresh in zip(self.parts, before, empty, strict=True):
            assert not fresh or source == target or peek.table(part).free == free  # takes no cell

    @rule(data=st.data(), sequence=st.integers(0, 3), whole=st.booleans())
    def remove_tail(self, data, sequence, whole):
        sequence %= self.count
        end = max(oracle.next(sequence) for oracle in self.oracles)
        begin = 0 if whole else data.draw(st.integers(max(0, end - 5), end + 1))
        self.remove(sequence, begin, None)

    @rule(data=st.data(), sequence=st.integers(0, 3))
    def remove_middle(self, data, sequence):
        sequence %= self.count
        last = max(oracle.next(sequence) for oracle in self.oracles)
        begin = data.draw(st.integers(0, last))
        self.remove(sequence, begin, data.draw(st.integers(begin, last + 1)))

    def remove(self, sequence, begin, end):
        verdicts = {
            oracle.refuses_removal(sequence, begin, end)
            or self.parts_of_pages(part, sequence, begin, end)
            for part, oracle in zip(self.parts, self.oracles, strict=True)
        }
        call = lambda: self.cache.remove(sequence, begin, end)  # noqa: E731
        if verdicts != {None}:
            self.refused(call, *(getattr(kvcache, verdict) for verdict in verdicts - {None}))
            return
        call()
        for oracle in self.oracles:
            oracle.remove(sequence, begin, end)

    def parts_of_pages(self, part, sequence, begin, end):
        table = peek.table(part)
        row = table.cells_of(sequence)
        if self.page == 1 or end is None or begin == end or not (table.positions[row] >= end).any():
            return None
        refused = refuses_removal(table, sequence, begin, end)
        return "NotSupportedError" if refused else None

    @rule(sequence=st.integers(0, 3), position=st.integers(0, 30))
    def can_resume(self, sequence, position):
        sequence %= self.count
        yes = [oracle.can_resume(sequence, position) for oracle in self.oracles]
        assert self.cache.can_resume(sequence, position) is all(yes)
        for part, answer in zip(self.parts, yes, strict=True):
            assert part.can_resume(sequence, position) is answer
            assert part.can_resume(sequence, 0)

    # What is refused.

    def refused(self, call, *kinds):
        """It raises one of these, and changes nothing."""
        before = [fingerprint(part) for part in self.parts]
        with pytest.raises(kinds) as caught:
            call()
        assert str(caught.value)[-1] == "."
        assert [fingerprint(part) for part in self.parts] == before

    @rule(bad=st.sampled_from([-1, 4, 99, -5]), position=st.integers(0, 5))
    def foreign_sequences(self, bad, position):
        bad = bad if bad < 0 else max(bad, self.count)
        self.refused(
            lambda: self.cache.start_forward(Batch([position, position], [0, bad])), ValueError
        )
        self.refused(lambda: self.cache.remove(bad, 0), ValueError)
        self.refused(lambda: self.cache.remove(bad, 0, 3), ValueError)
        self.refused(lambda: self.cache.copy_prefix(bad, 0, 3), ValueError)
        self.refused(lambda: self.cache.copy_prefix(0, bad, 3), ValueError)
        self.refused(lambda: self.cache.can_resume(bad, 3), ValueError)

    @rule(begin=st.integers(-3, 6), end=st.integers(-3, 6), sequence=st.integers(0, 3))
    def inverted_ranges(self, begin, end, sequence):
        if begin < 0 or end < begin:
            self.refused(lambda: self.cache.remove(sequence % self.count, begin, end), ValueError)

    @rule(data=st.data(), sequence=st.integers(0, 3))
    def repeated_positions(self, data, sequence):
        sequence %= self.count
        new = max(oracle.next(sequence) for oracle in self.oracles)
        held = sorted(set().union(*(oracle.held[sequence] for oracle in self.oracles)))
        old = data.draw(st.sampled_from([*held, new]))
        other = (sequence + 1) % self.count
        batch = Batch([new, old, 100], [sequence, sequence, other])
        kinds = [NotSupportedError] if self.page > 1 else []  # a part may lack that position
        self.refused(lambda: self.cache.start_forward(batch), ValueError, CacheFullError, *kinds)
        self.refused(lambda: self.cache.start_forward(Batch([-1], [sequence])), ValueError)

    @rule(data=st.data(), sequence=st.integers(0, 3), wrong=st.sampled_from(WRONG_PUTS))
    def wrong_puts(self, data, sequence, wrong):
        """A put that is refused, in a pass that then goes on."""
        sequence %= self.count
        start = max(oracle.next(sequence) for oracle in self.oracles)
        if not self.forward(data, [start, start + 1], [sequence, sequence]):
            return
        keys, values = rows([7, 7], [7, 7])
        keys = {"tokens": keys[:, :1], "rank": keys[0], "width": keys[..., :1]}.get(wrong, keys)
        values = {
            "dtype": values.astype(np.int32),
            "heads": np.concatenate([values, values]),
            "values' tokens": values[:, :1],
        }.get(wrong, values)
        keys, values = (self.backend.from_host(part) for part in (keys, values))
        keys = "keys" if wrong == "thing" else keys
        values = None if wrong == "no values" else values
        for part in self.parts:
            part.set_layer(0)
            self.refused(lambda p=part: p.put(keys, values), KVCacheError)
        self.look(
            [start, start + 1],
            [sequence, sequence],
            frozenset(peek.forward_pass(self.parts[0]).ahead),
        )

    # Always.

    @invariant()
    def is_in_order(self):
        if hasattr(self, "parts"):
            for part, oracle in zip(self.parts, self.oracles, strict=True):
                check_table(peek.table(part))
                check_held(part, oracle)


SHARE = {"numpy": 200, "torch": 30, "array_api": 30, "mlx": 25, "jax": 3}
"""Examples out of a hundred: what a backend's speed affords."""


@pytest.mark.slow
def test_any_sequence(backend):
    class Machine(CacheMachine):
        pass

    Machine.backend = backend
    if backend.name == "jax":
        Machine.paddings = (64,)
    count = max(1, settings().max_examples * SHARE[backend.name] // 100)
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=count, stateful_step_count=40)
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", [4, pytest.param(16, marks=pytest.mark.matrix)])
def test_any_sequence_in_pages(page):
    class Machine(CacheMachine):
        pass

    Machine.page = page
    count = max(1, settings().max_examples // 3)
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=count, stateful_step_count=40)
    )


class Copying(type(kvcache.get_backend("numpy"))):
    """NumPy as if slices were no views, like JAX: ranges come in few lengths."""

    slices_are_views = False


@pytest.mark.slow
def test_any_sequence_where_slices_are_copies():
    class Machine(CacheMachine):
        backend = Copying()
        paddings = (1, 4)

    run_state_machine_as_test(Machine, settings=settings(stateful_step_count=40))
