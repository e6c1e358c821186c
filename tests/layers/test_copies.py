"""Copies and pickles of per-layer caches, subclasses of users among them, and of snapshots."""

import copy
import pickle

import pytest

from kvcache import KVCache, LayerCaches, NotSupportedError, RotatingKVCache
from kvcache.layers.base import LayerCache

from .oracle import Shape, check_whole, host_rows, oracle_for, push

DTYPES = ("float32", "bfloat16", "float8_e4m3fn")
WAYS = {
    "copy": lambda cache: cache.copy(),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


class Scaled(RotatingKVCache):
    """A subclass that keeps the constructor of its base, and has no kind of its own."""


class Fixed(KVCache):
    """A constructor of its own, and so options of its own."""

    def __init__(self, name, backend=None):
        super().__init__(backend, step=4)
        self.name = name

    @property
    def options(self):
        return {"name": self.name}


class Stubborn(KVCache):
    """A constructor of its own, and nothing that says so."""

    def __init__(self, name):
        super().__init__("numpy")
        self.name = name


class Failing(KVCache):
    """Takes the options; the error is one within."""

    def __init__(self, backend=None, step=256, dtype=None):
        super().__init__(backend, step, dtype)
        if dtype is not None:
            raise TypeError("of its own")


KINDS = {
    "kv": lambda backend: KVCache(backend, step=8),
    "rotating": lambda backend: RotatingKVCache(6, 2, backend),
    "subclass": lambda backend: Scaled(5, backend=backend),
    "options": lambda backend: Fixed("it", backend),
}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def way(request):
    return request.param


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_tokens_and_each_goes_on_alone(backend, kind, way, dtype):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    shape, cache = Shape(dtype=dtype), kind(backend)
    oracle = oracle_for(cache)
    for tokens in (3, 5, 1):
        push(cache, oracle, tokens, shape)
    other, others = way(cache), oracle.copy()
    assert type(other) is type(cache)
    assert other.backend is backend
    assert other.options == cache.options
    check_whole(other, others)
    push(other, others, 2, shape, stamp=700)
    check_whole(cache, oracle)
    push(cache, oracle, 3, shape, stamp=900)
    check_whole(other, others)
    other.reset()
    check_whole(cache, oracle)


def test_an_empty_cache(kind, way):
    for backend in (None, "numpy"):
        other = way(kind(backend))
        assert (other.offset, other.state) == (0, ())
        assert (other.backend is None) == (backend is None)


def test_layers_that_share_a_cache_share_its_copy(way):
    one, two = KVCache("numpy"), RotatingKVCache(4, backend="numpy")
    oracle = oracle_for(one)
    push(one, oracle, 3)
    push(two, oracle_for(two), 3)
    first, second, again = way(LayerCaches([one, two, one]))
    assert first is again
    assert first is not one
    assert type(second) is RotatingKVCache
    push(first, oracle.copy(), 1, stamp=800)
    check_whole(one, oracle)


@pytest.mark.parametrize("form", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_cache_that_occurs_twice_is_copied_once(form):
    cache = KVCache("numpy")
    one, two = form([cache, cache])
    assert one is two
    assert one is not cache


def test_a_snapshot_is_closed_apart_from_its_copy(backend, way):
    cache = KVCache(backend)
    oracle = oracle_for(cache)
    push(cache, oracle, 5)
    snapshot = cache.snapshot()
    other = way(snapshot)
    assert snapshot.resident
    assert other.resident == (way is not WAYS["pickle"])
    snapshot.close()
    cache.trim(5)
    push(cache, oracle_for(cache), 5, stamp=700)
    restored = KVCache(backend)
    restored.restore(other)
    check_whole(restored, oracle)
    other.close()


def test_a_constructor_that_nothing_is_known_of(way, tmp_path):
    cache = Stubborn("it")
    push(cache, oracle_for(cache), 2)
    before = host_rows(cache.backend, cache.state)
    match = r"that of Stubborn takes \(name\).*Override the property `options`, or the classmethod"
    for call in (way, lambda c: c.to_backend("numpy")):
        with pytest.raises(NotSupportedError, match=match):
            call(cache)
    cache.save(tmp_path / "file")
    with pytest.raises(NotSupportedError, match=match):
        Stubborn.load(tmp_path / "file")
    assert host_rows(cache.backend, cache.state) == before
    with pytest.raises(TypeError, match="of its own"):
        Failing.make(None, {"dtype": "float32"})


def test_a_subclass_loads_files_of_its_base(tmp_path):
    cache = Scaled(5, backend="numpy")
    oracle = oracle_for(cache)
    push(cache, oracle, 7)
    cache.save(tmp_path / "file")
    for kind in (Scaled, RotatingKVCache):
        loaded = kind.load(tmp_path / "file")
        assert type(loaded) is kind
        check_whole(loaded, oracle)
    assert type(LayerCaches.load(tmp_path / "file")[0]) is RotatingKVCache


def test_a_cache_without_a_kind(tmp_path):
    """It is copied; only files and snapshots need the name."""

    def unused(self, *arguments):
        raise AssertionError

    names = LayerCache.__abstractmethods__ - {"copy", "offset", "options"}
    body = dict.fromkeys(names, unused) | {"offset": 1, "options": {}}
    kindless = type("Kindless", (LayerCache,), body | {"copy": lambda self: type(self)()})
    cache = kindless()
    assert type(copy.copy(cache)) is kindless
    for call in (LayerCaches([cache]).snapshot, lambda: LayerCaches([cache]).save(tmp_path / "f")):
        with pytest.raises(NotSupportedError, match=r"Kindless has none\. Set the class attribute"):
            call()
