"""The caches of all layers together: all of them change, or none."""

import re

import numpy as np
import pytest

from kvcache import KVCache, LayerCaches, RotatingKVCache, StateCache, TrimError

from .oracle import fingerprint


def rows(start, tokens=1):
    codes = np.arange(start, start + tokens, dtype=np.float32)
    return codes[None, None, :, None] + np.zeros((1, 2, 1, 4), np.float32)


def filled(*caches, tokens=5):
    stack = LayerCaches(caches)
    for cache in {id(cache): cache for cache in stack}.values():
        for position in range(tokens):
            cache.update(rows(position), -rows(position))
    return stack


def prints(stack):
    return [fingerprint(cache) for cache in stack]


def test_it_is_a_sequence():
    caches = [KVCache(), RotatingKVCache(4), KVCache()]
    stack = LayerCaches(iter(caches))
    assert (len(stack), list(stack), stack[1], stack[-1]) == (3, caches, caches[1], caches[2])
    assert isinstance(stack[1:], LayerCaches)
    assert list(stack[1:]) == caches[1:]
    assert repr(stack) == "<LayerCaches 3 of KVCache, RotatingKVCache, offset=0>"
    assert caches[1] in stack


def test_offset_and_nbytes():
    shared = KVCache("numpy", step=8)
    stack = filled(shared, shared, RotatingKVCache(4, backend="numpy", step=2))
    assert stack.offset == 5
    assert stack.nbytes == shared.nbytes + stack[2].nbytes
    assert LayerCaches([]).offset == LayerCaches([]).nbytes == 0
    stack[2].update(rows(5), rows(5))
    with pytest.raises(ValueError, match=r"have seen the same tokens; got 3 caches at \[5, 6\]"):
        _ = stack.offset


def test_trim_in_all_layers_or_in_none():
    stack = filled(KVCache("numpy"), RotatingKVCache(4, backend="numpy"))
    before = prints(stack)
    assert not stack.can_trim(1)
    with pytest.raises(TrimError, match=re.escape("Use checkpoint()")):
        stack.trim(1)
    assert prints(stack) == before
    stack = filled(KVCache("numpy"), RotatingKVCache(8, backend="numpy"))
    assert stack.can_trim(2)
    stack.trim(2)
    assert stack.offset == 3


def test_rollback_in_all_layers_or_in_none():
    stack = filled(KVCache("numpy"), RotatingKVCache(4, backend="numpy"))
    stack.checkpoint()
    for cache in stack:
        cache.update(rows(5, 2), -rows(5, 2))
    stack[1].checkpoint()  # this layer could keep no more of what came
    before = prints(stack)
    with pytest.raises(TrimError, match="accepted must be 0 to 0 tokens"):
        stack.rollback(1)
    assert prints(stack) == before
    stack = filled(KVCache("numpy"), RotatingKVCache(4, backend="numpy"))
    before = prints(stack)
    stack.checkpoint()
    for cache in stack:
        cache.update(rows(5, 2), -rows(5, 2))
    stack.rollback(1)
    assert stack.offset == 6
    for cache in stack:
        held = cache.positions
        assert (cache.state[0][0, 0, :, 0] == held).all()
        assert held.max() == 5


def test_a_shared_cache_changes_once_and_stays_shared():
    shared = KVCache("numpy")
    stack = filled(shared, shared)
    stack.checkpoint()
    stack.trim(2)
    assert shared.offset == 3
    clone = stack.copy()
    assert clone[0] is clone[1]
    assert clone[0] is not shared
    moved = stack.to_backend("numpy")
    assert moved[0] is moved[1]
    clone.reset()
    assert (clone.offset, stack.offset) == (0, 3)


def test_copy_and_to_backend(backend):
    stack = filled(KVCache("numpy"), RotatingKVCache(4, keep=1, backend="numpy"))
    for clone in (stack.copy(), stack.to_backend(backend)):
        assert isinstance(clone, LayerCaches)
        assert clone.offset == 5
        for one, other in zip(stack, clone, strict=True):
            assert type(one) is type(other)
            host = other.backend.to_host(other.state[0])
            np.testing.assert_array_equal(host[:, :, : one.len], one.state[0])


def test_snapshot_restore_and_files(tmp_path):
    stack = filled(KVCache("numpy"), RotatingKVCache(4, keep=1, backend="numpy"))
    stack.save(tmp_path / "file")
    loaded = LayerCaches.load(tmp_path / "file")
    assert prints(loaded) == prints(stack.copy())
    target = LayerCaches([KVCache(), RotatingKVCache(4, keep=1)])
    with stack.snapshot() as snapshot:
        target.restore(snapshot, backend="numpy")
    assert target.offset == 5
    for one, other in zip(stack, target, strict=True):
        np.testing.assert_array_equal(one.state[0], other.state[0])


def test_the_last_position_that_all_layers_can_go_back_to():
    stack = filled(KVCache("numpy"), RotatingKVCache(8, backend="numpy"))
    assert [stack.last_trimmable(limit) for limit in (0, 3, 5, 9)] == [0, 3, 5, 5]
    stack = filled(KVCache("numpy"), RotatingKVCache(4, backend="numpy"))  # it has turned
    assert [stack.last_trimmable(limit) for limit in (4, 5, 6)] == [0, 5, 5]
    states = [StateCache("numpy"), StateCache("numpy"), KVCache("numpy")]
    for cache, points in zip(states, [(2, 3), (2, 4), ()], strict=False):
        cache.schedule(points)
    for position in range(5):
        states[0].advance(1, np.ones((1, 2), np.float32))
        states[1].advance(1, np.ones((1, 2), np.float32))
        states[2].update(rows(position), rows(position))
    stack = LayerCaches(states)
    assert [stack.last_trimmable(limit) for limit in (1, 2, 3, 4, 5)] == [0, 2, 2, 2, 5]
    assert LayerCaches([]).last_trimmable(3) == 3


def test_cuts_are_those_of_all_layers():
    states = [StateCache("numpy"), StateCache("numpy")]
    stack = LayerCaches([states[0], KVCache("numpy"), states[1], RotatingKVCache(4), states[0]])
    assert stack.cuts(9) == []
    stack.schedule([2, 6])
    states[1].schedule([4])
    assert stack.cuts(6) == [2, 4]  # the end of the update is no cut
    assert LayerCaches([KVCache(), RotatingKVCache(4)]).cuts(9) == LayerCaches([]).cuts(9) == []
    for refused in (0, -1):
        with pytest.raises(ValueError, match=r"tokens.* got"):
            stack[1:2].cuts(refused)
        with pytest.raises(ValueError, match="an update has 1 to"):
            stack.cuts(refused)


def test_what_it_is_in_words():
    stack = filled(KVCache("numpy"), RotatingKVCache(8, backend="numpy"))
    assert repr(stack) == "<LayerCaches 2 of KVCache, RotatingKVCache, offset=5>"
    stack[0].update(rows(5), rows(5))
    assert repr(stack) == "<LayerCaches 2 of KVCache, RotatingKVCache, offset=5, 6>"
    assert repr(LayerCaches([])) == "<LayerCaches 0 of none, offset=0>"
