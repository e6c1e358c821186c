"""Numbers given to per-layer caches: every kind of integer means the same, all else is refused."""

import sys

import numpy as np
import pytest

from kvcache import KVCache, LayerCaches, RotatingKVCache, functional

from .oracle import Oracle, check_columns, check_state, fingerprint, oracle_for, push

NO_LIMIT = (2**31 - 1, 2**31, sys.maxsize, np.uint64(2**64 - 1))
CALLS = {
    "trim": lambda cache, n: cache.trim(n(2)),
    "can_trim": lambda cache, n: cache.can_trim(n(2)),
    "mask": lambda cache, n: np.asarray(cache.backend.to_host(cache.mask(n(2), n(2)))).tolist(),
    "rollback": lambda cache, n: (cache.checkpoint(), cache.rollback(n(0))),
    "snapshot": lambda cache, n: repr(cache.snapshot(n(1), n(3))),
    "schedule": lambda cache, n: cache.schedule([n(5), n(6)]),
    "export_state": lambda cache, n: cache.export_state(n(2)).keys.shape,
    "stack": lambda cache, n: LayerCaches([cache]).trim(n(1)),
    "constructor": lambda cache, n: repr(RotatingKVCache(n(4), n(1), "numpy", n(8))),
}


def used(backend, kind=KVCache):
    cache = kind(backend=backend)
    oracle = oracle_for(cache)
    push(cache, oracle, 4)
    return cache, oracle


@pytest.mark.parametrize("name", CALLS)
def test_every_kind_of_integer_means_the_same(backend, name):
    outcomes = set()
    array = lambda number: backend.from_host(np.asarray(number), "int32")  # noqa: E731
    for kind in (int, np.uint8, np.int64, np.array, array):
        cache, _ = used(backend)
        outcomes.add(repr((CALLS[name](cache, kind), cache.offset)))
    assert len(outcomes) == 1


@pytest.mark.parametrize("bad", [1.0, np.float32(1), "1", [1], np.bool_(True)], ids=repr)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_integer_is_refused_by_name(name, bad):
    cache, _ = used("numpy")
    before = fingerprint(cache)
    with pytest.raises(TypeError, match=r"must be an integer; got"):
        CALLS[name](cache, lambda number: bad)
    assert fingerprint(cache) == before


def oracle_of(keep):
    return Oracle(2**40, min(keep, 2**31))


def test_a_huge_step_of_a_ring_is_the_ring(backend):
    cache, oracle = RotatingKVCache(4, backend=backend, step=sys.maxsize), Oracle(4)
    push(cache, oracle, 3)
    push(cache, oracle, 3)


@pytest.mark.parametrize("limit", NO_LIMIT, ids=repr)
def test_a_huge_ring_never_turns(backend, limit):
    for keep in (0, 2, int(limit) - 1):
        cache, oracle = RotatingKVCache(limit, keep, backend), oracle_of(keep)
        for tokens in (3, 1, 5):
            columns = push(cache, oracle, tokens)
        check_state(cache, oracle)
        check_columns(cache, oracle, columns, 2, window=limit)
        state = cache.export_state(1)
        hidden = backend.to_host(functional.mask(state, 1, limit))[0]
        assert np.count_nonzero(hidden) == 9


def test_a_window_in_a_program_is_a_host_integer(backend):
    cache, _ = used(backend)
    state = cache.export_state(2)
    for window, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="window must be"):
            functional.mask(state, 1, window)
    for tokens, error in ((0, ValueError), (10**6, ValueError), (2**70, ValueError)):
        with pytest.raises(error, match=r"tokens must be >= 1|mask covers 1 to"):
            functional.mask(state, tokens)
    for name in (None, [[1.0]], 3):
        with pytest.raises(ValueError, match="must be arrays of a framework that has a backend"):
            functional.append(state, name, name)


def test_sizes_that_no_buffer_has():
    with pytest.raises(ValueError, match=r"step must be < 2\*\*31 tokens"):
        KVCache(step=2**31)
    cache, _ = used("numpy")
    for tokens in (-1, 2**31):
        with pytest.raises(ValueError, match=r"tokens must be 0 to 2\*\*31 - 1; got"):
            cache.export_state(tokens)


def test_values_none(backend):
    cache, oracle = used(backend)
    keys = backend.alloc((1, 2, 1, 4), "float32")
    with pytest.raises(TypeError, match="a per-layer cache holds keys and values; got values None"):
        cache.update(keys, None)
    check_state(cache, oracle)


NAMED = {
    "trim": ("tokens", lambda cache, bad: cache.trim(bad)),
    "can_trim": ("tokens", lambda cache, bad: cache.can_trim(bad)),
    "schedule": ("positions", lambda cache, bad: cache.schedule(bad)),
    "schedule all": ("positions", lambda cache, bad: LayerCaches([cache]).schedule(bad)),
    "snapshot from": ("start", lambda cache, bad: cache.snapshot(bad)),
    "snapshot to": ("stop", lambda cache, bad: cache.snapshot(0, bad)),
    "split": ("at", lambda cache, bad: cache.snapshot().split(bad)),
    "needed": ("position", lambda cache, bad: cache.snapshot().needed_at(bad)),
    "restore": ("stop", lambda cache, bad: KVCache("numpy").restore(cache.snapshot(), stop=bad)),
    "empty": ("start", lambda cache, bad: cache.snapshot().empty_like(bad, 2)),
    "empty to": ("stop", lambda cache, bad: cache.snapshot().empty_like(1, bad)),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_argument_is_named(name):
    cache, _ = used("numpy")
    argument, call = NAMED[name]
    with pytest.raises(TypeError, match=rf"^{argument} must be a[ n]"):
        call(cache, 1.5)
