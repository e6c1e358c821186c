"""A mask made before an update is the mask made after it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import KVCache, KVCacheError, RotatingKVCache, functional

from .oracle import Shape


def update_of(backend, tokens):
    shape = Shape(1, 1, 2, 2)
    return backend.from_host(shape.keys(tokens, 0)), backend.from_host(shape.values(tokens, 0))


def on_host(backend, mask):
    return None if mask is None else backend.to_host(mask)


def check_next(cache, tokens, windows=(None, 1, 3, 300)):
    backend = cache.backend
    ahead = [on_host(backend, cache.mask(tokens, window, ahead=True)) for window in windows]
    positions = cache.next_positions(np.int64(tokens))
    keys, _ = cache.update(*update_of(backend, tokens))
    np.testing.assert_array_equal(positions, cache.positions)
    for window, mask in zip(windows, ahead, strict=True):
        after = on_host(backend, cache.mask(tokens, window))
        assert (mask is None) == (after is None)
        if after is not None:
            assert mask.shape == (tokens, keys.shape[2])
            np.testing.assert_array_equal(mask, after)


KINDS = {
    "growing": lambda backend: KVCache(backend, step=4),
    "ring": lambda backend: RotatingKVCache(6, 2, backend, step=2),
    "wide ring": lambda backend: RotatingKVCache(300, 0, backend, step=4),
}


@pytest.mark.parametrize("kind", KINDS)
@given(updates=st.lists(st.sampled_from([1, 1, 2, 3, 5, 9]), min_size=1, max_size=6))
def test_any_updates(backend, kind, updates):
    cache = KINDS[kind](backend)
    for tokens in updates:
        check_next(cache, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_updates_that_grow_the_buffers(backend, kind):
    """And, for rings, that bring more tokens than the ring has slots."""
    cache = KINDS[kind](backend)
    for tokens in (3, 254, 1, 1, 300, 1):
        check_next(cache, tokens, (None, 5))


def test_after_going_back(backend):
    cache = KVCache(backend, step=4)
    for tokens in (7, 5, 2):
        cache.update(*update_of(backend, 3))
        cache.trim(3)
        check_next(cache, tokens)


def test_positions_in_padded_rows(backend):
    cache = KVCache(backend)
    cache.pad([0, 2])
    shape = Shape(2, 1, 2, 2)
    ahead = cache.next_positions(3)
    cache.update(backend.from_host(shape.keys(3, 0)), backend.from_host(shape.values(3, 0)))
    np.testing.assert_array_equal(ahead, cache.positions)
    assert ahead[:, :3].tolist() == [[0, 1, 2], [-1, -1, 0]]


def test_refusals(backend):
    cache = KVCache()
    with pytest.raises(KVCacheError, match=r"ahead of the first update needs a backend\. Name it"):
        cache.mask(3, ahead=True)
    cache.update(*update_of(backend, 2))
    for tokens in (0, -1):
        with pytest.raises(ValueError, match="mask covers 1 to"):
            cache.mask(tokens, ahead=True)
        with pytest.raises(ValueError, match="tokens must be >= 1"):
            cache.next_positions(tokens)
    with pytest.raises(ValueError, match="window must be >= 1"):
        cache.mask(1, 0, ahead=True)
    state = cache.export_state(1)
    with pytest.raises(ValueError, match="window must be >= 1"):
        functional.mask(state, 1, 0)
    ring = RotatingKVCache(4, backend=backend)
    ring.update(*update_of(backend, 2))
    with pytest.raises(ValueError, match="mask covers 1 to 1 tokens, of a ring 1; got 2"):
        functional.mask(ring.export_state(1), 2, ahead=True)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("kind", "tokens"), [("growing", 1), ("growing", 3), ("ring", 1)])
def test_in_programs(backend, kind, tokens, window):
    cache = KINDS[kind](backend)
    cache.update(*update_of(backend, 3))
    state = cache.export_state(6 * tokens)
    for _ in range(6):
        before = functional.mask(state, tokens, window, ahead=True)
        state, _, _ = functional.append(state, *update_of(backend, tokens))
        after = functional.mask(state, tokens, window)
        np.testing.assert_array_equal(backend.to_host(before), backend.to_host(after))
    cache.import_state(state)
