"""Multi-sequence caches that change the framework: the same sequences, and each goes on alone."""

from __future__ import annotations

import numpy as np
import pytest

from kvcache import (
    Batch,
    CacheConfig,
    CacheFullError,
    CausalCache,
    DTypeError,
    EncoderCache,
    KVCacheError,
    RoPEShift,
    UnknownBackendError,
    WrapperCache,
    get_backend,
)
from kvcache.backends._numpy import NumpyBackend
from kvcache.pool.cells import CellTable
from kvcache.testing.coded import coded

from .. import peek
from .oracle import check_table, fingerprint

DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
LIMITS = {
    "all": {},
    "window": {"window": 3},
    "memory": {"window": 2, "memory": 5},
    "chunk": {"chunk": 4},
}
SIZES = {"max_sequences": 3, "capacity": 12, "max_batch": 8}


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


class NoFloat8(NumpyBackend):
    def _framework_dtypes(self):
        return {n: d for n, d in super()._framework_dtypes().items() if "float8" not in n}


class Turned(NumpyBackend):
    """Lays out everything otherwise than all the others, in lengths of seven."""

    config = CacheConfig(padding=7, key_layout="thd", value_layout="hdt", mask_dtype="float32")


class Late(NumpyBackend):
    """Writes nothing before it is synced: as late as a framework may."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def write_slice(self, buffer, *update):
        write = super().write_slice
        self.waiting.append(lambda: write(buffer, *update))
        return buffer

    def sync(self, *arrays):
        while self.waiting:
            self.waiting.pop(0)()


def both(*backends):
    """The dtypes that all of them have."""
    return [dtype for dtype in DTYPES if all(dtype in each.dtypes for each in backends)]


def made(backend, dtype="float32", cache=None, **limits):
    cache = cache or CausalCache(**limits)
    cache.init(backend, dtype, **SIZES)
    return cache


def turn(cache, array, layout):
    """An array laid out as ``htd`` the way a cache wants it, in its backend; and back."""
    return peek.buffers(cache).backend.from_host(array.transpose(["htd".index(a) for a in layout]))


def turned_back(cache, array, layout):
    return peek.buffers(cache).backend.to_host(array).transpose([layout.index(a) for a in "htd"])


def step(cache, pairs, stamp):
    """A pass of ``(sequence, position)``; returns the bytes that each of its tokens attends to.

    Layer 0 has keys and values, layer 1 only keys; every element encodes where it belongs.
    """
    buffers, config = peek.buffers(cache), peek.config(cache)
    sequences, positions = zip(*pairs, strict=True)
    cache.start_forward(Batch(positions, sequences))
    keys, values = (
        coded((1, heads, len(pairs), width), buffers.dtype, stamp)[0]
        for heads, width in ((2, 3), (2, 5))
    )
    seen = []
    for layer in range(2):
        cache.set_layer(layer)
        put = turn(cache, keys, config.key_layout), turn(cache, values, config.value_layout)
        cache.put(*put[: 2 - layer])
        got_keys, got_values, mask = cache.get()
        parts = [turned_back(cache, got_keys, config.key_layout)]
        if layer == 0:
            parts.append(turned_back(cache, got_values, config.value_layout))
        visible = buffers.backend.to_host(mask)
        visible = visible if visible.dtype == bool else visible == 0
        seen += [
            sorted(p[:, i].tobytes() for p in parts for i in np.flatnonzero(v)) for v in visible
        ]
    return seen


def lived_in(cache):
    """A life: prompts, steps, a shared prefix, one sequence gone, another cut short."""
    step(cache, [(0, p) for p in range(6)], 0)
    step(cache, [(1, p) for p in range(4)] + [(0, 6)], 10)
    cache.copy_prefix(0, 2, 5)
    step(cache, [(0, 7), (1, 4), (2, 5)], 20)
    cache.remove(1, 0)
    cache.remove(0, 7)
    step(cache, [(0, 7), (1, 0), (2, 6)], 30)
    return cache


GOING_ON = [
    [(2, 7)],
    [(0, 8), (1, 1), (2, 8)],
    [(1, 2), (1, 3), (1, 4), (0, 9)],
    [(2, 9)],
    [(0, 10), (2, 10)],
]


def go_on(cache, stamp=100):
    return [step(cache, pairs, stamp + 10 * i) for i, pairs in enumerate(GOING_ON)]


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_goes_on_as_without(backend, target, limits):
    for dtype in both(backend, target) if limits == LIMITS["window"] else ["float32"]:
        cache = lived_in(made(backend, dtype, **limits))
        before = fingerprint(cache)
        twin = cache.to_backend(target)
        assert fingerprint(cache) == before
        check_moved(cache, twin, target)
        after = fingerprint(twin)
        alone = go_on(cache)
        assert fingerprint(twin) == after
        after = fingerprint(cache)
        assert go_on(twin) == alone
        twin.copy_prefix(2, 1, 20)
        assert fingerprint(cache) == after
        cache.copy_prefix(2, 1, 20)
        found = [[each.can_resume(s, p) for s, p in np.ndindex(3, 12)] for each in (cache, twin)]
        assert found[0] == found[1]


def check_moved(cache, twin, target):
    """The same cells hold the same bytes."""
    old, new = peek.buffers(cache), peek.buffers(twin)
    assert type(twin) is type(cache)
    assert (new.backend, new.dtype) == (target, old.dtype)
    assert (twin.window, twin.memory, twin.chunk) == (cache.window, cache.memory, cache.chunk)
    assert twin.cells >= cache.cells
    assert twin.cells % peek.config(twin).padding == 0
    assert peek.layers(twin).keys() == peek.layers(cache).keys()
    for layer, pair in peek.layers(cache).items():
        for one, other in zip(pair, peek.layers(twin)[layer], strict=True):
            held = target.to_host(other)[:, : cache.cells]
            assert held.tobytes() == old.backend.to_host(one).tobytes()
    check_table(peek.table(twin))
    for sequence in range(SIZES["max_sequences"]):
        assert (
            peek.table(twin).cells_of(sequence).tolist()
            == peek.table(cache).cells_of(sequence).tolist()
        )


def test_a_larger_pool_can_be_filled(target):
    cache = lived_in(made("numpy"))
    twin = cache.to_backend(target)
    while peek.table(twin).free:
        tokens = min(64, peek.table(twin).free)
        at = peek.table(twin).next_position(1)
        step(twin, [(1, at + i) for i in range(tokens)], at)
        check_table(peek.table(twin))
    with pytest.raises(CacheFullError, match=f"1 needed, 0 of {twin.cells} free"):
        twin.start_forward(Batch([20], [0]))


@pytest.mark.parametrize("more", [0, 1, 5])
def test_a_table_grows(more):
    """Whatever was taken and freed before: all free cells can be had, each once."""
    table = CellTable(6, 2)
    for positions, sequence in (([0, 1, 2], 0), ([0, 1], 1)):
        groups = table.group(
            np.array(positions, np.int32), np.full(len(positions), sequence, np.int32)
        )
        table.insert(groups)
    table.truncate(0, 1)
    larger = table.copy(6 + more)
    check_table(larger)
    assert [larger.cells_of(s).tolist() for s in (0, 1)] == [
        table.cells_of(s).tolist() for s in (0, 1)
    ]
    left = larger.free
    assert left == 3 + more
    new = np.arange(2, 2 + left, dtype=np.int32)
    larger.insert(larger.group(new, np.ones_like(new)))
    check_table(larger)
    check_table(table)
    assert (larger.free, table.free) == (0, 3)


def test_there_and_back_in_other_layouts(backend):
    """Layouts, lengths and masks are those of where it is."""
    cache = lived_in(made(backend, window=4))
    there = cache.to_backend(Turned())
    assert peek.config(there) == Turned.config
    assert there.cells % 7 == 0
    back = there.to_backend(backend)
    expected = go_on(cache)
    assert go_on(there) == expected
    assert go_on(back) == expected


def test_what_the_model_has_set_stays(target):
    config = CacheConfig(padding=5, key_layout="thd", mask_dtype="float32")
    cache = CausalCache()
    cache.set_config(config)
    lived_in(made("numpy", cache=cache))
    twin = cache.to_backend(target)
    assert peek.config(twin) == config
    assert twin.cells == cache.cells
    assert go_on(twin) == go_on(cache)


def test_a_pass_stays_behind(backend):
    cache = lived_in(made(backend))
    cache.set_causal([0])
    twin = cache.to_backend("numpy")
    with pytest.raises(KVCacheError, match="Call start_forward first"):
        twin.get()
    cache.set_layer(0)
    assert cache.get()[2].shape[0] == 3


def test_what_was_lent_comes_along(backend):
    """`state` changes hands on JAX, and is where the tokens are then."""
    cache, other = (
        lived_in(made(backend, both(backend)[-1])),
        lived_in(made(backend, both(backend)[-1])),
    )
    cache.program_state = dict(cache.program_state)
    twin = cache.to_backend("numpy")
    assert go_on(twin) == go_on(other)


def test_removal_from_the_middle(target):
    shift = RoPEShift(100.0 ** -np.arange(0, 1, 0.5))
    cache = CausalCache(shift=shift)
    cache.init("numpy", capacity=16, max_batch=8)
    keys = np.random.default_rng(0).normal(size=(2, 8, 4)).astype(np.float32)
    cache.start_forward(Batch(range(8), [0] * 8))
    cache.put(keys, keys)
    twin = cache.to_backend(target)
    rows = []
    for each in (cache, twin):
        each.remove(0, 2, 5)
        backend = peek.buffers(each).backend
        rows.append(backend.to_host(peek.layers(each)[0][0])[:, peek.table(each).cells_of(0)])
        assert each.can_resume(0, 5)
    np.testing.assert_allclose(rows[1], rows[0], atol=1e-6)


@pytest.mark.parametrize("kind", [CausalCache, EncoderCache, lambda: WrapperCache(CausalCache())])
def test_before_init(kind, target):
    cache = kind()
    twin = cache.to_backend(target)
    twin.set_config(CacheConfig(padding=2))
    for each in (twin, cache):
        with pytest.raises(KVCacheError, match="init"):
            each.start_forward(Batch([0], [0]))
    twin.init(target, capacity=4, max_batch=4)
    twin.start_forward(Batch([0], [0]))
    with pytest.raises(KVCacheError, match="init"):
        cache.start_forward(Batch([0], [0]))
    with pytest.raises(UnknownBackendError, match="no backend is called 'pen'"):
        cache.to_backend("pen")


def test_a_dtype_that_the_other_lacks():
    wrapper = made("numpy", "float8_e5m2", WrapperCache(CausalCache(), EncoderCache()))
    causal, encoder = wrapper.caches
    lived_in(causal)
    for cache in (causal, encoder, wrapper):
        before = fingerprint(causal)
        with pytest.raises(DTypeError, match="numpy has no dtype 'float8_e5m2'; it has"):
            cache.to_backend(NoFloat8())
        assert fingerprint(causal) == before


def test_who_goes_on_at_once_disturbs_nobody():
    """Frameworks that compute in the background have read everything on return."""
    cache = lived_in(made("numpy"))
    twin = cache.to_backend(Late())
    for one, other in zip(peek.layers(cache)[0], peek.layers(twin)[0], strict=True):
        assert one.tobytes() == other.tobytes()


def test_nothing_goes_through_the_host_where_dlpack_does(target, monkeypatch):
    causal, encoder = lived_in(made("numpy")), made("numpy", cache=EncoderCache())
    arrive(encoder, 0, 0)
    expected = go_on(causal.to_backend(target)), heard(encoder.to_backend(target), [0])
    source = NumpyBackend()
    monkeypatch.setattr(source, "to_host", None)
    peek.buffers(causal).backend = encoder._backend = source
    moved = causal.to_backend(target), encoder.to_backend(target)
    assert (go_on(moved[0]), heard(moved[1], [0])) == expected


# Encoders.


def arrive(cache, sequence, stamp, position=0):
    backend, dtype = cache._backend, cache._dtype
    cache.start_forward(Batch([position], [sequence], [0]))
    for layer in range(2):
        cache.set_layer(layer)
        keys, values = (coded((1, 2, 4, width), dtype, stamp + layer)[0] for width in (3, 5))
        cache.put(backend.from_host(keys), backend.from_host(values))


def heard(cache, *sequences):
    """What passes of some sequences get, in bytes."""
    found = []
    for ids in sequences or ([0], [1], [0, 1, 2]):
        cache.start_forward(Batch([9] * len(ids), ids))
        for layer in range(2):
            cache.set_layer(layer)
            found += [
                None if p is None else cache._backend.to_host(p).tobytes() for p in cache.get()
            ]
    return found


def test_encoder_output(backend, target):
    for dtype in both(backend, target):
        cache = EncoderCache()
        cache.init(backend, dtype, max_sequences=3)
        arrive(cache, 0, 0)
        arrive(cache, 1, 50, position=3)
        cache.copy_prefix(0, 2, 1)
        cache.start_forward(Batch([9], [0]))
        expected = heard(cache)
        twin = cache.to_backend(target)
        with pytest.raises(KVCacheError, match="Call start_forward first"):
            twin.get()
        assert heard(twin) == expected
        assert peek.entries(twin)[2].layers[0][0] is peek.entries(twin)[0].layers[0][0]
        arrive(twin, 0, 200)
        twin.remove(1, 0)
        assert heard(cache) == expected
        again = cache.to_backend(target)
        arrive(cache, 0, 300)
        cache.remove(1, 0, 2)  # its position moves
        assert heard(again) == expected
        again.remove(1, 0, 3)
        assert heard(again) == expected
        cache.close()
        assert heard(again) == expected


# Several.


def test_a_wrapper_moves_all(backend, target):
    wrapper = made(backend, "float32", WrapperCache(EncoderCache(), CausalCache(window=3)))
    encoder, causal = wrapper.caches
    arrive(encoder, 0, 0)
    arrive(encoder, 1, 0)
    arrive(encoder, 2, 0)
    lived_in(causal)
    wrapper.set_layer_type(1)
    twin = wrapper.to_backend(target)
    assert type(twin) is WrapperCache
    assert twin.underlying_cache is twin.caches[1]
    assert [type(cache) for cache in twin.caches] == [EncoderCache, CausalCache]
    assert heard(twin.caches[0]) == heard(encoder)
    assert go_on(twin.caches[1]) == go_on(causal)
    twin.close()
    assert causal.can_resume(0, 11)
    assert wrapper.caches == (encoder, causal)
