"""What both caches do beyond holding the right tokens: room, views, masks, copies, trim."""

import math

import numpy as np
import pytest

import kvcache
from kvcache import CacheConfig, KVCache, RotatingKVCache, get_backend
from kvcache.backends._numpy import NumpyBackend

from .oracle import (
    Oracle,
    Shape,
    check_columns,
    check_state,
    check_whole,
    fingerprint,
    held_columns,
    host_rows,
    oracle_for,
    push,
)

KINDS = {"kv": KVCache, "rotating": lambda *args, **rest: RotatingKVCache(11, 2, *args, **rest)}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


# Room.


@pytest.mark.parametrize("step", [1, 16, 256])
def test_growth_is_amortised(backend, step):
    """n tokens, one at a time, grow the buffers O(log n) times, and use most of them."""
    cache, shape, tokens = KVCache(backend, step=step), Shape(1, 1, 1, 2), 1500
    if backend.name == "jax":
        tokens = 600  # each growth compiles
    keys, values = backend.from_host(shape.keys(1, 0)), backend.from_host(shape.values(1, 0))
    grown = 0
    for count in range(1, tokens + 1):
        cache.update(keys, values)
        token = cache.nbytes // (3 * 4)
        unit = math.lcm(step, backend.config.padding)
        assert count <= token <= max(unit, count * 3 // 2 + unit)
        grown = max(grown, cache.growths)
    assert cache.growths == grown
    assert cache.growths <= math.log(tokens, 1.5) + 1
    assert cache.growths <= tokens // step
    assert step < tokens or cache.growths == 0


def test_buffers_are_filled_before_they_grow(backend):
    step = max(4, backend.config.padding)
    cache, oracle = KVCache(backend, step=step), Oracle()
    for _ in range(step):
        push(cache, oracle, 1)
    assert cache.growths == 0
    full = cache.nbytes
    cache.trim(1)
    cache.export_state(1)
    assert cache.nbytes == full, "there was room for the token that was lent for"


def test_the_default_step():
    cache = KVCache("numpy")
    push(cache, Oracle(), 1, Shape(1, 1, 1, 1, "int8"))
    assert cache.nbytes == 2 * 256


def test_growth_keeps_every_token(backend):
    for cache in (KVCache(backend, step=1), RotatingKVCache(300, 2, backend, step=1)):
        oracle = oracle_for(cache)
        for tokens in (1, 1, 2, 1, 5, 1, 1, 260, 1, 90, 1):
            push(cache, oracle, tokens)
            check_whole(cache, oracle)
        assert cache.growths > 0


def test_a_rotating_cache_never_takes_more_than_twice_its_size(backend):
    for size, step in ((11, 4), (11, 256), (300, 256), (1, 1)):
        cache = RotatingKVCache(size, backend=backend, step=step)
        shape = Shape(1, 1, 2, 2)
        for tokens in (1, 7, size + 3, 1):
            update = shape.keys(tokens, 0), shape.values(tokens, 0)
            cache.update(*map(backend.from_host, update))
            most = 2 * size if backend.slices_are_views else size + max(1, size // 8)
            padded = -(-most // backend.config.padding) * backend.config.padding
            assert cache.len <= size
            assert cache.len * 16 <= cache.nbytes <= padded * 16


def test_nbytes_counts_keys_and_values(backend):
    cache = KVCache(backend, step=256)
    assert cache.nbytes == 0
    shape = Shape(2, 3, 5, 7, "int8")
    push(cache, Oracle(), 1, shape)
    assert cache.nbytes == 2 * 3 * 256 * (5 + 7)
    twice = KVCache(backend, step=256)
    push(twice, Oracle(), 1, Shape(2, 3, 5, 7, "float32"))
    assert twice.nbytes == 4 * cache.nbytes
    cache.trim(1)
    assert cache.nbytes == 2 * 3 * 256 * (5 + 7), "trim keeps the buffers for what comes next"
    cache.reset()
    assert cache.nbytes == 0


def test_reset_is_a_new_start(backend, kind):
    """Another geometry, another dtype, and for a cache without a backend another one."""
    cache = kind(step=4)
    oracle = oracle_for(cache)
    assert cache.backend is None
    for other in (backend, get_backend("numpy")):
        for shape in (Shape(1, 2, 4, 3, "float32"), Shape(2, 1, 3, 3, "int8")):
            first = other.from_host(shape.keys(13, 0)), other.from_host(shape.values(13, 0))
            cache.update(*first)
            assert cache.backend is not None
            assert cache.backend.spec == other.spec
            assert cache.dtype == shape.dtype
            cache.reset()
            assert (cache.offset, cache.len, cache.nbytes, cache.growths) == (0, 0, 0, 0)
            assert cache.state == ()
            assert cache.backend is None
            assert cache.dtype is None
            assert cache.positions.size == 0
    with pytest.raises(kvcache.TrimError):
        cache.rollback()
    push(cache := kind(backend), oracle, 13)
    check_whole(cache, oracle)


def test_named_options_survive_reset(backend):
    cache = RotatingKVCache(4, 1, backend, dtype="float32")
    oracle = Oracle(4, 1)
    push(cache, oracle, 6)
    cache.reset()
    assert cache.backend is backend
    assert cache.dtype == "float32"
    assert (cache.max_size, cache.keep) == (4, 1)
    oracle.cut(0)
    push(cache, oracle, 6)


def test_repr_says_what_and_where(backend):
    cache = RotatingKVCache(4)
    assert repr(cache) == ("<RotatingKVCache offset=0 len=0 on the backend of its first array>")
    cache = RotatingKVCache(4, backend=backend)
    push(cache, Oracle(4), 6)
    assert repr(cache) == f"<RotatingKVCache offset=6 len=4 on {backend.spec}>"
    assert repr(KVCache(backend)) == f"<KVCache offset=0 len=0 on {backend.spec}>"


def test_a_cache_is_true_when_empty(kind):
    """Models write ``if cache``; an empty one is not no cache."""
    assert bool(kind())
    assert not hasattr(kind(), "__len__")


# Views.


def test_what_update_returns_is_the_buffer_itself_where_views_are_free(backend):
    if backend.name not in ("numpy", "torch"):
        pytest.skip(f"memory of {backend.name} cannot be looked at")
    cache, shape = KVCache(backend, step=8), Shape()
    update = backend.from_host(shape.keys(3, 0)), backend.from_host(shape.values(3, 0))
    first = cache.update(*update)
    second = cache.update(*update)
    for one, two, held in zip(first, second, cache.state, strict=True):
        assert _address(one) == _address(two) == _address(held)
        assert tuple(one.shape[2:3]) == (3,)
        assert tuple(two.shape[2:3]) == (6,)
    # What is written through a view is what the cache holds: nothing was copied.
    second[0][...] = 7
    assert (backend.to_host(cache.state[0]) == 7).all()


def _address(array):
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


def test_state_is_what_update_returned(backend):
    cache, oracle = KVCache(backend), Oracle()
    for tokens in (1, 5, 1):
        columns = push(cache, oracle, tokens)
        assert host_rows(backend, cache.state) == columns[: cache.len] == oracle.tokens


@pytest.mark.parametrize("dtype", get_backend("numpy").dtypes)
def test_every_dtype(backend, dtype):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    shape = Shape(1, 2, 4, 3, dtype)
    for cache in (KVCache(backend, step=4), RotatingKVCache(5, 1, backend, dtype=dtype)):
        oracle = oracle_for(cache)
        for tokens in (3, 1, 4, 1):
            push(cache, oracle, tokens, shape)
        assert cache.dtype == dtype
        check_whole(cache, oracle)


def test_batches_and_heads_stay_apart(backend):
    """Every element, not only every token, is where it was put."""
    cache, shape = RotatingKVCache(4, backend=backend), Shape(3, 4, 5, 2)
    for position in range(6):
        update = shape.keys(1, position), shape.values(1, position)
        cache.update(*map(backend.from_host, update))
    for part, make in zip(cache.state, (shape.keys, shape.values), strict=True):
        host = backend.to_host(part)
        for column, position in enumerate(cache.state_positions):
            np.testing.assert_array_equal(host[:, :, column], make(1, int(position))[:, :, 0])


# Copies.


def test_a_copy_is_independent(backend, kind):
    cache = kind(backend, step=2)
    oracle = oracle_for(cache)
    push(cache, oracle, 14)
    cache.checkpoint()
    push(cache, oracle, 2, stamp=50)
    twin, twins = cache.copy(), oracle.copy()
    before = fingerprint(twin)
    push(cache, oracle, 3, stamp=70)
    assert fingerprint(twin) == before
    with pytest.raises(kvcache.TrimError, match="needs an open checkpoint"):
        twin.rollback()
    push(twin, twins, 5, stamp=100)
    push(cache, oracle, 1, stamp=130)
    check_whole(twin, twins)
    check_whole(cache, oracle)
    cache.rollback(3)
    oracle.cut(17)
    check_whole(cache, oracle)
    check_whole(twin, twins)
    twin.reset()
    check_whole(cache, oracle)


def test_a_copy_holds_live_tokens_only(backend):
    cache, oracle = KVCache(backend, step=256), Oracle()
    push(cache, oracle, 513)
    cache.trim(510)
    oracle.cut(3)
    twin = cache.copy()
    assert twin.nbytes == 256 * 2 * (4 + 3) * 4
    assert twin.growths == 0
    check_whole(twin, oracle)


def test_a_copy_of_an_empty_cache(backend, kind):
    twin = kind(backend, dtype="float32").copy()
    assert (twin.offset, twin.nbytes, twin.dtype) == (0, 0, "float32")
    assert twin.backend is backend
    assert kind().copy().backend is None
    push(twin, oracle_for(twin), 3)


# Masks.


def test_mask_is_none_when_nothing_is_hidden(backend):
    exact = backend.config.padding == 1
    cache, oracle = KVCache(backend), Oracle()
    push(cache, oracle, 1)
    assert (cache.mask(1) is None) == exact
    push(cache, oracle, 1)
    assert (cache.mask(1) is None) == exact
    assert (cache.mask(1, window=2) is None) == exact
    assert (cache.mask(1, window=9) is None) == exact
    assert cache.mask(1, window=1) is not None
    assert cache.mask(2) is not None
    full = KVCache(backend, capacity=256)
    push(full, Oracle(), 256)
    assert full.mask(1) is None
    ring = RotatingKVCache(256, backend=backend)
    push(ring, oracle := Oracle(256), 256)
    for _ in range(2):
        push(ring, oracle, 1)
        assert (ring.mask(1) is None) == exact
    assert ring.mask(1, window=255) is not None
    assert (ring.mask(1, window=257) is None) == exact


def test_mask_of_some_of_the_queries(backend, kind):
    cache = kind(backend)
    oracle = oracle_for(cache)
    for update in (9, 6):
        columns = push(cache, oracle, update)
        for tokens in range(1, update + 1):
            for window in (None, 1, 3, 8, 100):
                check_columns(cache, oracle, columns, tokens, window)
    with pytest.raises(ValueError, match=r"mask covers 1 to \d+ latest tokens; got 16"):
        cache.mask(16)


def test_an_empty_cache_has_no_queries(kind):
    for cache in (kind(), kind("numpy")):
        with pytest.raises(ValueError, match="mask covers 1 to"):
            cache.mask(1)


class Half(NumpyBackend):
    config = CacheConfig(mask_dtype="float16")


class Single(NumpyBackend):
    config = CacheConfig(mask_dtype="float32")


class Brain(NumpyBackend):
    config = CacheConfig(mask_dtype="bfloat16")


@pytest.mark.parametrize("made", [Half, Single, Brain])
def test_float_masks(made, kind):
    """0 = attend, -inf = hidden: what is added to the logits."""
    cache = kind(made())
    oracle = oracle_for(cache)
    for tokens in (4, 9, 1):
        push(cache, oracle, tokens)
    push(cache, oracle, 3)
    mask = cache.mask(3)
    assert mask is not None
    assert mask.dtype.name == made.config.mask_dtype
    assert set(np.unique(mask.astype(np.float32))) == {0, -np.inf}


def test_bool_masks(backend, kind):
    cache = kind(backend)
    push(cache, oracle_for(cache), 3)
    assert backend.dtype_name(cache.mask(3)) == "bool"


# Other configurations than those that come with kvcache.


class Padded(NumpyBackend):
    """Views, in lengths of four."""

    config = CacheConfig(padding=4)


class Whole(NumpyBackend):
    """No views: the whole buffer is handed out."""

    slices_are_views = False


class PaddedWhole(NumpyBackend):
    config = CacheConfig(padding=8, mask_dtype="float32")
    slices_are_views = False


@pytest.mark.parametrize("made", [Padded, Whole, PaddedWhole])
@pytest.mark.parametrize("step", [1, 3, 6, 256])
def test_other_configurations(made, kind, step):
    backend = made()
    cache = kind(backend, step=step)
    oracle = oracle_for(cache)
    for tokens in (1, 2, 4, 1, 1, 5, 1, 14, 40, 1, 1, 2):
        columns = push(cache, oracle, tokens)
        check_whole(cache, oracle)
        assert len(columns) % backend.config.padding == 0
        if backend.slices_are_views:
            assert len(columns) < cache.len + tokens + 2 * backend.config.padding
        assert (cache.positions[cache.positions < 0] == -1).all()
    cache.checkpoint()
    push(cache, oracle, 6, stamp=200)
    cache.rollback(2)
    oracle.cut(75)
    check_whole(cache, oracle)
    check_state(cache.copy(), oracle)


def test_padding_repeats_few_shapes():
    """One program serves many lengths: the point of padding."""
    cache, oracle = KVCache(Padded(), step=4), Oracle()
    lengths = {len(push(cache, oracle, 1)) for _ in range(16)}
    assert lengths == {4, 8, 12, 16}


# Trim.


def test_trimmed_tokens_never_come_back(backend, kind):
    cache = kind(backend)
    oracle = oracle_for(cache)
    push(cache, oracle, 10)
    for tokens in (0, 4, 6):
        assert cache.can_trim(tokens)
        cache.trim(tokens)
        oracle.cut(oracle.offset - tokens)
        check_whole(cache, oracle)
    assert cache.state == ()
    push(cache, oracle, 3, stamp=500)
    check_whole(cache, oracle)


def test_trim_ends_a_checkpoint(backend):
    cache, oracle = KVCache(backend), Oracle()
    push(cache, oracle, 4)
    cache.checkpoint()
    cache.trim(1)
    with pytest.raises(kvcache.TrimError, match="needs an open checkpoint"):
        cache.rollback()


def test_rollback_of_a_growing_cache(backend):
    cache, oracle = KVCache(backend, step=4), Oracle()
    push(cache, oracle, 3)
    for accepted in (0, 2, 7):
        cache.checkpoint()
        mark = oracle.offset
        push(cache, oracle, 5, stamp=100)
        push(cache, oracle, 2, stamp=200)
        cache.rollback(accepted)
        oracle.cut(mark + accepted)
        check_whole(cache, oracle)
    with pytest.raises(kvcache.TrimError, match="needs an open checkpoint"):
        cache.rollback()


def test_inputs_stay_the_callers(backend, kind):
    """The same arrays may be given again, and to several caches."""
    shape = Shape()
    keys, values = shape.keys(4, 0), shape.values(4, 0)
    update = backend.from_host(keys), backend.from_host(values)
    caches = [kind(backend, step=1) for _ in range(2)]
    for _ in range(5):
        for cache in caches:
            cache.update(*update)
    for part, host in zip(update, (keys, values), strict=True):
        assert backend.to_host(part).tobytes() == host.tobytes()
    assert [cache.offset for cache in caches] == [20, 20]
    assert fingerprint(caches[0]) == fingerprint(caches[1])


def test_the_cache_keeps_no_view_of_its_inputs():
    keys, values = Shape().keys(4, 0), Shape().values(4, 0)
    cache = KVCache()
    cache.update(keys, values)
    before = fingerprint(cache)
    keys[:] = values[:] = 1
    assert fingerprint(cache) == before


def test_inputs_in_any_memory_order(backend):
    """What models really hand over: a transposed projection, a slice, a broadcast."""
    shape = Shape()
    keys, values = shape.keys(6, 0), shape.values(6, 0)
    device = [
        backend.xp.permute_dims(backend.from_host(part.swapaxes(1, 2).copy()), (0, 2, 1, 3))
        for part in (keys, values)
    ]
    cache = RotatingKVCache(4, backend=backend)
    for tokens in (range(1), range(1, 6)):
        cache.update(*(part[:, :, tokens.start : tokens.stop, :] for part in device))
    twin, expected = cache.copy(), host_rows(get_backend("numpy"), (keys, values))
    columns = zip(twin.positions.tolist(), held_columns(twin), strict=True)
    held = {position: column for position, column in columns if position >= 0}
    assert held == {position: expected[position] for position in (2, 3, 4, 5)}
