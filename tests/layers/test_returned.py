"""What a cache returns: read-only columns, exact where the name says so, padding of zeros."""

import numpy as np
import pytest

from kvcache import KVCache, RotatingKVCache, functional, get_backend

from ..failing import Failing
from .oracle import Oracle, Shape, check_whole, oracle_for, push

KINDS = {
    "growing": lambda backend: KVCache(backend, step=8),
    "ring": lambda backend: RotatingKVCache(8, 2, backend, step=8),
}


@pytest.fixture(params=KINDS)
def cache(request, backend):
    return KINDS[request.param](backend)


def test_state_has_as_many_columns_as_tokens(cache):
    oracle = oracle_for(cache)
    for tokens in (3, 4, 1, 1, 9):  # 8: the buffers of most backends are full
        push(cache, oracle, tokens)
        assert {part.shape[2] for part in cache.state} == {cache.len}


def test_state_is_an_update_of_another_cache(cache):
    oracle = oracle_for(cache)
    push(cache, oracle, 5)
    other = KVCache(cache.backend)
    other.update(*cache.state)
    assert other.offset == 5
    check_whole(other, Oracle(tokens=oracle.tokens))


@pytest.mark.one_backend(name="mlx")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [5, 8, 12])
def test_changing_what_was_returned_changes_no_cache(kind, tokens):
    """MLX arrays are values: an assignment rebinds the object, also where it is all slots."""
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    cache = KINDS[kind](get_backend("mlx"))
    oracle, backend = oracle_for(cache), cache.backend
    for count in (tokens - 1, 1):
        shape = Shape()
        update = shape.keys(count, oracle.offset), shape.values(count, oracle.offset)
        returned = cache.update(*map(backend.from_host, update))
        for part in (*returned, *cache.state):
            part[...] = 9
        plain, again = KINDS[kind](backend), oracle_for(cache)
        oracle.tokens += pushed(plain, again, count, oracle.offset)
        check_whole(cache, oracle)


def pushed(cache, oracle, tokens, stamp):
    push(cache, oracle, tokens, stamp=stamp)
    return oracle.tokens


@pytest.mark.one_backend(name="mlx")
def test_changing_what_a_program_returned_changes_no_state():
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    cache, oracle = KVCache("mlx", step=8), Oracle()
    push(cache, oracle, 5)
    one = [part[:, :, :1] for part in cache.state]
    state, keys, values = functional.append(cache.export_state(1), *one)
    before = np.array(state.keys)
    keys[...] = 9
    values[...] = 9
    np.testing.assert_array_equal(np.array(state.keys), before)


# Tokens that were taken back.


def poison(backend, tokens):
    """NaN as keys, and infinity as values."""
    shape = Shape()
    keys, values = shape.keys(tokens, 0), shape.values(tokens, 0)
    return backend.from_host(keys * np.nan), backend.from_host(np.full_like(values, np.inf))


def finite(backend, arrays):
    return all(np.isfinite(backend.to_host(array)).all() for array in arrays)


def trim(cache, tokens):
    cache.update(*poison(cache.backend, tokens))
    cache.trim(tokens)


def roll_back(cache, tokens):
    cache.checkpoint()
    cache.update(*poison(cache.backend, tokens))
    cache.rollback()


def go_back_in_a_program(cache, tokens):
    state = cache.export_state(tokens)
    for _ in range(tokens):
        state, _, _ = functional.append(state, *poison(cache.backend, 1))
    cache.import_state(state._replace(offset=state.offset - tokens))


def go_back_and_on_in_a_program(cache, tokens):
    go_back_in_a_program(cache, tokens)
    cache.trim(0)
    trim(cache, 1)


WAYS = [trim, roll_back, go_back_in_a_program, go_back_and_on_in_a_program]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_tokens_taken_back_leave_nothing(backend, way, tokens):
    cache, oracle = KVCache(backend, step=16), Oracle()
    push(cache, oracle, 2)
    way(cache, tokens)
    for _ in range(2):
        push(cache, oracle, 1)
        shape = Shape()
        update = shape.keys(1, oracle.offset), shape.values(1, oracle.offset)
        assert finite(backend, cache.copy().update(*map(backend.from_host, update)))
        assert finite(backend, cache.state)
    columns = cache.update(*[backend.slice(part, 0, 1, 2) for part in cache.state])
    assert finite(backend, columns), "NaN in padding"
    state = cache.export_state(4)
    assert finite(backend, (state.keys, state.values)), "NaN in slots without tokens"
    cache.import_state(state)


@pytest.mark.parametrize("way", [trim, roll_back])
@pytest.mark.parametrize("then", [1, 2, 7])
def test_tokens_taken_back_from_a_ring(backend, way, then):
    """Also where an update brings columns of its own after those of the ring."""
    cache, oracle = RotatingKVCache(6, 1, backend, step=8), Oracle(6, 1)
    push(cache, oracle, 2)
    way(cache, 3)
    copy = cache.copy()
    update = Shape().keys(then, 2), Shape().values(then, 2)
    for one in (cache, copy):
        assert finite(backend, one.update(*map(backend.from_host, update)))
        state = one.export_state(9)
        assert finite(backend, (state.keys, state.values))
        one.import_state(state)


def test_a_move_takes_no_token_along_that_was_taken_back(backend):
    cache, oracle = KVCache("numpy", step=16), Oracle()
    push(cache, oracle, 2)
    trim(cache, 5)
    moved = cache.to_backend(backend)
    one = Shape().keys(1, 2), Shape().values(1, 2)
    assert finite(backend, moved.update(*map(backend.from_host, one)))
    check_whole(cache, oracle)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held", [2, 8])
def test_tokens_of_a_failed_update_leave_nothing(backend, kind, held):
    """Written, but not counted: a framework failed after the write."""
    failing = Failing(backend)
    cache = KINDS[kind](failing.backend)
    push(cache, oracle_for(cache), held)
    for at in range(1, 6):
        with failing.failing(at):
            try:
                cache.update(*poison(failing.backend, 3))
            except MemoryError:
                pass
            else:
                break
        assert cache.offset == held
        assert finite(backend, cache.copy().update(*map(backend.from_host, one_token())))
        assert finite(backend, cache.state)
        state = cache.export_state(4)
        assert finite(backend, (state.keys, state.values))
        cache.import_state(state)


def one_token():
    return Shape().keys(1, 0), Shape().values(1, 0)
