"""Recurrent layers in compiled programs: what a program returns is what the same steps give."""

import numpy as np
import pytest

from kvcache import (
    DTypeError,
    ExportedError,
    KVCacheError,
    ShapeError,
    StateCache,
    StateError,
    functional,
)

from ..layers.state_oracle import host_arrays

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
LAST = "bfloat16"


def start(backend):
    dtype = LAST if LAST in backend.dtypes else "float32"
    matrix = backend.from_host(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    return matrix, backend.from_host(np.ones((2, 5), np.float32), dtype)


def rule(matrix, last):
    """One token: exact in every framework."""
    return matrix * 0.5 + 1, last + last


def stepper(tokens):
    def step(state):
        return functional.advance(state, tokens, *rule(*state.arrays))

    return step


def filled(backend, tokens=3):
    cache = StateCache(backend)
    cache.advance(tokens, *start(backend))
    return cache


def expected(backend, steps):
    arrays = start(backend)
    for _ in range(steps):
        arrays = rule(*arrays)
    return host_arrays(backend, arrays)


def check(cache, steps, offset):
    assert cache.offset == offset
    for got, wanted in zip(
        host_arrays(cache.backend, cache.state), expected(cache.backend, steps), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("tokens", [1, 4])
def test_program_is_advance(backend, program, tokens):
    cache, step = filled(backend), program(stepper(tokens))
    state = cache.export_state()
    for _ in range(4):
        state = step(state)
    cache.import_state(state)
    check(cache, 4, 3 + 4 * tokens)
    cache.advance(1, *rule(*cache.state))
    check(cache, 5, 4 + 4 * tokens)


def run_consuming(cache, step):
    """Let a program take a step, and spoil what it was given, as programs may."""
    backend, state = cache.backend, cache.export_state(16)
    after = step(state)
    for array in state.arrays:
        if not backend.is_deleted(array):
            zeros = backend.alloc(array.shape, backend.dtype_name(array))
            backend.slice_update(array, zeros, 0, 0)
    cache.import_state(after)


def test_a_program_consumes_no_resume_point(backend, program):
    cache, step = filled(backend), program(stepper(2))
    nbytes = cache.nbytes
    cache.schedule([3])
    state = cache.export_state()
    assert cache.nbytes == 2 * nbytes
    cache.import_state(state)
    run_consuming(cache, step)
    check(cache, 1, 5)
    assert cache.kept == (3, 5)
    cache.trim(2)
    check(cache, 0, 3)


def test_a_program_consumes_no_state_of_a_copy(backend, program):
    cache, step = filled(backend), program(stepper(2))
    twin = cache.copy()
    run_consuming(cache, step)
    check(cache, 1, 5)
    check(twin, 0, 3)
    run_consuming(twin, step)
    check(twin, 1, 5)


def test_a_program_consumes_no_state_gone_back_to(backend, program):
    cache, step = filled(backend), program(stepper(2))
    twin = cache.copy()
    cache.checkpoint()
    cache.advance(4, *rule(*cache.state))
    cache.rollback()
    run_consuming(cache, step)
    check(cache, 1, 5)
    check(twin, 0, 3)


def test_a_program_consumes_no_state_of_a_snapshot(backend, program):
    cache, step = filled(backend), program(stepper(2))
    cache.checkpoint()
    snapshot = cache.snapshot()
    run_consuming(cache, step)
    check(cache, 1, 5)
    assert snapshot.resident
    restored = StateCache(backend)
    restored.restore(snapshot)
    check(restored, 0, 3)
    with pytest.raises(KVCacheError, match="open checkpoint"):
        cache.rollback()


def go_on(cache):
    """Take a token that leaves the second array as it is."""
    matrix, last = cache.state
    cache.advance(1, rule(matrix, last)[0], last)


def check_gone_on(cache, offset, tokens, steps=0):
    """`tokens` that left the second array as it is, and then so many steps of a program."""
    backend, (matrix, last) = cache.backend, start(cache.backend)
    for _ in range(tokens):
        matrix, _ = rule(matrix, last)
    for _ in range(steps):
        matrix, last = rule(matrix, last)
    assert cache.offset == offset
    got, wanted = (host_arrays(backend, arrays) for arrays in (cache.state, (matrix, last)))
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_program_consumes_no_kept_state_that_shares_an_array(backend, program):
    cache, step = filled(backend), program(stepper(2))
    cache.schedule([3, 4])
    for _ in range(3):
        go_on(cache)
    run_consuming(cache, step)
    check_gone_on(cache, 8, 3, steps=1)
    assert cache.kept == (3, 4, 8)
    cache.trim(4)
    check_gone_on(cache, 4, 1)
    cache.trim(1)
    check(cache, 0, 3)


def test_a_program_consumes_no_state_of_a_copy_that_shares_an_array(backend, program):
    cache, step = filled(backend), program(stepper(2))
    twin = cache.copy()
    for _ in range(2):
        go_on(cache)
    third = cache.copy()
    run_consuming(cache, step)
    check_gone_on(cache, 7, 2, steps=1)
    go_on(third)
    run_consuming(third, step)
    check_gone_on(third, 8, 3, steps=1)
    go_on(twin)
    check_gone_on(twin, 4, 1)
    run_consuming(twin, step)
    check_gone_on(twin, 6, 1, steps=1)


def test_a_program_consumes_no_state_of_a_snapshot_that_shares_an_array(backend, program):
    cache, step = filled(backend), program(stepper(2))
    snapshot = cache.snapshot()
    go_on(cache)
    run_consuming(cache, step)
    check_gone_on(cache, 6, 1, steps=1)
    assert snapshot.resident
    restored = StateCache(backend)
    restored.restore(snapshot)
    check(restored, 0, 3)


def test_an_array_that_is_twice_in_a_state_is_two_in_a_program(backend, program):
    cache, array = StateCache(backend), start(backend)[0]
    cache.advance(3, array, array)
    state = cache.export_state()
    assert state.arrays[0] is not state.arrays[1]
    cache.import_state(state)
    run_consuming(cache, program(stepper(1)))
    expected = host_arrays(backend, rule(*[start(backend)[0]] * 2))
    for got, wanted in zip(host_arrays(backend, cache.state), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("order", [1, -1])
def test_a_program_consumes_no_state_on_another_backend(backend, program, order):
    """Frameworks may share the memory of a copy."""
    first = filled(backend)
    caches = [first, first.to_backend(backend), first.to_backend("numpy")]
    caches.append(caches[2].to_backend(backend))
    for cache in caches[::order]:
        run_consuming(cache, program(stepper(1)) if cache.backend is backend else stepper(1))
    for cache in caches:
        check(cache, 1, 4)


def test_a_cache_is_locked_while_a_program_has_its_state(backend):
    cache = filled(backend)
    before = cache.nbytes
    state = cache.export_state()
    assert (cache.offset, cache.nbytes, cache.dtype is None) == (3, before, False)
    assert not cache.can_trim(0)
    calls = [
        lambda: cache.advance(1, *start(backend)),
        lambda: cache.cuts(3),
        lambda: cache.record(4, *start(backend)),
        lambda: cache.state,
        lambda: cache.kept,
        lambda: cache.trim(0),
        cache.rollback,
        lambda: cache.schedule([9]),
        cache.checkpoint,
        cache.copy,
        cache.snapshot,
        cache.export_state,
        cache.to_layer,
        lambda: cache.to_backend("numpy"),
    ]
    for call in calls:
        with pytest.raises(ExportedError, match=r"Call import_state\(state\)"):
            call()
    cache.import_state(state)
    check(cache, 0, 3)
    with pytest.raises(StateError, match="this exported none"):
        cache.import_state(state)
    cache.export_state()
    cache.reset()
    assert (cache.offset, cache.nbytes, cache.state) == (0, 0, ())


def test_refusals(backend):
    with pytest.raises(KVCacheError, match=r"goes on from a state; got none\. Prefill"):
        StateCache(backend).export_state()
    cache, other = filled(backend), filled(backend)
    state, half = cache.export_state(), backend.slice(start(backend)[0], 0, 1, 0)
    back = state._replace(offset=backend.from_host(np.asarray(2), "int32"))
    for wrong, error, match in [
        (other.export_state(), StateError, "of another cache, or of an earlier export"),
        (back, StateError, r"exported at 3, got offset 2\. Change it by functional"),
        (state._replace(arrays=state.arrays[:1]), ShapeError, r"arrays\[0\], arrays\[1\], offset"),
        (state._replace(arrays=(half, state.arrays[1])), ShapeError, "shape of the exported"),
        (state._replace(arrays=(state.arrays[0],) * 2), ShapeError, "shape of the exported"),
        ("nothing", StateError, "exported a RecurrentState; got str"),
    ]:
        with pytest.raises(error, match=match):
            cache.import_state(wrong)
    integers = backend.from_host(np.ones((2, 5)), "int32")
    with pytest.raises(DTypeError, match="dtype of the exported one"):
        cache.import_state(state._replace(arrays=(state.arrays[0], integers)))
    with pytest.raises(DTypeError, match=r"keeps its dtypes, .*Cast the arrays"):
        functional.advance(state, 1, state.arrays[0], integers)
    with pytest.raises(ShapeError, match="keeps its shapes"):
        functional.advance(state, 1, *state.arrays[:1])
    with pytest.raises(ValueError, match="tokens must be >= 1; got 0"):
        functional.advance(state, 0, *state.arrays)
    cache.import_state(state)
    check(cache, 0, 3)


@pytest.mark.one_backend(name="jax")
def test_an_exported_state_is_donated_and_a_consumed_one_refused():
    jax = pytest.importorskip("jax")
    cache = StateCache("jax")
    cache.advance(3, *start(cache.backend))
    state = cache.export_state()
    after = jax.jit(stepper(1), donate_argnums=0)(state)
    assert state.arrays[0].is_deleted()
    with pytest.raises(StateError, match=r"consumed this state: arrays\[0\] is deleted"):
        cache.import_state(state)
    cache.import_state(after)
    check(cache, 1, 4)


@pytest.mark.one_backend(name="jax")
def test_scan():
    jax = pytest.importorskip("jax")
    cache = filled(StateCache("jax").backend)
    step = stepper(1)
    state, _ = jax.lax.scan(lambda state, _: (step(state), None), cache.export_state(), None, 5)
    cache.import_state(state)
    check(cache, 5, 8)
