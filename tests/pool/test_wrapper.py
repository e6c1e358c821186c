"""Several caches behind one, which change together or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from kvcache import (
    Batch,
    CacheConfig,
    CacheFullError,
    CausalCache,
    EncoderCache,
    KVCacheError,
    NotSupportedError,
    WrapperCache,
)

from .. import peek
from .oracle import add_positions, fingerprint, put_tokens


def make(*caches, max_sequences=2, capacity=8, max_batch=8):
    wrapper = WrapperCache(*caches)
    wrapper.init("numpy", max_sequences=max_sequences, capacity=capacity, max_batch=max_batch)
    return wrapper


def store(wrapper, positions, sequence=0):
    backend = peek.buffers(wrapper.caches[0]).backend
    wrapper.start_forward(Batch(positions, [sequence] * len(positions)))
    for index in range(len(wrapper.caches)):
        put_tokens(backend, wrapper, list(positions), list(positions), index)


def test_types_and_layers():
    windowed, full = CausalCache(window=2), CausalCache()
    wrapper = make(windowed, full)
    assert wrapper.underlying_cache is windowed
    store(wrapper, [0, 1, 2])
    assert wrapper.underlying_cache is full
    counts = []
    for index in (0, 1):
        wrapper.set_layer_type(index)
        wrapper.set_layer(0)
        counts.append(wrapper.get()[2].sum(1).tolist())
    assert counts == [[1, 2, 2], [1, 2, 3]]
    wrapper.set_causal([0])
    assert wrapper.get()[2].sum(1).tolist() == [3, 2, 3]
    wrapper.set_layer_type(0)
    assert wrapper.get()[2].sum(1).tolist() == [1, 2, 2]
    for index in (-1, 2):
        with pytest.raises(ValueError, match=f"layer types here are 0 to 1; got {index}"):
            wrapper.set_layer_type(index)
    with pytest.raises(ValueError, match=r"^a wrapper needs at least one cache; got none\.$"):
        WrapperCache()


def test_the_layer_and_its_type_may_be_set_in_either_order():
    wrapper = make(CausalCache(window=2), CausalCache())
    for position in range(3):
        wrapper.start_forward(Batch([position], [0]))
        for layer in range(4):
            wrapper.set_layer(layer)
            wrapper.set_layer_type(layer % 2)
            token = np.full((1, 1, 1), 10 * layer + position, np.float32)
            wrapper.put(token, token)
    for layer in range(4):
        wrapper.set_layer(layer)
        wrapper.set_layer_type(layer % 2)
        keys, _, mask = wrapper.get()
        first = 1 if layer % 2 == 0 else 0
        assert keys[0, mask[0], 0].tolist() == [10 * layer + p for p in range(first, 3)]


def test_all_must_be_able_to_resume():
    wrapper = make(CausalCache(), CausalCache(window=2))
    store(wrapper, range(6))
    store(wrapper, [6])
    assert wrapper.caches[0].can_resume(0, 2)
    assert not wrapper.can_resume(0, 2)
    assert wrapper.can_resume(0, 6)
    assert wrapper.can_resume(0, 7)
    assert not wrapper.can_resume(0, 8)


@pytest.mark.parametrize("full_first", [True, False])
def test_a_pass_happens_in_all_or_none(full_first):
    caches = [CausalCache(window=2), CausalCache()]
    wrapper = make(*caches[:: -1 if full_first else 1], max_sequences=1)
    store(wrapper, range(6))
    before = [fingerprint(cache) for cache in wrapper.caches]
    with pytest.raises(CacheFullError, match="3 needed, 2 of 8 free"):
        wrapper.start_forward(Batch([6, 7, 8], [0, 0, 0]))
    assert [fingerprint(cache) for cache in wrapper.caches] == before
    store(wrapper, [6, 7])


def test_a_removal_happens_in_all_or_none():
    wrapper = make(CausalCache(shift=add_positions(CausalCache())), CausalCache())
    wrapper.caches[0].shift = lambda layer, keys, offsets: keys
    store(wrapper, range(6))
    before = [fingerprint(cache) for cache in wrapper.caches]
    with pytest.raises(NotSupportedError, match="has no shift"):
        wrapper.remove(0, 1, 3)
    assert [fingerprint(cache) for cache in wrapper.caches] == before
    wrapper.remove(0, 3)
    assert [peek.table(cache).cells_of(0).size for cache in wrapper.caches] == [3, 3]


def test_a_copy_happens_in_all_or_none():
    wrapper = make(CausalCache(), CausalCache(window=2))
    store(wrapper, range(6), 1)
    store(wrapper, [6], 1)
    wrapper.copy_prefix(1, 0, 2)  # the window holds none of these any more
    assert [peek.table(cache).cells_of(0).size for cache in wrapper.caches] == [2, 0]
    before = [fingerprint(cache) for cache in wrapper.caches]
    with pytest.raises(ValueError, match="needs a source that holds tokens; 0 is empty"):
        wrapper.copy_prefix(0, 1, 2)
    assert [fingerprint(cache) for cache in wrapper.caches] == before


def test_config_and_init_reach_all():
    wrapper = WrapperCache(CausalCache(), CausalCache(window=2))
    wrapper.set_config(CacheConfig(padding=4))
    wrapper.init("numpy", "float16", capacity=10, max_batch=3)  # one sequence
    assert [peek.table(cache).cells for cache in wrapper.caches] == [12, 4]
    assert [peek.buffers(cache).dtype for cache in wrapper.caches] == ["float16"] * 2
    with pytest.raises(KVCacheError, match="set_config comes before init"):
        wrapper.set_config(CacheConfig())


def test_an_init_that_fails_leaves_none_begun():
    wrapper = WrapperCache(CausalCache(), CausalCache(window=4, memory=2))
    with pytest.raises(ValueError, match="memory must be at least"):
        wrapper.init("numpy", capacity=10, max_batch=3)
    wrapper.set_config(CacheConfig(padding=4))


def test_close_reaches_all():
    with make(CausalCache(), CausalCache()) as wrapper:
        store(wrapper, [0])
    for cache in wrapper.caches:
        with pytest.raises(KVCacheError, match="Call init first"):
            cache.can_resume(0, 0)


def test_encoder_and_decoder():
    wrapper = make(EncoderCache(), CausalCache())
    wrapper.start_forward(Batch([0, 0], [0, 1], [0, 1]))
    wrapper.set_layer_type(0)
    frames = np.ones((1, 6, 2), np.float32)
    wrapper.put(frames, frames, frames=[3, 3])
    assert wrapper.get()[2].shape == (2, 6)
    wrapper.set_layer_type(1)
    with pytest.raises(NotSupportedError, match="frames are of encoder output"):
        wrapper.put(np.ones((1, 2, 2), np.float32), frames=[1, 1])
    wrapper.put(np.ones((1, 2, 2), np.float32))
    assert wrapper.get()[2].sum() == 2
    with pytest.raises(ValueError, match="holds position 0 already"):
        wrapper.start_forward(Batch([0], [0], [0]))
    wrapper.start_forward(Batch([1], [1]))
    wrapper.set_layer_type(0)
    assert wrapper.get()[0].shape == (1, 3, 2)
    wrapper.remove(1, 0)
    wrapper.start_forward(Batch([1], [0]))
    assert wrapper.underlying_cache.encoder_cached
    wrapper.start_forward(Batch([0], [1]))
    assert not wrapper.underlying_cache.encoder_cached
