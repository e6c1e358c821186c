"""Copies and pickles of multi-sequence caches: the same sequences, and each goes on alone."""

import copy
import pickle
import subprocess
import sys

import pytest

from kvcache import (
    Batch,
    CausalCache,
    EncoderCache,
    KVCacheError,
    NotSupportedError,
    PrefixCache,
    RoPEShift,
    UnknownBackendError,
    WrapperCache,
    get_backend,
)
from kvcache.backends._numpy import NumpyBackend
from kvcache.testing.coded import coded

DTYPES = ("float32", "bfloat16", "float8_e4m3fn")
WAYS = {
    "copy": lambda cache: cache.copy(),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}
KINDS = {
    "causal": lambda: CausalCache(window=4, shift=RoPEShift([1.0])),
    "wrapper": lambda: WrapperCache(EncoderCache(), CausalCache(), CausalCache(window=3)),
}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def way(request):
    return request.param


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


def initialised(cache, backend, dtype):
    cache.init(backend, dtype, max_sequences=2, capacity=16, max_batch=8)
    return cache


def parts(cache):
    return cache.caches if isinstance(cache, WrapperCache) else (cache,)


def store(cache, backend, dtype, positions, stamp, sequence=0):
    """A pass whose keys and values carry `stamp`."""
    positions = list(positions)
    cache.start_forward(Batch(positions, [sequence] * len(positions)))
    for part in parts(cache):
        keys = coded((1, 2, len(positions), 2), dtype, stamp)[0]
        part.put(backend.from_host(keys), backend.from_host(keys))


def content(cache, backend, positions, sequence=0):
    """Every byte that a pass of `positions` reads, without storing anything."""
    snapshot = cache.snapshot(sequence)
    with snapshot:
        return [
            [array.data.tobytes() for arrays in part.rows.to_host().values() for array in arrays]
            for part in snapshot.parts
        ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_sequences_and_each_goes_on_alone(backend, kind, way, dtype):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    cache = initialised(kind(), backend, dtype)
    store(cache, backend, dtype, range(3), 10)
    cache.copy_prefix(0, 1, 2)
    before = content(cache, backend, 0)
    other = way(cache)
    assert type(other) is type(cache)
    assert other.backend is cache.backend
    assert len({part.lock for part in (*parts(other), other)}) == 1
    assert other.lock is not cache.lock
    assert content(other, backend, 0) == before
    assert content(other, backend, 0, 1) == content(cache, backend, 0, 1)
    store(other, backend, dtype, [3], 500)
    assert content(cache, backend, 0) == before
    assert cache.next_position(0) == 3
    changed = content(other, backend, 0)
    store(cache, backend, dtype, [3], 900)
    assert content(other, backend, 0) == changed
    assert content(cache, backend, 0) != changed
    other.close()
    assert cache.next_position(0) == 4


def test_before_init(kind, way):
    other = way(kind())
    assert other.backend is None
    initialised(other, "numpy", "float32")
    store(other, get_backend("numpy"), "float32", range(2), 0)
    assert other.next_position(0) == 2


def test_snapshots_stay_with_the_original(way):
    backend = get_backend("numpy")
    cache = initialised(CausalCache(), backend, "float32")
    store(cache, backend, "float32", range(3), 10)
    before = content(cache, backend, 0)
    with cache.snapshot(0) as snapshot:
        other = way(cache)
        other.remove(0, 0)
        store(other, backend, "float32", range(6), 700)
        assert snapshot.resident
        cache.remove(0, 0)
        cache.restore(0, snapshot)
    assert content(cache, backend, 0) == before


class Unnamed(NumpyBackend):
    """No name leads to it."""


def test_a_backend_that_is_not_there():
    cache = initialised(CausalCache(), Unnamed(), "float32")
    assert type(copy.deepcopy(cache).backend) is Unnamed
    with pytest.raises(NotSupportedError, match=r"names its backend, .* lead to Unnamed.*register"):
        pickle.dumps(cache)
    data = pickle.dumps(initialised(CausalCache(), "numpy", "float32"))
    with pytest.raises(UnknownBackendError, match="no backend is called 'gone!'"):
        pickle.loads(data.replace(b"numpy:cpu", b"gone!:cpu"))


def test_another_process_reads_it(tmp_path):
    backend = get_backend("numpy")
    cache = initialised(CausalCache(), backend, "bfloat16")
    store(cache, backend, "bfloat16", range(3), 10)
    path = tmp_path / "cache"
    path.write_bytes(pickle.dumps(cache))
    program = (
        f"import pickle; c = pickle.load(open({str(path)!r}, 'rb')); print(c.next_position(0))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "3", result.stderr


def test_what_is_never_copied(way):
    cache = initialised(CausalCache(), "numpy", "float32")
    prefix = PrefixCache(cache)
    with prefix.session([1, 2]) as session:
        for thing, name in ((prefix, "a PrefixCache"), (session, "a Session")):
            if hasattr(thing, "copy") or way is not WAYS["copy"]:
                with pytest.raises(NotSupportedError, match=f"{name} is not copied or pickled"):
                    way(thing)


FORK = """
import os, signal, threading
import numpy as np
from kvcache import Batch, CausalCache, PrefixCache

cache = CausalCache()
cache.init("numpy", capacity=8, max_batch=8)
token = np.ones((1, 1, 2), np.float32)
cache.start_forward(Batch([0], [0]))
cache.put(token, token)
prefix = PrefixCache([__import__("kvcache").KVCache("numpy")])
held, forked = threading.Event(), threading.Event()

def hold():
    with cache.lock, prefix.lock:
        held.set()
        forked.wait()

thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if not child:
    signal.alarm(60)  # instead of hanging
    cache.start_forward(Batch([1], [0]))
    cache.put(token, token)
    with prefix.session([1, 2]):
        pass
    os._exit(0 if cache.next_position(0) == 2 else 1)
forked.set()
thread.join()
_, status = os.waitpid(child, 0)
assert status == 0, status
with cache.lock:  # held by the thread that forks: it stays held, and can be released
    child = os.fork()
if not child:
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
print("done")
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="there is no fork here")
def test_a_fork_while_another_thread_holds_the_lock():
    command = [sys.executable, "-W", "ignore", "-c", FORK]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert result.stdout.strip() == "done", result.stderr


def test_a_copy_of_what_says_no_backend():
    class Mute(EncoderCache):
        backend = property(lambda self: super(EncoderCache, self).backend)

    with pytest.raises(NotSupportedError, match="Mute does not say which backend it is on"):
        copy.copy(Mute())


# copy_prefix of a sequence of which one cache holds nothing.


def test_a_prefix_that_one_cache_holds_nothing_of():
    numpy = get_backend("numpy")
    wrapper = WrapperCache(CausalCache(window=3, chunk=4), CausalCache())
    wrapper.init(numpy, max_sequences=3, capacity=32, max_batch=16)
    for first in (0, 4, 8):
        store(wrapper, numpy, "float32", range(first, first + 4), first)
    store(wrapper, numpy, "float32", [12], 12)
    wrapper.remove(0, 4)  # a chunk begins there, and the window holds nothing before it
    assert wrapper.can_resume(0, 4)
    wrapper.copy_prefix(0, 1, 4)
    assert [wrapper.can_resume(1, p) for p in range(6)] == [
        wrapper.can_resume(0, p) for p in range(6)
    ]
    assert wrapper.next_position(1) == 4
    with pytest.raises(ValueError, match="needs a source that holds tokens; 2 is empty"):
        wrapper.copy_prefix(2, 1, 4)
    with pytest.raises(KVCacheError):
        WrapperCache(CausalCache()).copy_prefix(0, 1, 1)
