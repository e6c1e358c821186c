"""Caches filled with rows at an offset, and from rows that another cache holds on the device."""

import numpy as np
import pytest

from kvcache import (
    DTypeError,
    ExportedError,
    KVCache,
    LayerCaches,
    RotatingKVCache,
    ShapeError,
    get_backend,
)

from .oracle import (
    Oracle,
    Shape,
    Token,
    check_columns,
    check_whole,
    fingerprint,
    held_columns,
    host_rows,
    push,
    rows,
)

RINGS = {"ring": (5, 0, 0), "sinks": (6, 2, 0), "slack": (4, 1, 3)}


def arrays(backend, positions):
    """Keys and values whose bits tell their positions."""
    shape = Shape()
    hosts = [
        np.concatenate([make(1, position) for position in positions], axis=2)
        for make in (shape.keys, shape.values)
    ]
    return tuple(map(backend.from_host, hosts))


def seen(tokens, oracle):
    """The oracle after so many more tokens."""
    shape = Shape()
    keys, values = shape.keys(tokens, oracle.offset), shape.values(tokens, oracle.offset)
    oracle.tokens += map(Token, rows(keys), rows(values))
    return oracle


def test_a_growing_cache_filled_with_tokens_goes_on(backend):
    cache, oracle = KVCache(backend), seen(7, Oracle())
    cache.fill(*arrays(backend, range(7)))
    check_whole(cache, oracle)
    for tokens in (1, 3):
        push(cache, oracle, tokens)


@pytest.mark.parametrize(("size", "keep", "slack"), RINGS.values(), ids=RINGS)
@pytest.mark.parametrize("offset", [3, 4, 6, 20])
def test_a_ring_filled_at_an_offset_goes_on(backend, size, keep, slack, offset):
    cache = RotatingKVCache(size, keep, backend, slack=slack)
    oracle = seen(offset, Oracle(size, keep))
    cache.fill(*arrays(backend, oracle.held()), offset)
    check_columns(cache, oracle, held_columns(cache), 1)
    for tokens in (1, 4, 1):
        update = arrays(backend, range(oracle.offset, oracle.offset + tokens))
        seen(tokens, oracle)
        check_columns(cache, oracle, host_rows(backend, cache.update(*update)), tokens)


def test_tokens_of_slack_can_be_trimmed_at_once(backend):
    cache = RotatingKVCache(4, backend=backend, slack=3)
    cache.fill(*arrays(backend, range(13, 20)), 20)
    assert cache.can_trim(3)
    assert not cache.can_trim(4)
    cache.trim(3)
    assert cache.state_positions.tolist() == [13, 14, 15, 16]


@pytest.mark.parametrize(
    ("tokens", "offset", "match"),
    [(4, 20, "holds 5 tokens to 8 in keys and values; got \\[4, 4\\]"), (9, 20, "got \\[9, 9\\]")],
)
def test_too_few_or_too_many_tokens(backend, tokens, offset, match):
    cache = RotatingKVCache(5, 1, backend, slack=3)
    before = fingerprint(cache)
    with pytest.raises(ShapeError, match=match):
        cache.fill(*arrays(backend, range(tokens)), offset)
    assert fingerprint(cache) == before


def test_what_cannot_be_filled(backend):
    cache = KVCache(backend)
    push(cache, Oracle(), 2)
    with pytest.raises(ValueError, match="fill takes an empty cache; 2 tokens came"):
        cache.fill(*arrays(backend, range(2)))
    with pytest.raises(ShapeError, match="at offset 3, KVCache holds 3 tokens in keys and values"):
        KVCache(backend).fill(*arrays(backend, range(2)), 3)
    with pytest.raises(DTypeError, match="this cache holds int8; got float32"):
        KVCache(backend, dtype="int8").fill(*arrays(backend, range(2)))
    state = cache.export_state(1)
    with pytest.raises(ExportedError):
        cache.fill(*arrays(backend, range(2)))
    cache.import_state(state)


@pytest.mark.parametrize("kind", ["growing", "ring", "sinks"])
def test_a_hit_on_the_device_does_not_go_through_the_host(backend, kind, monkeypatch):
    """Rows that a cache of the same backend holds are copied there, where slices are views."""
    if not backend.slices_are_views:
        pytest.skip(f"on {backend.name} each length of a slice is compiled")
    own = type(backend)(backend.device)

    def make():
        if kind == "growing":
            return KVCache(own)
        size, keep, _ = RINGS[kind]
        return RotatingKVCache(size, keep, own)

    source, target = make(), make()
    oracle = Oracle() if kind == "growing" else Oracle(source.max_size, source.keep)
    push(source, oracle, 9)
    snapshot = LayerCaches([source]).snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(own, "to_host", None)
        patch.setattr(own, "from_host", None)
        LayerCaches([target]).restore(snapshot)
    check_whole(target, oracle)
    push(target, oracle, 1, stamp=50)
    assert snapshot.resident
    snapshot.close()


def test_a_copy_shares_memory_until_one_of_the_two_changes():
    pytest.importorskip("mlx.core")
    backend = get_backend("mlx")
    for cache, oracle in (
        (KVCache(backend), Oracle()),
        (RotatingKVCache(5, 2, backend), Oracle(5, 2)),
    ):
        push(cache, oracle, 9)
        twin, twins = cache.copy(), oracle.copy()
        push(cache, oracle, 2, stamp=70)
        check_whole(twin, twins)
        push(twin, twins, 3, stamp=90)
        check_whole(cache, oracle)
        check_whole(twin, twins)
