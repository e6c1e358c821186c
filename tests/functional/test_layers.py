"""Per-layer caches in programs: append and mask do what update and mask do."""

import numpy as np
import pytest

from kvcache import (
    BoundsError,
    DTypeError,
    KVCache,
    KVCacheError,
    RotatingKVCache,
    ShapeError,
    functional,
)

# What the compiler of torch imports warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def growing(backend):
    return KVCache(backend, step=4)


def ring(backend):
    return RotatingKVCache(10, 2, backend, step=4)


def tokens(backend, dtype, count, rng):
    return [backend.from_host(rng.normal(size=(2, 3, count, 4)), dtype) for _ in range(2)]


def stepper(count, window=None):
    def step(state, keys, values):
        state, keys, values = functional.append(state, keys, values)
        return state, keys, values, functional.mask(state, count, window)

    return step


def attended(backend, keys, values, mask, positions):
    """Position, key and value of everything that each query sees."""
    keys, values = backend.to_host(keys), backend.to_host(values)
    seen = np.ones((1, positions.size), bool) if mask is None else backend.to_host(mask)
    return [
        {
            int(positions[column]): keys[:, :, column].tobytes() + values[:, :, column].tobytes()
            for column in np.flatnonzero(row)
        }
        for row in seen
    ]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    ("make", "prompt", "count"),
    [(growing, 5, 1), (growing, 5, 3), (ring, 1, 1), (ring, 5, 1), (ring, 14, 1)],
    ids=["growing", "growing by 3", "ring, 1", "ring, 5", "ring, full"],
)
def test_program_is_update(backend, program, make, prompt, count, window):
    dtype = "bfloat16" if "bfloat16" in backend.dtypes else "float32"
    plain, cache, rng = make(backend), make(backend), np.random.default_rng(0)
    news = tokens(backend, dtype, prompt, rng)
    for each in (plain, cache):
        each.update(*news)
    state, step = cache.export_state(12 * count), program(stepper(count, window))
    for _ in range(12):
        news = tokens(backend, dtype, count, rng)
        expected = *plain.update(*news), plain.mask(count, window)
        state, keys, values, mask = step(state, *news)
        assert keys.dtype == news[0].dtype
        got = attended(backend, keys, values, mask, backend.to_host(state.positions))
        assert got == attended(backend, *expected, plain.positions)
    cache.import_state(state)
    assert cache.offset == plain.offset
    news = tokens(backend, dtype, 2, rng)
    got, expected = ((*each.update(*news), each.mask(2, window)) for each in (cache, plain))
    assert attended(backend, *got, cache.positions) == attended(backend, *expected, plain.positions)


@pytest.mark.parametrize("make", [growing, ring])
def test_more_tokens_than_there_is_room_for(backend, program, make):
    """They are not written, over nothing that is there, and giving back tells of it."""
    cache, rng = make(backend), np.random.default_rng(0)
    cache.update(*tokens(backend, "float32", 3, rng))
    state, step = cache.export_state(1), program(stepper(1))
    room = state.keys.shape[2]
    if make is ring and room >= 10:
        pytest.skip(f"{backend.name} pads the ring to all its slots: there is room for any number")
    for _ in range(room - 3):
        state, *_ = step(state, *tokens(backend, "float32", 1, rng))
    before = backend.to_host(state.keys)
    state, *_ = step(state, *tokens(backend, "float32", 1, rng))
    if make is growing:
        np.testing.assert_array_equal(backend.to_host(state.keys), before)
    with pytest.raises(BoundsError, match=f"{room + 1} came, {room} fit"):
        cache.import_state(state)


def test_refusals(backend):
    with pytest.raises(
        KVCacheError, match=r"^a cache has the shape of .*\. Prefill, then export\.$"
    ):
        growing(backend).export_state(1)
    cache, rng = ring(backend), np.random.default_rng(0)
    news = tokens(backend, "float32", 2, rng)
    cache.update(*news)
    state = cache.export_state(4)
    one = [backend.slice(array, 0, 1, 2) for array in news]
    with pytest.raises(ShapeError, match=r"on every axis but 2; got \[2, 3, 1, 4\] for \[2, 3"):
        functional.append(state._replace(values=state.values[:, :, :, :3]), *one)
    with pytest.raises(DTypeError, match=r"this cache holds .*float32; got .*int32"):
        functional.append(state, one[0], backend.from_host(np.ones((2, 3, 1, 4)), "int32"))
    with pytest.raises(ShapeError, match="a ring takes one token at a time; got 2"):
        functional.append(state, *news)
    with pytest.raises(ShapeError, match="has the shape of the exported one"):
        cache.import_state(state._replace(keys=news[0]))
    cache.import_state(state)


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_far_more_tokens_than_there_is_room_for(backend, program, count):
    """A start beyond the buffers is no place in memory."""
    cache, rng = growing(backend), np.random.default_rng(0)
    cache.update(*tokens(backend, "float32", 3, rng))
    state = cache.export_state(1)
    room = state.keys.shape[2]
    step, before = program(stepper(1)), backend.to_host(state.keys)[:, :, :3]
    far = backend.from_host(np.asarray(50 * room), "int32")
    state = functional.append(state._replace(offset=far), *tokens(backend, "float32", count, rng))[
        0
    ]
    state, *_ = step(state, *tokens(backend, "float32", 1, rng))
    np.testing.assert_array_equal(backend.to_host(state.keys)[:, :, :3], before)
    with pytest.raises(BoundsError, match=f"{50 * room + count + 1} came"):
        cache.import_state(state)
