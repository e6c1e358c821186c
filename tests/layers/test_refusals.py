"""What a cache refuses: a named error that says what to do, and nothing has changed."""

import re

import numpy as np
import pytest

import kvcache
from kvcache import DTypeError, KVCache, LayerCaches, RotatingKVCache, TrimError

from .. import peek
from . import bad_updates
from .oracle import SHAPE, Oracle, check_whole, fingerprint, oracle_for, push


def new(cache):
    return cache, oracle_for(cache)


def used(cache):
    made = new(cache)
    for tokens in (3, 1):
        push(*made, tokens)
    return made


def wrapped(cache):
    made = used(cache)
    push(*made, 7)
    return made


def trimmed_to_nothing(cache):
    made = used(cache)
    cache.trim(4)
    made[1].cut(0)
    return made


def reset(cache):
    cache, oracle = wrapped(cache)
    cache.reset()
    oracle.cut(0)
    return cache, oracle


def drafting(cache):
    made = wrapped(cache)
    cache.checkpoint()
    push(*made, 2)
    return made


STATES = (new, used, wrapped, trimmed_to_nothing, reset, drafting)
KINDS = (KVCache, lambda backend: RotatingKVCache(5, 1, backend))


@pytest.fixture(params=KINDS, ids=("kv", "rotating"))
def cache(request, backend):
    return request.param(backend)


def check_refused(made, update, error, match):
    """The update is refused, and the cache is to the byte what it was, and goes on from there."""
    cache, oracle = made
    before = fingerprint(cache)
    with pytest.raises(error, match=match):
        cache.update(*update)
    assert fingerprint(cache) == before
    check_whole(cache, oracle)
    for tokens in (1, 4):
        push(cache, oracle, tokens)
    if peek.checkpoint(cache):
        cache.rollback(1)
        oracle.cut(cache.offset)
        check_whole(cache, oracle)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", bad_updates.BAD)
def test_a_bad_update(cache, backend, state, name):
    bad = bad_updates.BAD[name]
    made = state(cache)
    if not bad.always and state in (new, reset):
        return  # nothing was stored yet, so nothing is there to disagree with
    check_refused(made, bad_updates.arrays(backend, SHAPE, name), bad.error, bad.match)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", bad_updates.STRANGERS)
def test_what_is_no_array_of_this_backend(cache, backend, state, name):
    keys, values, error, match = bad_updates.stranger(backend, SHAPE, name)
    check_refused(state(cache), (keys, values), error, match)


def test_arrays_of_two_frameworks_bind_nothing(backend):
    """A cache without a backend of its own has none after a first update that fails, either."""
    cache = KVCache()
    keys, values, error, match = bad_updates.stranger(backend, SHAPE, "values of another framework")
    with pytest.raises(error, match=match):
        cache.update(keys, values)
    assert cache.backend is None
    assert cache.dtype is None
    good = SHAPE.values(2, 0)
    assert cache.update(good, good)[0].shape == good.shape
    assert cache.backend is not None
    assert cache.backend.name == "numpy"


def test_dtype_is_what_was_asked_for(backend):
    cache = KVCache(backend, dtype="float32")
    wrong = (backend.alloc((1, 2, 1, 4), "int32"),) * 2
    with pytest.raises(DTypeError, match=r"this cache holds float32; got int32\. Cast"):
        cache.update(*wrong)
    assert cache.dtype == "float32"
    assert cache.nbytes == 0
    push(cache, Oracle(), 2)


@pytest.mark.parametrize("dtype", ["float64", "nonsense", ""])
@pytest.mark.parametrize("kind", [KVCache, lambda **options: RotatingKVCache(4, **options)])
def test_unknown_dtype(backend, kind, dtype):
    for where in (backend, None):
        with pytest.raises(DTypeError, match=re.escape(repr(dtype))) as caught:
            kind(backend=where, dtype=dtype)
        assert "float32" in str(caught.value), "what there is must be named"


def test_dtype_that_this_framework_lacks(backend):
    lacking = set(kvcache.get_backend("numpy").dtypes) - set(backend.dtypes)
    if not lacking:
        pytest.skip(f"{backend.name} has every dtype")
    for dtype in sorted(lacking):
        with pytest.raises(DTypeError, match=f"{backend.name} has no dtype '{dtype}'; it has"):
            KVCache(backend, dtype=dtype)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_size": 0}, "max_size must be >= 1 token; got 0"),
        ({"max_size": -3}, "max_size must be >= 1 token; got -3"),
        (
            {"max_size": 4, "keep": 4},
            "keep must be 0 to max_size - 1, .*; got keep=4 with max_size=4",
        ),
        ({"max_size": 4, "keep": 9}, "got keep=9"),
        ({"max_size": 4, "keep": -1}, "got keep=-1"),
        ({"max_size": 1, "keep": 1}, "got keep=1"),
        ({"max_size": 4, "step": 0}, "step must be >= 1 token; got 0"),
        ({"max_size": 4, "step": -1}, "step must be >= 1 token; got -1"),
    ],
)
def test_rotating_options(options, match):
    with pytest.raises(ValueError, match=match):
        RotatingKVCache(**options)


@pytest.mark.parametrize("step", [0, -256])
def test_step(step):
    with pytest.raises(ValueError, match=f"step must be >= 1 token; got {step}"):
        KVCache(step=step)


@pytest.mark.parametrize("number", [1.5, 1.0, "1", None])
def test_counts_are_whole_numbers(number):
    cache, oracle = used(KVCache("numpy"))
    calls = [
        cache.trim,
        cache.rollback,
        cache.mask,
        RotatingKVCache,
        lambda n: RotatingKVCache(4, keep=n),
        lambda n: KVCache(step=n),
        lambda n: LayerCaches([cache]).trim(n),
    ]
    cache.checkpoint()
    for call in calls:
        with pytest.raises(TypeError):
            call(number)
    check_whole(cache, oracle)


def test_counts_may_come_from_numpy(tmp_path):
    """Accepted tokens are counted with arrays; what comes of it is an int, and can be saved."""
    cache = RotatingKVCache(np.int64(9), keep=np.int32(2), backend="numpy", step=np.int64(4))
    oracle = Oracle(9, 2)
    push(cache, oracle, 5)
    cache.trim(np.int64(1))
    oracle.cut(4)
    check_whole(cache, oracle)
    cache.checkpoint()
    push(cache, oracle, 4)
    cache.rollback(np.count_nonzero([True, True, False]))
    oracle.cut(6)
    check_whole(cache, oracle)
    cache.save(tmp_path / "cache")
    check_whole(RotatingKVCache.load(tmp_path / "cache"), oracle)


# Going back.


def test_over_trim(cache):
    cache, _ = used(cache)
    before = fingerprint(cache)
    for tokens in (5, 100, -1):
        with pytest.raises(TrimError, match=f"trim takes back 0 to 4 tokens.*got {tokens}"):
            cache.trim(tokens)
    assert fingerprint(cache) == before


def test_trim_after_displacement():
    cache, oracle = wrapped(RotatingKVCache(5, 1, "numpy"))
    before = fingerprint(cache)
    with pytest.raises(TrimError, match=r"11 came, it holds 5\. Use checkpoint\(\) and rollback"):
        cache.trim(1)
    assert not cache.can_trim(1)
    assert fingerprint(cache) == before
    check_whole(cache, oracle)


def test_rollback_without_checkpoint(cache):
    cache, oracle = used(cache)
    before = fingerprint(cache)
    with pytest.raises(
        TrimError, match=r"^rollback needs an open checkpoint\. Call checkpoint\(\) first\.$"
    ):
        cache.rollback()
    assert fingerprint(cache) == before
    check_whole(cache, oracle)


def test_rollback_of_too_much_keeps_the_checkpoint(cache):
    cache, oracle = wrapped(cache)
    cache.checkpoint()
    push(cache, oracle, 3)
    before = fingerprint(cache)
    for accepted in (4, -1):
        with pytest.raises(TrimError, match=f"accepted must be 0 to 3 tokens.*; got {accepted}"):
            cache.rollback(accepted)
    assert fingerprint(cache) == before
    cache.rollback(2)
    oracle.cut(13)
    check_whole(cache, oracle)


def test_trim_of_layers_is_all_or_nothing(backend):
    layers = [KVCache(backend), RotatingKVCache(5, 1, backend), KVCache(backend)]
    oracles = [oracle_for(layer) for layer in layers]
    for layer, oracle, tokens in zip(layers, oracles, (4, 4, 3), strict=True):
        push(layer, oracle, tokens)
    before = [fingerprint(layer) for layer in layers]
    with pytest.raises(TrimError, match=r"trim takes back 0 to 3 tokens.*got 4"):
        LayerCaches(layers).trim(4)
    assert [fingerprint(layer) for layer in layers] == before
    LayerCaches(iter(layers)).trim(3)
    for layer, oracle in zip(layers, oracles, strict=True):
        oracle.cut(oracle.offset - 3)
        check_whole(layer, oracle)
    push(layers[1], oracles[1], 6)
    before = [fingerprint(layer) for layer in layers]
    with pytest.raises(TrimError, match="Use checkpoint"):
        LayerCaches(layers[:2]).trim(1)
    assert [fingerprint(layer) for layer in layers] == before


def test_a_cache_that_layers_share_is_trimmed_once():
    cache, oracle = used(KVCache("numpy"))
    LayerCaches([cache, cache]).trim(3)
    oracle.cut(1)
    check_whole(cache, oracle)


# Memory.


def test_an_allocation_that_fails_leaves_a_new_cache_new():
    """The usual reaction to MemoryError is to try again with a smaller batch."""
    huge = np.broadcast_to(np.zeros((1, 1, 1, 1), np.float32), (1 << 22, 1, 1 << 22, 1))
    for cache in (KVCache(), RotatingKVCache(1 << 22)):
        with pytest.raises(MemoryError):
            cache.update(huge, huge)
        assert (cache.backend, cache.dtype, cache.nbytes, cache.offset) == (None, None, 0, 0)
        keys, values = SHAPE.keys(2, 0), SHAPE.values(2, 0)
        assert cache.update(keys, values)[0].shape == keys.shape


@pytest.mark.parametrize("primitive", ["alloc", "concat", "read_rows"])
@pytest.mark.parametrize("tokens", [1, 2, 6])
@pytest.mark.parametrize("state", [used, wrapped, drafting])
@pytest.mark.parametrize("size", [None, 5, 12])
def test_running_out_of_memory_loses_nothing(primitive, tokens, state, size):
    """Whichever of the allocations of an update fails, first or second."""
    for call in (1, 2, 3):
        backend = _Poor()
        cache, oracle = state(
            RotatingKVCache(size, 2, backend, 2) if size else KVCache(backend, step=2)
        )
        before = cache.offset, cache.len, cache.can_trim(1)
        backend.failing, backend.left = primitive, call
        keys, values = SHAPE.keys(tokens, 900), SHAPE.values(tokens, 900)
        try:
            cache.update(keys, values)
        except MemoryError:
            backend.failing = ""
            assert (cache.offset, cache.len, cache.can_trim(1)) == before
            check_whole(cache, oracle)
            push(cache, oracle, 3)
            if state is drafting:
                cache.rollback(1)
                oracle.cut(12)
                check_whole(cache, oracle)


class _Poor(type(kvcache.get_backend("numpy"))):
    """NumPy, but `failing` runs out of memory when it has been called `left` times."""

    failing, left = "", 0

    def _count(self, primitive):
        if primitive == self.failing:
            self.left -= 1
            if self.left == 0:
                raise MemoryError(primitive)

    def alloc(self, shape, dtype):
        self._count("alloc")
        return super().alloc(shape, dtype)

    def concat(self, arrays, axis):
        self._count("concat")
        return super().concat(arrays, axis)

    def read_rows(self, buffer, index, axis):
        self._count("read_rows")
        return super().read_rows(buffer, index, axis)
