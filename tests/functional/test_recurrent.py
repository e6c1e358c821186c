"""Plans of recurrent layers: what a program does with states is what put and get do with them."""

import numpy as np
import pytest

from kvcache import (
    Batch,
    CacheFullError,
    CausalCache,
    DTypeError,
    EncoderCache,
    KVCacheError,
    NotSupportedError,
    RecurrentCache,
    ShapeError,
    StateError,
    WrapperCache,
    functional,
    get_backend,
)

from .. import peek
from ..pool.state_oracle import LAYERS, check_rows, dtypes_of, host_state, states

# What the compiler of torch imports warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

NUMPY = get_backend("numpy")
FORMS = ((3, 4), (5,)), ((2,),)


def make(backend=NUMPY, resume_points=8, max_sequences=3, max_batch=8, allocated=True):
    cache = RecurrentCache(resume_points)
    cache.init(backend, max_sequences=max_sequences, max_batch=max_batch)
    if allocated:
        for layer, dtypes in enumerate(dtypes_of(backend)):
            cache.allocate([layer], *zip(FORMS[layer], dtypes, strict=True))
    return cache


def code(sequence, position):
    """The stamp of the state behind a position."""
    return 100 * (sequence + 1) + position


def put(state, plan, news):
    """Get the states of all layers, and put `news`, by layer."""
    seen = []
    for layer, arrays in enumerate(news):
        seen.append(functional.get_states(state, plan, layer))
        state = functional.put_states(state, plan, layer, *arrays)
    return state, seen


def news(backend, ends):
    """New states of all layers, for runs that end so."""
    return [states(backend, layer, [code(*end) for end in ends]) for layer in range(LAYERS)]


def check_seen(backend, seen, starts):
    """What a program was given is the states behind `starts`; zeros at 0."""
    for layer, arrays in enumerate(seen):
        for number, array in enumerate(arrays):
            for row, (sequence, position) in zip(backend.to_host(array), starts, strict=True):
                expected = host_state(backend, layer, code(sequence, position))[number][0]
                assert row.dtype == expected.dtype
                expected = expected if position else np.zeros_like(expected)
                np.testing.assert_array_equal(row.view(np.uint8), expected.view(np.uint8))


def check_held(backend, cache, sequence, positions):
    with cache.snapshot(sequence) as snapshot:
        check_rows(backend, snapshot, {p: code(sequence, p) for p in positions})


def batch_of(starts, tokens=1):
    pairs = [(s, p + i) for s, p in starts for i in range(tokens)]
    return Batch([p for _, p in pairs], [s for s, _ in pairs])


def run_eagerly(backend, cache, starts, tokens=1):
    cache.start_forward(batch_of(starts, tokens))
    for layer, arrays in enumerate(news(backend, [(s, p + tokens) for s, p in starts])):
        cache.set_layer(layer)
        got = cache.get_states()
        if got is not None:
            check_seen(backend, [()] * layer + [got], starts)
        cache.put_states(*arrays)


def test_a_program_sees_what_get_returns(backend, program):
    """Prompts and decode steps, as programs and in between without; every dtype bit for bit."""
    cache, compiled = make(backend), program(put)
    ends = {0: 0, 1: 0, 2: 0}
    for number, (sequences, tokens) in enumerate(
        [([0], 4), ([1, 0], 1), ([0, 1], 1), ([2, 0], 1), ([1, 0], 1)]
    ):
        starts = [(s, ends[s]) for s in sequences]
        ends |= {s: p + tokens for s, p in starts}
        if number == 2:
            run_eagerly(backend, cache, starts, tokens)
            continue
        plan = cache.plan(batch_of(starts, tokens))
        fresh = news(backend, [(s, ends[s]) for s in sequences])
        cache.program_state, seen = compiled(cache.program_state, plan, fresh)
        check_seen(backend, seen, starts)
        for sequence, end in ends.items():
            assert cache.next_position(sequence) == end
            check_held(backend, cache, sequence, [end] if end else [])


def test_steps_go_on_from_one_another(backend):
    """Each step reads what the one before wrote; scheduled ends are kept."""
    cache = make(backend)
    run_eagerly(backend, cache, [(0, 0), (1, 0)], 2)
    cache.schedule(0, [2, 4, 5, 9])
    plans, state = cache.plan_steps(batch_of([(1, 2), (0, 2)]), 5), cache.program_state
    for step in range(5):
        plan = nth(plans, step)
        state, seen = put(state, plan, news(backend, [(1, 3 + step), (0, 3 + step)]))
        check_seen(backend, seen, [(1, 2 + step), (0, 2 + step)])
    assert cache.next_position(0) == 2  # until the state comes back
    cache.program_state = state
    check_held(backend, cache, 0, [2, 4, 5, 7])
    check_held(backend, cache, 1, [7])
    run_eagerly(backend, cache, [(0, 7), (1, 7)])


def test_a_draft_of_several_steps(backend):
    cache = make(backend)
    run_eagerly(backend, cache, [(0, 0), (1, 0)], 2)
    cache.schedule(0, [4])
    cache.checkpoint(0)
    plans, state = cache.plan_steps(batch_of([(1, 2), (0, 2)]), 4), cache.program_state
    for step in range(4):
        state, _ = put(state, nth(plans, step), news(backend, [(1, 3 + step), (0, 3 + step)]))
    cache.program_state = state
    with cache.snapshot(0) as snapshot:
        check_rows(backend, snapshot, {p: code(0, p) for p in (4, 6)})
    cache.remove(0, 5)
    check_held(backend, cache, 0, [4, 5])
    run_eagerly(backend, cache, [(0, 5), (1, 6)])
    cache.checkpoint(0)
    plans = cache.plan_steps(batch_of([(0, 6)]), 2)
    cache.checkpoint(0)  # behind the steps that are planned: they are none of a draft
    state = cache.program_state
    for step in range(2):
        state, _ = put(state, nth(plans, step), news(backend, [(0, 7 + step)]))
    cache.program_state = state
    check_held(backend, cache, 0, [4, 8])
    plan = cache.plan(batch_of([(0, 8)]))  # no state inside of a planned pass, but in front of it
    cache.program_state, _ = put(cache.program_state, plan, news(backend, [(0, 9)]))
    cache.remove(0, 8)
    check_held(backend, cache, 0, [4, 8])


def nth(plan, i):
    """One step of a plan of several. Array-API indexing names every axis."""
    likes = {
        layer: {number: like[i, ...] for number, like in own.items()}
        for layer, own in plan.likes.items()
    }
    return functional.StatePlan(plan.before[i, ...], plan.behind[i, ...], likes)


def test_plans_after_one_another_need_two_slots(backend):
    """Any number of passes is planned ahead, and taken back as a whole."""
    cache = make(backend, resume_points=1, max_sequences=1, max_batch=1)
    run_eagerly(backend, cache, [(0, 0)], 3)
    state = cache.program_state
    for position in range(3, 9):
        plan = cache.plan(batch_of([(0, position)]))
        state, seen = put(state, plan, news(backend, [(0, position + 1)]))
        check_seen(backend, seen, [(0, position)])
    assert cache.next_position(0) == 3
    cache.program_state = state
    check_held(backend, cache, 0, [9])
    cache.plan(batch_of([(0, 9)]))
    cache.plan(batch_of([(0, 10)]))
    cache.abort()
    check_held(backend, cache, 0, [9])
    run_eagerly(backend, cache, [(0, 9)])


def test_what_is_scheduled_too_late_is_not_kept():
    """The state behind a planned pass was for the next one only, and is overwritten."""
    cache = make()
    run_eagerly(NUMPY, cache, [(0, 0)], 2)
    state = cache.program_state
    for position in range(2, 6):
        plan = cache.plan(batch_of([(0, position)]))
        cache.schedule(0, [position, position + 1] if position != 4 else [])
        state, _ = put(state, plan, news(NUMPY, [(0, position + 1)]))
    cache.program_state = state
    check_held(NUMPY, cache, 0, [3, 4, 6])


def test_a_sequence_that_was_removed_disturbs_no_planned_pass():
    cache = make(resume_points=2)
    run_eagerly(NUMPY, cache, [(0, 0), (1, 0)], 2)
    state, plans = cache.program_state, [cache.plan(batch_of([(0, 2), (1, 2)]))]
    cache.remove(1, 0)
    plans += [cache.plan(batch_of([(0, position)])) for position in (3, 4, 5)]
    for position, plan in enumerate(plans, 3):
        ends = [(0, position), (1, 3)][: len(plan.before)]
        state, seen = put(state, plan, news(NUMPY, ends))
        check_seen(NUMPY, seen, [(0, position - 1), (1, 2)][: len(ends)])
    cache.program_state = state
    check_held(NUMPY, cache, 0, [6])
    assert cache.next_position(1) == 0


def test_a_failed_program_is_planned_again():
    cache = make()
    run_eagerly(NUMPY, cache, [(0, 0)], 3)
    state, _ = put(cache.program_state, cache.plan(batch_of([(0, 3)])), news(NUMPY, [(0, 4)]))
    plan = cache.plan(batch_of([(0, 4)]))
    functional.put_states(state, plan, 0, *states(NUMPY, 0, [1]))  # and fails
    plan = cache.plan(batch_of([(0, 4)]))
    state, seen = put(state, plan, news(NUMPY, [(0, 5)]))
    check_seen(NUMPY, seen, [(0, 4)])
    cache.program_state = state
    check_held(NUMPY, cache, 0, [5])


def test_steps_are_planned_again_from_the_first_only():
    cache = make()
    run_eagerly(NUMPY, cache, [(0, 0)], 3)
    cache.plan_steps(batch_of([(0, 3)]), 4)
    with pytest.raises(ValueError, match=r"the next token of sequence 0 is 3; got 5"):
        cache.plan(batch_of([(0, 5)]))
    plan = cache.plan(batch_of([(0, 7)]))
    cache.plan_steps(batch_of([(0, 3)]), 2)
    plan = cache.plan(batch_of([(0, 3)]))
    cache.program_state, seen = put(cache.program_state, plan, news(NUMPY, [(0, 4)]))
    check_seen(NUMPY, seen, [(0, 3)])
    check_held(NUMPY, cache, 0, [4])


def test_padding_repeats_the_last_run(backend, program):
    cache = make(backend)
    run_eagerly(backend, cache, [(0, 0), (1, 0)], 2)
    plan = cache.plan(batch_of([(0, 2), (1, 2)]), tokens=4)
    fresh = news(backend, [(0, 3), (1, 3), (1, 3), (1, 3)])
    cache.program_state, seen = program(put)(cache.program_state, plan, fresh)
    check_seen(backend, seen, [(0, 2), (1, 2), (1, 2), (1, 2)])
    check_held(backend, cache, 0, [3])
    check_held(backend, cache, 1, [3])
    with pytest.raises(NotSupportedError, match=r"decode steps.*got 4 tokens of 2 sequences"):
        cache.plan(batch_of([(0, 3), (1, 3)], 2), tokens=8)
    run_eagerly(backend, cache, [(0, 3), (1, 3)])


def test_others_change_while_a_program_runs(backend):
    """A copy, a removal and a snapshot see no token of the programs; these change nothing of it."""
    cache = make(backend)
    cache.schedule(0, [1])
    run_eagerly(backend, cache, [(0, 0), (1, 0)], 2)
    host = cache.snapshot(0).to_host()
    plans, state = cache.plan_steps(batch_of([(0, 2), (1, 2)]), 3), cache.program_state
    cache.copy_prefix(0, 2, 2)
    resident = cache.snapshot(0)
    cache.remove(1, 0)
    cache.restore(1, resident)
    cache.remove(2, 0)
    with pytest.raises(KVCacheError, match=r"a program has the states of this cache"):
        cache.restore(2, host)
    for step in range(3):
        state, _ = put(state, nth(plans, step), news(backend, [(0, 3 + step), (1, 3 + step)]))
    cache.program_state = state
    check_held(backend, cache, 0, [5])
    with cache.snapshot(1) as other:
        check_rows(backend, other, {2: code(0, 2)})
    check_rows(backend, resident, {2: code(0, 2)})
    cache.restore(2, host)
    check_held(backend, cache, 0, [5])


def test_what_was_planned_is_not_put(backend):
    cache = make(backend)
    run_eagerly(backend, cache, [(0, 0)], 2)
    cache.plan(batch_of([(0, 2)]))
    for call in (cache.get_states, lambda: cache.put_states(*states(backend, 1, [1]))):
        with pytest.raises(KVCacheError, match="this pass was planned, and a program has its"):
            call()
    run_eagerly(backend, cache, [(0, 2)])  # which takes the plan back


def test_a_plan_of_no_layers():
    cache = make(allocated=False)
    with pytest.raises(KVCacheError, match=r"there are none\. Call allocate"):
        cache.plan(batch_of([(0, 0)]))
    with pytest.raises(KVCacheError, match=r"there are none\. Call allocate"):
        cache.plan_steps(batch_of([(0, 0)]), 2)
    assert peek.free_slots(cache) == 3 + 3 + 8
    cache.start_forward(batch_of([(0, 0)]), reserve=True)
    with pytest.raises(NotSupportedError, match="a reserve pass has no plan"):
        cache.plan()


def test_plans_that_do_not_fit_change_nothing():
    cache = make(resume_points=0, max_sequences=2, max_batch=1)
    run_eagerly(NUMPY, cache, [(0, 0)])
    run_eagerly(NUMPY, cache, [(1, 0)])
    before = peek.free_slots(cache)
    with pytest.raises(CacheFullError, match="2 needed, 1 of 3 free"):
        cache.plan(batch_of([(0, 1), (1, 1)]))
    with pytest.raises(CacheFullError, match="2 needed, 1 of 3 free"):
        cache.plan_steps(batch_of([(0, 1), (1, 1)]), 3)
    for batch, message in [
        (Batch([1, 2], [0, 0]), "one token per sequence"),
        (Batch([2], [0]), "is 1; got 2"),
        (Batch([0], [5]), r"sequence ids must lie in \[0, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            cache.plan_steps(batch, 2)
    assert peek.free_slots(cache) == before
    assert cache.next_position(0) == 1


def test_states_of_another_form():
    cache = make()
    plan, state = cache.plan(batch_of([(0, 0), (1, 0)])), cache.program_state
    matrix, last = states(NUMPY, 0, [1, 2])
    for arrays in [(), (matrix,), (matrix[:1], last), (matrix[:, :2], last)]:
        with pytest.raises(ShapeError, match="states of layer 0 have the shapes"):
            functional.put_states(state, plan, 0, *arrays)
    with pytest.raises(DTypeError, match=r"states of layer 0 are .*Cast the arrays"):
        functional.put_states(state, plan, 0, matrix.view(np.int32), last)
    with pytest.raises(KVCacheError, match="layer 7 has no buffers"):
        functional.get_states(state, plan, 7)
    for other in [{}, {0: state[0]}, {**state, 1: tuple(a[:1] for a in state[1])}]:
        with pytest.raises(ShapeError, match="a state to import has the layers, shapes and dtypes"):
            cache.program_state = other
    with pytest.raises(ShapeError, match="keep the number, shapes and dtypes of the first"):
        cache.allocate([0], ((3, 4), "float32"))
    with pytest.raises(ShapeError, match="a state is one array or more"):
        cache.allocate([5])
    with pytest.raises(DTypeError, match="no dtype 'float12'"):
        cache.allocate([5], ((3, 4), "float12"))
    assert sorted(cache.program_state) == [0, 1]


def test_a_consumed_state_is_refused():
    jax = pytest.importorskip("jax")
    backend = get_backend("jax:cpu")
    cache = make(backend)
    program, old = jax.jit(put, donate_argnums=0), cache.program_state
    state, _ = program(old, cache.plan(batch_of([(0, 0)])), news(backend, [(0, 1)]))
    with pytest.raises(StateError, match="arrays of this state were consumed"):
        cache.program_state = old
    with pytest.raises(KVCacheError, match="a program has the states of this cache"):
        cache.copy()
    cache.program_state = state
    check_held(backend, cache, 0, [1])


# In a wrapper.


def hybrid(backend, max_sequences=2):
    cache = WrapperCache(RecurrentCache(4), CausalCache(window=4), CausalCache())
    cache.init(backend, max_sequences=max_sequences, capacity=32, max_batch=8)
    recurrent, *others = cache.caches
    recurrent.allocate([0, 1], ((2,), "float32"))
    for other in others:
        other.allocate([0], 1, 2)
    return cache


def hybrid_step(states, plans, x):
    """A model: two recurrent layers, then a windowed one and a full one. x: [tokens, 2]."""
    (recurrent, *pools), (runs, *passes) = states, plans
    for layer in range(2):
        [held] = functional.get_states(recurrent, runs, layer)
        x = x + 0.5 * held
        recurrent = functional.put_states(recurrent, runs, layer, x)
    after = []
    for pool, plan in zip(pools, passes, strict=True):
        written = functional.put(pool, plan, 0, x[None, :, :], x[None, :, :])
        keys, _, mask = functional.get(written, plan, 0)
        weights = mask + 0 * x[:, :1]  # the mask, as numbers
        # No matrix product: on a GPU it may be of less than float32.
        x = x + 0.1 * (weights[:, :, None] * keys[0, :, :][None]).sum(1)
        after.append(written)
    return (recurrent, *after), x


def eager_steps(backend, cache, steps, x):
    """The same model, without programs."""
    for position in range(steps):
        cache.start_forward(Batch([position] * 2, [0, 1]))
        for layer in range(2):
            cache.set_layer_type(0)
            cache.set_layer(layer)
            held = cache.get_states()
            x = x if held is None else x + 0.5 * held[0]
            cache.put_states(x)
        for kind in (1, 2):
            cache.set_layer_type(kind)
            cache.set_layer(0)
            cache.put(x[None, :, :], x[None, :, :])
            keys, _, mask = cache.get()
            x = x + 0.1 * backend.from_host(
                backend.to_host(mask).astype(np.float32) @ backend.to_host(keys)[0]
            )
        x = x * 0.5
    return x


def start(backend):
    return backend.from_host(np.array([[1, 2], [3, -1]], np.float32))


def test_a_hybrid_decodes_in_a_program(backend, program):
    if backend.name == "array_api":
        pytest.skip("the model above is written with the operators of other frameworks")
    cache, plain = hybrid(backend), hybrid(backend)
    expected, x, compiled = eager_steps(backend, plain, 6, start(backend)), start(backend), None
    compiled = program(hybrid_step)
    for position in range(6):
        plans = cache.plan(Batch([position] * 2, [0, 1]))
        cache.program_state, x = compiled(cache.program_state, plans, x)
        x = x * 0.5
        assert {part.next_position(1) for part in cache.caches} == {position + 1}
    np.testing.assert_allclose(backend.to_host(x), backend.to_host(expected), rtol=1e-5)


def test_a_hybrid_scans_over_steps():
    jax = pytest.importorskip("jax")
    backend = get_backend("jax:cpu")
    cache, plain = hybrid(backend), hybrid(backend)
    cache.schedule(0, [3])
    expected = eager_steps(backend, plain, 6, start(backend))

    def body(carry, plans):
        states, x = hybrid_step(carry[0], plans, carry[1])
        return (states, x * 0.5), None

    @jax.jit
    def decode(states, plans, x):
        return jax.lax.scan(body, (states, x), plans)[0]

    plans = cache.plan_steps(Batch([0, 0], [0, 1]), 6)
    assert cache.next_position(0) == 0
    cache.program_state, x = decode(cache.program_state, plans, start(backend))
    np.testing.assert_allclose(x, expected, rtol=1e-5)
    assert [part.next_position(0) for part in cache.caches] == [6, 6, 6]
    assert [p for p in range(8) if cache.caches[0].can_resume(0, p)] == [0, 3, 6]
    cache.abort()  # nothing is left to be taken back
    assert cache.next_position(1) == 6


def test_a_hybrid_plans_in_all_parts_or_in_none(monkeypatch):
    cache = hybrid(NUMPY)
    eager_steps(NUMPY, cache, 2, start(NUMPY))
    last, full = cache.caches[2], CacheFullError("none is left")

    def fail(*args):
        raise full

    for method, plan in [
        ("prepare_forward", lambda: cache.plan(Batch([2, 2], [0, 1]))),
        ("plan_begun", lambda: cache.plan(Batch([2, 2], [0, 1]))),
        ("begin_steps", lambda: cache.plan_steps(Batch([2, 2], [0, 1]), 2)),
    ]:
        with monkeypatch.context() as patched:
            patched.setattr(last, method, fail)
            with pytest.raises(CacheFullError):
                plan()
        assert not cache.has_plans()
        assert cache.pass_complete()
        assert [part.next_position(0) for part in cache.caches] == [2, 2, 2]
    cache.plan(Batch([2, 2], [0, 1]))
    with pytest.raises(ShapeError, match="a wrapper of 3 caches has as many states; got 1"):
        cache.program_state = cache.program_state[:1]
    with pytest.raises(ShapeError, match="a state to import"):
        cache.program_state = (*cache.program_state[:2], {})
    assert cache.has_plans()
    assert cache.next_position(0) == 2


def test_a_wrapper_with_a_part_without_plans():
    cache = WrapperCache(RecurrentCache(), EncoderCache())
    cache.init("numpy", capacity=8, max_batch=4)
    for call in (lambda: cache.plan(Batch([0], [0])), lambda: cache.program_state):
        with pytest.raises(NotSupportedError, match=r"EncoderCache has none\. Call start_forward"):
            call()
