"""Passes that are not finished: nobody sees their tokens, and the next pass takes them back."""

from __future__ import annotations

import signal
from contextlib import suppress

import numpy as np
import pytest

from kvcache import (
    Batch,
    CacheFullError,
    CausalCache,
    EncoderCache,
    WrapperCache,
    functional,
    get_backend,
)
from kvcache.prefix import PrefixCache

from .. import peek
from .oracle import add_positions, check_table

LAYERS = (0, 1)
NUMPY = get_backend("numpy")


def make(backend="numpy", capacity=16, max_batch=16, max_sequences=3, **limits):
    cache = CausalCache(**limits)
    cache.init(backend, max_sequences=max_sequences, capacity=capacity, max_batch=max_batch)
    cache.allocate(LAYERS, 1, 2)
    return cache


def arrays(backend, positions, sequences, base=0):
    """Keys that say token and sequence: 1,000 per tenant, 100 per sequence."""
    codes = np.array([base + 100 * s + p for s, p in zip(sequences, positions, strict=True)])
    return backend.from_host(np.repeat(codes.astype(np.float32)[None, :, None], 2, 2))


def run(cache, positions, sequences, layers=LAYERS, base=0):
    """A pass that puts these layers only; the keys that its last token sees in the last of them."""
    backend = peek.buffers(cache).backend
    cache.start_forward(Batch(positions, sequences))
    for layer in layers:
        cache.set_layer(layer)
        keys = arrays(backend, positions, sequences, base)
        cache.put(keys, keys)
    if not layers:
        return []
    keys, _, mask = cache.get()
    return sorted(backend.to_host(keys)[0, backend.to_host(mask)[-1], 0].astype(int).tolist())


def looks(cache):
    """All that a caller can see of the history of every sequence."""
    sequences = range(cache.max_sequences)
    seen = [
        (cache.next_position(s), [cache.can_resume(s, p) for p in range(14)]) for s in sequences
    ]
    held = []
    for sequence in sequences:
        if cache.next_position(sequence):
            with cache.snapshot(sequence) as snapshot:
                held += [part.rows.positions.tolist() for part in snapshot.parts]
    return seen, held


FAILURES = [(), (0,), (1,)]
"""Layers that were put when the model failed."""


@pytest.mark.parametrize("layers", FAILURES)
def test_nobody_sees_the_tokens_of_an_unfinished_pass(backend, layers):
    cache = make(backend)
    run(cache, range(4), [0] * 4)
    before = looks(cache)
    run(cache, [4, 5, 0], [0, 0, 1], layers)
    assert looks(cache) == before
    cache.abort()
    assert looks(cache) == before
    check_table(peek.table(cache))


@pytest.mark.parametrize("layers", FAILURES)
def test_the_next_pass_takes_an_unfinished_one_back(backend, layers):
    """Above all it sees nothing that another tenant left in the cells."""
    cache = make(backend)
    run(cache, range(6), [0] * 6, base=1000)
    cache.remove(0, 0)
    run(cache, range(4), [0] * 4, layers)
    assert run(cache, range(3), [0] * 3, base=2000) == [2000, 2001, 2002]
    assert looks(cache)[0][0] == (3, [True] * 4 + [False] * 10)
    check_table(peek.table(cache))


def test_a_pass_is_complete_when_every_layer_allocated_before_it_was_put():
    cache = make()
    run(cache, range(4), [0] * 4)
    assert cache.next_position(0) == 4
    cache.allocate([2], 1, 2)  # in the middle of the next pass, this changes nothing for this one
    assert cache.next_position(0) == 4
    run(cache, [4], [0])
    assert cache.next_position(0) == 4, "layer 2 was not put"
    run(cache, [4], [0], (0, 1, 2))
    assert cache.next_position(0) == 5


def test_a_reserve_pass_leaves_nothing_to_finish():
    cache = make()
    run(cache, range(4), [0] * 4)
    cache.start_forward(Batch(range(9), [1] * 9), reserve=True)
    assert cache.next_position(0) == 4
    cache.abort()
    assert run(cache, [4], [0]) == [0, 1, 2, 3, 4]


def test_abort_ends_the_pass_and_may_come_at_any_time():
    cache = CausalCache()
    cache.abort()
    cache.init("numpy", capacity=8, max_batch=8)
    cache.abort()
    cache.allocate(LAYERS, 1, 2)
    run(cache, range(2), [0] * 2)
    cache.abort()
    assert cache.next_position(0) == 2
    run(cache, [2], [0], (0,))
    cache.abort()
    with pytest.raises(Exception, match="Call start_forward first"):
        cache.get()


@pytest.mark.parametrize("limits", [{"window": 4}, {"window": 4, "memory": 6}, {"chunk": 3}])
@pytest.mark.parametrize("layers", FAILURES)
def test_an_unfinished_pass_leaves_a_window_whole(limits, layers):
    """Goes on exactly like a twin that never saw the pass."""
    cache, twin = (make(**limits, max_sequences=2, max_batch=4, capacity=20) for _ in range(2))
    for position in range(11):
        assert run(cache, [position] * 2, [0, 1]) == run(twin, [position] * 2, [0, 1])
        if not layers:  # otherwise cells that the pass evicted may be overwritten
            before = looks(twin)
        run(cache, [position + 1] * 2 + [position + 2], [0, 1, 1], layers)
        cache.abort()
        check_table(peek.table(cache))
        if not layers:
            assert looks(cache) == before
        for sequence in (0, 1):
            assert cache.can_resume(sequence, position + 1)


def test_cells_that_a_pass_evicted_come_back_as_far_as_they_are_intact():
    cache = make(window=3, memory=6, max_sequences=1, max_batch=2, capacity=12)  # 7 cells
    for position in range(7):
        run(cache, [position], [0])
    resumable = [p for p in range(8) if cache.can_resume(0, p)]
    run(cache, [7, 8], [0, 0], ())
    cache.abort()
    assert [p for p in range(8) if cache.can_resume(0, p)] == resumable
    run(cache, [7, 8], [0, 0], (0,))  # overwrites the oldest
    cache.abort()
    assert run(cache, [7], [0]) == [5, 6, 7]
    check_table(peek.table(cache))


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_what_comes_back_has_its_own_keys(tokens):
    """Of evicted tokens only the newest ones whose cells the failed pass did not write to."""
    cache = make(window=3, memory=6, max_sequences=1, max_batch=3, capacity=12)
    for position in range(9):
        run(cache, [position], [0])
    before = stored_keys(cache)
    run(cache, range(9, 9 + tokens), [0] * tokens, (0,))
    cache.abort()
    after = stored_keys(cache)
    assert after == {position: position for position in after}
    assert [*after] == [*before][-len(after) :]
    assert {6, 7, 8} <= after.keys()
    assert [p for p in range(10) if cache.can_resume(0, p)] == resumable_with(after, 3)


def stored_keys(cache):
    """The first key of every token of sequence 0 by position, in ascending order."""
    table, [keys, _] = peek.table(cache), peek.layers(cache)[0]
    cells = table.cells_of(0)
    return {int(table.positions[cell]): int(keys[0, cell, 0]) for cell in cells}


def resumable_with(positions, window):
    """Where a sequence can go on: every token that the window reaches back to is held."""
    return [
        p for p in range(max(positions) + 2) if {*range(max(0, p - window + 1), p)} <= {*positions}
    ]


def test_a_failed_pass_into_the_middle_of_a_sequence():
    cache = make()
    run(cache, [0, 1, 4, 5], [0] * 4)
    before = looks(cache)
    run(cache, [2, 3], [0, 0], (0,))
    assert looks(cache) == before
    cache.abort()
    assert run(cache, [2, 3], [0, 0]) == [0, 1, 2, 3]
    assert cache.can_resume(0, 6)


def test_the_latest_pass_says_where_it_begins_and_what_it_brought():
    """Before a pass went through the whole model, nothing tells how many layers are to come."""
    cache = CausalCache()
    cache.init("numpy", max_sequences=3, capacity=16, max_batch=4)
    assert cache.latest_pass(0) == (None, frozenset(), False)
    run(cache, [0, 1, 0], [0, 0, 1], (0,))
    assert cache.latest_pass(0) == (0, {0}, True)
    assert cache.latest_pass(2) == (None, {0}, True)
    run(cache, [3, 2], [0, 0], ())
    assert cache.latest_pass(0) == (2, {0}, False)
    cache.set_layer(0)
    cache.put(keys := arrays(NUMPY, [3, 2], [0, 0]), keys)
    assert cache.latest_pass(0) == (2, {0}, False)
    cache.set_layer(1)
    cache.put(keys, keys)
    assert cache.latest_pass(0) == (2, {0, 1}, True)
    assert cache.latest_pass(1) == (None, {0, 1}, True)
    cache.remove(0, 2)
    assert cache.latest_pass(0) == (None, {0, 1}, True), "it has changed since"


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.remove(1, 0),
        lambda cache: cache.remove(1, 2),
        lambda cache: cache.copy_prefix(2, 1, 3),
        lambda cache: cache.copy_prefix(1, 1, 3),
    ],
    ids=["remove", "truncate", "overwrite", "truncate by copy"],
)
def test_a_sequence_that_changes_leaves_a_running_pass_to_the_others(backend, change):
    cache = make(backend)
    for sequence in (0, 1, 2):
        run(cache, range(4), [sequence] * 4)
    cache.start_forward(Batch([4, 4], [0, 1]))
    keys = arrays(backend, [4, 4], [0, 1])
    for layer in LAYERS:
        cache.set_layer(layer)
        cache.put(keys, keys)
        if layer == 0:
            change(cache)
            kept = cache.next_position(1)
            with cache.snapshot(2).to_host() as snapshot:  # others take cells meanwhile
                cache.remove(2, 0)
                cache.restore(2, snapshot)
        found, _, mask = cache.get()
        visible = backend.to_host(found)[0, backend.to_host(mask)[0], 0]
        assert visible.tolist() == [0, 1, 2, 3, 4]
    assert run(cache, [4], [2]) == [200, 201, 202, 203, 204], "no put of the pass hit its cells"
    assert cache.next_position(0) == 5
    assert cache.next_position(1) == kept
    check_table(peek.table(cache))
    cache.remove(0, 0)
    cache.remove(1, 0)
    cache.remove(2, 0)
    assert peek.table(cache).free == cache.cells


def test_cells_of_a_removed_sequence_are_free_when_the_pass_is_over():
    cache = make(capacity=4, max_sequences=2, max_batch=8)  # 8 cells
    run(cache, range(3), [1] * 3)
    cache.start_forward(Batch([0, 3], [0, 1]))
    cache.remove(1, 0)
    assert peek.table(cache).free == 3, "a put may still write to the others"
    cache.abort()
    assert peek.table(cache).free == 8
    run(cache, range(3), [1] * 3)
    run(cache, [0, 3], [0, 1])
    cache.remove(1, 0)
    assert peek.table(cache).free == 7, "every layer was put"


def test_a_copy_leaves_out_what_is_not_finished(backend):
    cache = make("numpy")
    run(cache, range(3), [0] * 3)
    run(cache, [3, 0], [0, 1], (0,))
    clone = cache.to_backend(backend)
    assert looks(clone) == looks(cache)
    assert run(clone, [3], [0]) == [0, 1, 2, 3]
    check_table(peek.table(clone))


# Wrappers.


@pytest.mark.parametrize("failed", [0, 1])
def test_a_pass_is_complete_in_all_caches_of_a_wrapper_or_in_none(failed):
    wrapper = WrapperCache(CausalCache(window=4), CausalCache())
    wrapper.init("numpy", max_sequences=2, capacity=8, max_batch=8)

    def put(types, positions):
        wrapper.start_forward(Batch(positions, [0] * len(positions)))
        keys = np.full((1, len(positions), 2), 7, np.float32)
        for index in types:
            wrapper.set_layer_type(index)
            wrapper.put(keys, keys)

    put((0, 1), range(3))
    put((1 - failed,), [3])
    assert wrapper.next_position(0) == 3
    assert not wrapper.can_resume(0, 4)
    assert [cache.next_position(0) for cache in wrapper.caches] == [3, 3]
    assert not any(cache.can_resume(0, 4) for cache in wrapper.caches)
    wrapper.caches[1 - failed].abort()  # that of one is that of all
    assert [peek.table(cache).cells_of(0).size for cache in wrapper.caches] == [3, 3]
    put((0, 1), [3])
    assert wrapper.can_resume(0, 4)


def test_a_cache_is_a_part_of_one_wrapper():
    cache = CausalCache()
    wrapper = WrapperCache(cache, EncoderCache())
    with pytest.raises(ValueError, match="a cache is a part of one wrapper only"):
        WrapperCache(cache)
    wrapper.abort()


# Programs.


def applied(cache, plan, tokens, state=None):
    """The state after a program that puts all layers."""
    backend = peek.buffers(cache).backend
    state, keys = state or cache.program_state, arrays(backend, *tokens)
    for layer in LAYERS:
        state = functional.put(state, plan, layer, keys, keys)
    return state


def test_a_planned_pass_is_complete_when_the_state_comes_back(backend):
    cache = make(backend)
    run(cache, range(3), [0] * 3)
    plan = cache.plan(Batch([3], [0]))
    assert cache.next_position(0) == 3
    assert not cache.can_resume(0, 4)
    cache.program_state = applied(cache, plan, ([3], [0]))
    assert cache.can_resume(0, 4)
    cache.abort()
    assert run(cache, [4], [0]) == [0, 1, 2, 3, 4]


def test_plans_follow_each_other_before_the_state_comes_back(backend):
    cache = make(backend, window=3)
    run(cache, range(3), [0] * 3)
    state = cache.program_state
    for position in range(3, 9):
        plan = cache.plan(Batch([position, position], [0, 1]))
        state = applied(cache, plan, ([position] * 2, [0, 1]), state)
        assert not cache.can_resume(0, position + 1)
    cache.program_state = state
    assert run(cache, [9], [0]) == [7, 8, 9]


@pytest.mark.parametrize("steps", [None, 4])
def test_plans_of_programs_that_failed_are_taken_back(steps):
    cache = make()
    run(cache, range(3), [0] * 3)
    before = looks(cache)
    first = Batch([3, 0], [0, 1])
    plan = (lambda: cache.plan_steps(first, steps)) if steps else (lambda: cache.plan(first))
    plan()
    assert looks(cache) == before
    again = plan()  # instead of the one that failed
    assert looks(cache) == before
    assert again.cells.shape[-1] == 2
    check_table(peek.table(cache))
    cache.abort()
    assert looks(cache) == before
    assert peek.table(cache).free == cache.cells - 3
    plan()
    assert run(cache, [3], [0]) == [0, 1, 2, 3], "a pass of another kind takes it back, too"
    assert cache.next_position(1) == 0


def test_the_plan_of_a_later_pass_is_what_is_planned_again():
    cache = make()
    run(cache, range(3), [0] * 3)
    state = applied(cache, cache.plan(Batch([3], [0])), ([3], [0]))
    cache.plan(Batch([4], [0]))  # its program fails
    state = applied(cache, cache.plan(Batch([4], [0])), ([4], [0]), state)
    cache.program_state = state
    assert cache.next_position(0) == 5
    assert run(cache, [5], [0]) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("hook", ["from_host", "traced_index", "alloc"])
@pytest.mark.parametrize("steps", [None, 4])
def test_a_plan_that_cannot_be_made_changes_nothing(monkeypatch, hook, steps):
    cache = make(window=3, max_sequences=2, max_batch=2)
    for position in range(6):
        run(cache, [position] * 2, [0, 1])
    before, free = looks(cache), peek.table(cache).free
    backend = peek.buffers(cache).backend

    def fail(*args, **kwargs):
        raise MemoryError("injected")

    first = Batch([6, 6], [0, 1])
    with monkeypatch.context() as patched:
        patched.setattr(backend, hook, fail)
        with pytest.raises(MemoryError):
            cache.plan(first) if steps is None else cache.plan_steps(first, steps)
    assert looks(cache) == before
    assert peek.table(cache).free == free
    check_table(peek.table(cache))
    cache.get()  # of the pass before
    assert run(cache, [6, 6], [0, 1]) == [104, 105, 106]


def test_resume_points_of_passes_that_were_taken_back_are_ahead_again():
    cache = make(window=3, max_sequences=1, max_batch=8)
    cache.schedule(0, [4, 6])
    run(cache, range(4), [0] * 4)
    cache.plan_steps(Batch([4], [0]), 5)
    cache.abort()
    for position in range(4, 10):
        run(cache, [position], [0])
    with cache.snapshot(0) as snapshot:
        held = snapshot.parts[0].rows.positions.tolist()
    assert {2, 3, 4, 5} <= set(held)


# Interruptions.


def interrupts(monkeypatch, owner, name):
    """Ctrl-C arrives at the first call of this function."""
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("tokens", [2, 3])
@pytest.mark.parametrize("name", ["evict", "insert", "span", "_append", "_choose"])
def test_ctrl_c_while_a_pass_begins(monkeypatch, tokens, name):
    cache, twin = (make(window=3, max_sequences=2, max_batch=3) for _ in range(2))
    for each in (cache, twin):
        for position in range(6):
            run(each, [position] * 2, [0, 1])
    interrupts(monkeypatch, peek.table(cache), name)
    with pytest.raises(KeyboardInterrupt):
        cache.start_forward(Batch(range(6, 6 + tokens), [0] * tokens))
    assert looks(cache) == looks(twin)
    assert peek.table(cache).free == peek.table(twin).free
    check_table(peek.table(cache))
    for position in range(6, 10):
        assert run(cache, [position] * 2, [0, 1]) == run(twin, [position] * 2, [0, 1])


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("name", ["evict", "insert", "span", "_append", "_choose"])
def test_a_pass_that_fails_as_it_begins_never_came(monkeypatch, tokens, name):
    """Every step of the table, just before it and just after."""
    for late in (False, True):
        cache, twin = (make(window=3, max_sequences=2, max_batch=3) for _ in range(2))
        for each in (cache, twin):
            for position in range(6):
                run(each, [position] * 2, [0, 1])
        with monkeypatch.context() as patch:
            calls = fails(patch, peek.table(cache), name, late)
            with suppress(MemoryError):
                cache.start_forward(Batch(range(6, 6 + tokens), [0] * tokens))
        if not calls:
            continue  # a pass of so many tokens takes another way
        assert looks(cache) == looks(twin)
        assert peek.table(cache).free == peek.table(twin).free
        check_table(peek.table(cache))
        for position in range(6, 10):
            assert run(cache, [position] * 2, [0, 1]) == run(twin, [position] * 2, [0, 1])


def fails(patch, owner, name, late):
    """Let the first call of this function fail, `late` after its work; list the calls."""
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) > 1:
            return real(*args, **kwargs)
        if late:
            real(*args, **kwargs)
        raise MemoryError

    patch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize("change", ["remove", "middle", "copy", "restore", "abort"])
def test_ctrl_c_waits_for_a_change_of_sequences_that_has_begun(monkeypatch, change):
    cache = make(shift=add_positions(NUMPY))
    run(cache, range(6), [0] * 6)
    snapshot = cache.snapshot(0).to_host()
    calls = {
        "remove": lambda: cache.remove(0, 2),
        "middle": lambda: cache.remove(0, 2, 4),
        "copy": lambda: cache.copy_prefix(0, 1, 3),
        "restore": lambda: cache.restore(1, snapshot),
        "abort": cache.abort,
    }
    if change == "abort":
        run(cache, [6], [0], (0,))
    interrupts(monkeypatch, peek.table(cache), "recompute_range")
    with pytest.raises(KeyboardInterrupt):
        calls[change]()
    lengths = {"remove": (2, 0), "middle": (4, 0), "copy": (6, 3), "restore": (6, 6)}
    held = tuple(map(cache.next_position, (0, 1)))
    assert held == lengths.get(change, (6, 0))
    check_table(peek.table(cache))
    snapshot.close()


# Sessions.


def test_sessions_store_complete_passes_only():
    cache = make()
    prefix = PrefixCache(cache)
    with prefix.session(range(6)) as session:
        run(cache, range(4), [session.sequence] * 4)
        run(cache, [4, 5], [session.sequence] * 2, (0,))
    with prefix.session(range(6)) as again:
        assert again.matched == 4


def test_a_session_that_ends_in_a_running_pass_leaves_it_to_the_others():
    cache = make()
    prefix = PrefixCache(cache)
    one, two = prefix.session(range(5)), prefix.session(range(10, 15))
    sequences = [one.sequence] * 5 + [two.sequence] * 5
    run(cache, [*range(5)] * 2, sequences)
    cache.start_forward(Batch([5, 5], [one.sequence, two.sequence]))
    keys = arrays(peek.buffers(cache).backend, [5, 5], [0, 0])
    cache.set_layer(0)
    cache.put(keys, keys)
    with two:
        pass  # ends
    cache.set_layer(1)
    cache.put(keys, keys)
    _, _, mask = cache.get()
    assert mask[0].sum() == 6
    with one:
        one.extend([5])
    with prefix.session(range(7)) as again:
        assert again.matched == 6
    with prefix.session(range(10, 20)) as again:
        assert again.matched == 5


def test_a_pool_that_is_full_frees_what_a_failed_pass_took():
    cache = make(capacity=4, max_sequences=1, max_batch=4)
    run(cache, range(3), [0] * 3)
    run(cache, [3], [0], (0,))
    assert run(cache, [3], [0]) == [0, 1, 2, 3]
    with pytest.raises(CacheFullError):
        cache.start_forward(Batch([4], [0]))
