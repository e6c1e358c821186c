"""Positions, ids and sizes of a pool: every kind of integer means the same, all else is refused."""

import sys

import numpy as np
import pytest

from kvcache import Batch, CausalCache, EncoderCache, PrefixCache, WrapperCache, get_backend

from .. import peek
from .oracle import add_positions, attended, fingerprint, put_tokens

NUMPY = get_backend("numpy")
NO_INTEGERS = (1.0, np.float32(1), "1", None, [1], np.array([1, 2]), np.bool_(True))
NO_LIMIT = (2**31 - 1, 2**31, 2**32 + 3, sys.maxsize, np.uint64(2**64 - 1), np.int64(2**62))


def kinds(backend):
    """Ways to say an integer."""
    return (int, np.int8, np.uint8, np.uint16, np.uint64, np.array, as_array(backend))


def as_array(backend):
    return lambda number: backend.from_host(np.asarray(number), "int32")


def make(max_sequences=3, **limits):
    cache = CausalCache(shift=add_positions(NUMPY), **limits)
    cache.init(NUMPY, max_sequences=max_sequences, capacity=32, max_batch=16)
    return cache


def store(cache, positions, sequence=0):
    positions = list(positions)
    cache.start_forward(Batch(positions, [sequence] * len(positions)))
    put_tokens(NUMPY, cache, positions, positions)


def filled(**limits):
    cache = make(**limits)
    store(cache, range(12))
    return cache


CALLS = {
    "remove": lambda cache, n: cache.remove(n(0), n(3), n(6)),
    "remove to the end": lambda cache, n: cache.remove(n(0), n(9)),
    "copy_prefix": lambda cache, n: cache.copy_prefix(n(0), n(1), n(5)),
    "can_resume": lambda cache, n: [cache.can_resume(n(0), n(p)) for p in (0, 2, 12, 13)],
    "next_position": lambda cache, n: cache.next_position(n(0)),
    "snapshot": lambda cache, n: repr(cache.snapshot(n(0), n(2), n(7))),
    "schedule": lambda cache, n: cache.schedule(n(0), [n(14), n(15)]),
    "allocate": lambda cache, n: cache.allocate([n(7)], n(2), n(3), n(4)),
    "plan": lambda cache, n: cache.plan(tokens=n(16)).mask.shape,
    "plan_steps": lambda cache, n: cache.plan_steps(Batch([12], [0]), n(3)).mask.shape,
    "set_layer": lambda cache, n: (cache.set_layer(n(1)), cache.get()[1]),
    "set_causal": lambda cache, n: (cache.set_causal([n(1), n(4)]), attended(NUMPY, cache, 0)),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_kind_of_integer_means_the_same(backend, name):
    call, expected = CALLS[name], None
    for kind in kinds(backend):
        cache = filled(window=8, memory=12)
        outcome = call(cache, kind), fingerprint(cache)[:3]
        expected = expected or outcome
        assert repr(outcome) == repr(expected), kind


@pytest.mark.parametrize("bad", NO_INTEGERS, ids=repr)
@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"remove to the end", "set_causal"}))
def test_what_is_no_integer_is_refused_by_name(name, bad):
    if bad is None and name in ("remove", "plan", "snapshot"):
        bad = 1.5  # there None means something
    cache = filled(window=8, memory=12)
    before = fingerprint(cache)
    with pytest.raises(TypeError, match=r"must be an integer; got|must be a list of integers; got"):
        CALLS[name](cache, lambda number: bad)
    assert fingerprint(cache) == before


def test_ids_without_a_sequence():
    encoder = EncoderCache()
    encoder.init("numpy", max_sequences=2)
    for cache in (filled(), encoder):
        for call in (cache.next_position, lambda s, c=cache: c.can_resume(s, 0)):
            for sequence in (-1, 3):
                with pytest.raises(ValueError, match="sequence ids must lie in"):
                    call(sequence)


def test_positions_from_arrays(backend):
    """A schedule or a list of layers may be an array; a mask is not a list of positions."""
    cache, array = filled(window=2), as_array(backend)
    cache.schedule(0, array([13, 14]))
    cache.allocate(array([5, 6]), 1, 2)
    assert {5, 6} <= set(peek.layers(cache))
    with pytest.raises(TypeError, match="positions must be a list of integers; got bools"):
        cache.schedule(0, np.array([True, False]))
    with pytest.raises(TypeError, match=r"each of positions must be an integer; got 1\.5"):
        cache.schedule(0, [1.5])


# Tokens that see ahead.


def ahead(indices):
    """Batch indices of the tokens that see the whole batch."""
    cache = make()
    store(cache, range(5))
    cache.set_causal(indices)
    return [token for token, seen in enumerate(attended(NUMPY, cache, 0)[:4]) if len(seen) == 5]


def test_tokens_that_see_ahead_are_named_by_any_list(backend):
    array = backend.from_host
    mask = np.array([False, True, True, False, False])
    for indices in (
        [1, 2],
        (2, 1),
        {1, 2},
        range(1, 3),
        iter([1, 2]),
        np.array([1, 2], np.uint8),
        array(np.array([1, 2], np.int32)),
        mask,
        mask.tolist(),
        array(mask),
    ):
        assert ahead(indices) == [1, 2], indices
    assert ahead([]) == ahead(np.zeros(5, bool)) == []


@pytest.mark.parametrize(
    "indices", [[7], [-2], [1.0], [True, False], np.array([[1]]), "1", None, 1, ["a"]], ids=repr
)
def test_tokens_that_are_not_in_the_batch(indices):
    cache = make()
    store(cache, range(5))
    before = fingerprint(cache)
    for call in (cache.set_causal, lambda i: Batch(range(5), [0] * 5, i)):
        with pytest.raises(ValueError, match="holds batch indices, 0 to 4; got"):
            call(indices)
    assert fingerprint(cache) == before


def test_a_mask_of_multimodal_tokens():
    assert Batch([0, 1, 2], [0, 1, 1], [False, True, False]).multimodal == (1,)


# Limits.


@pytest.mark.parametrize("limit", NO_LIMIT, ids=repr)
def test_a_huge_limit_is_no_limit(limit):
    limits = [{"window": limit}, {"chunk": limit}, {"window": limit, "chunk": limit}]
    for options in [*limits, {"memory": limit}, {"window": limit, "memory": limit}]:
        cache = filled(**options)
        assert attended(NUMPY, cache, 0)[-1] == [(p, p) for p in range(12)], options
        assert cache.specs == filled().specs
        assert cache.can_resume(0, 12)
        cache.start_forward(Batch([2**31 - 2], [1]))
        put_tokens(NUMPY, cache, [5], [2**31 - 2])
        assert [token for token, _ in attended(NUMPY, cache, 0)[0]] == [5]
    cache = filled(window=3, memory=limit)
    assert peek.table(cache).cells_of(0).size == 12


def test_a_pool_beyond_int32():
    for sizes in ({"capacity": sys.maxsize}, {"capacity": 2**30, "max_sequences": 4}):
        with pytest.raises(ValueError, match=r"a pool has at most 2\*\*31 - 1 tokens"):
            CausalCache().init("numpy", max_batch=4, **sizes)
    CausalCache(window=3).init("numpy", capacity=sys.maxsize, max_batch=4)  # holds few of them


def test_layer_types_and_prefix_arguments(backend):
    array = as_array(backend)
    wrapper = WrapperCache(CausalCache(), CausalCache(window=2))
    wrapper.set_layer_type(array(1))
    assert wrapper.underlying_cache is wrapper.caches[1]
    with pytest.raises(TypeError, match=r"index must be an integer; got 1\.0"):
        wrapper.set_layer_type(1.0)
    cache = make(window=2)
    prefix = PrefixCache(cache, budget=array(10_000), sequences=array([2, 1]))
    media = {(np.uint8(0), np.uint8(2)): "image"}
    with prefix.session(array([5, 5, 6]), media=media, resume_points=array([2])) as session:
        assert session.sequence == 2
        store(cache, range(3), session.sequence)
    refused = (
        ({"budget": 1e9}, "budget must be an integer"),
        ({"sequences": [1.0]}, "each of sequences must be an integer"),
    )
    for options, message in refused:
        with pytest.raises(TypeError, match=message):
            PrefixCache(cache, **options)
    with pytest.raises(TypeError, match="each of resume_points must be an integer"):
        prefix.session([1, 2], resume_points=[1.0])
    with pytest.raises(TypeError, match="the start of a medium must be an integer"):
        prefix.session([1, 2], media={(0.0, 1): "image"})
    assert prefix.stats.active == 0


def sized(cache):
    cache.init("numpy", max_sequences=2, capacity=8, max_batch=8)
    return cache


NAMED = {
    "allocate": ("layers", filled, lambda cache, bad: cache.allocate(bad, 2, 3)),
    "plan": ("tokens", filled, lambda cache, bad: cache.plan(tokens=bad)),
    "next_position": ("sequence", filled, lambda cache, bad: cache.next_position(bad)),
    "schedule of": ("sequence", filled, lambda cache, bad: cache.schedule(bad, [20])),
    "schedule": ("positions", filled, lambda cache, bad: cache.schedule(0, bad)),
}
NAMED_BY_ENCODERS = {
    "set_layer": ("layer", lambda cache, bad: cache.set_layer(bad)),
    "can_resume": ("position", lambda cache, bad: cache.can_resume(0, bad)),
    "can_resume of": ("sequence", lambda cache, bad: cache.can_resume(bad, 0)),
    "schedule of": ("sequence", lambda cache, bad: cache.schedule(bad, [20])),
    "schedule": ("positions", lambda cache, bad: cache.schedule(0, bad)),
}
NAMED |= {
    f"encoder, {name}": (argument, lambda: sized(EncoderCache()), call)
    for name, (argument, call) in NAMED_BY_ENCODERS.items()
}
NAMED["wrapper, schedule"] = (
    "positions",
    lambda: sized(WrapperCache(CausalCache())),
    lambda cache, bad: cache.schedule(0, bad),
)


@pytest.mark.parametrize("name", NAMED)
def test_the_argument_is_named(name):
    argument, make_cache, call = NAMED[name]
    with pytest.raises(TypeError, match=rf"^{argument} must be a[ n]"):
        call(make_cache(), 1.5)
