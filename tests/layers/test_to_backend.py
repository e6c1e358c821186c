"""Per-layer caches that change the framework: every bit crosses, and both go on on their own."""

from typing import Any

import numpy as np
import pytest

import kvcache
from kvcache import CacheConfig, KVCache, RotatingKVCache, get_backend
from kvcache.backends._numpy import NumpyBackend

from .oracle import (
    Shape,
    check_columns,
    check_state,
    check_whole,
    fingerprint,
    held_columns,
    oracle_for,
    push,
)

KINDS = {
    "kv": lambda *args, **rest: KVCache(*args, step=8, **rest),
    "rotating": lambda *args, **rest: RotatingKVCache(11, 2, *args, step=4, **rest),
}
DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def installed():
    found = []
    for spec in ("numpy", "torch", "jax", "mlx", "array_api:array_api_strict"):
        try:
            found.append(get_backend(spec))
        except ImportError:
            continue
    return found


@pytest.fixture(params=installed(), ids=lambda backend: backend.name)
def target(request):
    """Each backend that is installed, in turn: the other end."""
    return request.param


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


def test_every_bit_crosses_and_both_go_on(backend, target, kind):
    for dtype in DTYPES:
        if dtype in backend.dtypes and dtype in target.dtypes:
            cross(backend, target, kind, Shape(dtype=dtype))


def cross(backend, target, kind, shape):
    """The ring has turned by then, the growing cache has spare room."""
    cache = kind(backend)
    oracle = oracle_for(cache)
    push(cache, oracle, 17, shape)
    push(cache, oracle, 1, shape)
    before = fingerprint(cache)
    twin, twins = cache.to_backend(target), oracle.copy()
    assert fingerprint(cache) == before
    assert type(twin) is type(cache)
    assert (twin.backend, twin.dtype) == (target, shape.dtype)
    check_whole(twin, twins)
    check_columns(twin, twins, held_columns(twin), 1)
    push(twin, twins, 1, shape, stamp=900)
    push(twin, twins, 3, shape, stamp=901)
    assert fingerprint(cache) == before
    after = fingerprint(twin)
    push(cache, oracle, 1, shape)
    push(cache, oracle, 3, shape)
    check_whole(cache, oracle)
    assert fingerprint(twin) == after
    check_whole(twin, twins)


@pytest.mark.parametrize("tokens", [(5,), (1, 40)])
def test_goes_on_as_without(backend, target, kind, tokens):
    """Before the ring is full, and in the middle of a turn."""
    cache = kind(backend)
    oracle = oracle_for(cache)
    for count in tokens:
        push(cache, oracle, count)
    twin, twins = cache.to_backend(target), oracle.copy()
    for count in (1, 1, 3):
        push(cache, oracle, count)
        push(twin, twins, count)
    assert [twin.can_trim(n) for n in range(9)] == [cache.can_trim(n) for n in range(9)]
    twin.checkpoint()
    push(twin, twins, 3, stamp=700)
    twin.rollback(1)
    twins.cut(oracle.offset + 1)
    check_whole(twin, twins)
    check_whole(cache, oracle)


def test_trimmed_tokens_stay_behind(backend, target):
    cache = KVCache(backend)
    oracle = oracle_for(cache)
    push(cache, oracle, 10)
    cache.trim(6)
    oracle.cut(4)
    twin = cache.to_backend(target)
    check_whole(twin, oracle)
    push(twin, oracle.copy(), 2, stamp=60)
    cache.trim(4)
    oracle.cut(0)
    check_whole(cache.to_backend(target), oracle)


def test_a_checkpoint_stays_behind(backend, kind):
    cache = kind(backend)
    oracle = oracle_for(cache)
    push(cache, oracle, 12)
    cache.checkpoint()
    push(cache, oracle, 3, stamp=100)
    with pytest.raises(kvcache.TrimError, match="needs an open checkpoint"):
        cache.to_backend("numpy").rollback()
    cache.rollback()
    oracle.cut(12)
    check_whole(cache, oracle)


def test_before_its_first_update(target):
    cache = RotatingKVCache(9, 3, step=2, dtype="float32")
    twin = cache.to_backend(target)
    assert (twin.backend, cache.backend) == (target, None)
    assert (twin.max_size, twin.keep, twin.dtype, twin.offset) == (9, 3, "float32", 0)
    oracle = oracle_for(twin)
    push(twin, oracle, 12)
    check_whole(twin, oracle)


def test_a_reset_leaves_it_there(target):
    cache = KVCache()  # takes the backend of its first array, again and again
    cache.update(Shape().keys(4, 0), Shape().values(4, 0))
    twin = cache.to_backend(target)
    for each in (cache, twin):
        each.reset()
    assert (cache.backend, twin.backend) == (None, target)


class NoFloat8(NumpyBackend):
    def _framework_dtypes(self):
        return {n: d for n, d in super()._framework_dtypes().items() if "float8" not in n}


@pytest.mark.parametrize("named", [None, "float8_e5m2"])
def test_a_dtype_that_the_other_lacks(backend, kind, named):
    if "float8_e5m2" not in backend.dtypes:
        pytest.skip(f"{backend.name} has no float8 either")
    cache = kind(backend, dtype=named)
    push(cache, oracle_for(cache), 13, Shape(dtype="float8_e5m2"))
    before = fingerprint(cache)
    with pytest.raises(kvcache.DTypeError, match="numpy has no dtype 'float8_e5m2'; it has"):
        cache.to_backend(NoFloat8())
    assert fingerprint(cache) == before


def test_an_unknown_backend(kind):
    with pytest.raises(kvcache.UnknownBackendError, match="no backend is called 'pen'"):
        kind("numpy").to_backend("pen")


class NoHost(NumpyBackend):
    """Whose arrays must not take the way through the host."""

    def to_host(self, array):
        raise AssertionError("a copy through the host")


def test_nothing_goes_through_the_host_where_dlpack_does(target):
    cache = KVCache(NoHost())
    oracle = oracle_for(cache)
    keys, values = Shape().keys(5, 0), Shape().values(5, 0)
    cache.update(keys, values)
    push(KVCache("numpy"), oracle, 5)
    check_whole(cache.to_backend(target), oracle)


class FarArray(np.ndarray[Any, Any]):
    """As if it were on a device of its own."""


class Far(NumpyBackend):
    """Whose from_dlpack leaves an array where it was."""

    def __init__(self):
        super().__init__()
        self.device = "far"

    @staticmethod
    def device_of(array):
        return "far" if isinstance(array, FarArray) else "cpu"

    def alloc(self, *args):
        return super().alloc(*args).view(FarArray)

    def from_host(self, *args):
        return super().from_host(*args).view(FarArray)

    def concat(self, *args):
        return super().concat(*args).view(FarArray)


def test_another_device_of_one_framework(kind):
    cache = kind("numpy")
    oracle = oracle_for(cache)
    push(cache, oracle, 14)
    twin, twins = cache.to_backend(Far()), oracle.copy()
    assert all(type(part) is FarArray for part in twin.state)
    push(twin, twins, 1)
    check_whole(twin, twins)


class PaddedWhole(NumpyBackend):
    config = CacheConfig(padding=8, mask_dtype="float32")
    slices_are_views = False


def test_other_configurations(backend, kind):
    """There and back, between backends that hand out other lengths."""
    cache = kind(backend)
    oracle = oracle_for(cache)
    push(cache, oracle, 13)
    there = cache.to_backend(PaddedWhole())
    assert len(push(there, oracle, 1)) % 8 == 0
    back = there.to_backend(backend)
    push(back, oracle, 9)
    check_whole(back, oracle)


class Late(NumpyBackend):
    """Reads and writes nothing before it is synced: as late as a framework may."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def write_slices(self, buffers, *update):
        write = super().write_slices
        self.waiting.append(lambda: write(buffers, *update))
        return buffers

    def sync(self, *arrays):
        while self.waiting:
            self.waiting.pop(0)()


def test_who_goes_on_at_once_disturbs_nobody(kind):
    """Frameworks that compute in the background have read everything on return."""
    cache = kind("numpy")
    oracle = oracle_for(cache)
    push(cache, oracle, 7)
    twin, twins = cache.to_backend(Late()), oracle.copy()
    cache.trim(7)
    oracle.cut(0)
    push(cache, oracle, 7, stamp=300)
    check_state(twin, twins)


def test_what_is_still_to_be_written_comes_along():
    cache, oracle = KVCache(Late()), oracle_for(KVCache())
    push(KVCache("numpy"), oracle, 7)
    cache.update(Shape().keys(7, 0), Shape().values(7, 0))
    check_whole(cache.to_backend("numpy"), oracle)
