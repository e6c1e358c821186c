"""Tests of sharded caches, run by `test_jax.py` where there are eight devices."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest

import kvcache
from kvcache import (
    Batch,
    CausalCache,
    EncoderCache,
    KVCache,
    LayerCaches,
    PrefixCache,
    RecurrentCache,
    RoPEShift,
    RotatingKVCache,
    StateCache,
    functional,
    get_backend,
)
from kvcache.adapters.jax import init, update
from kvcache.backends import HOST_DTYPES

jax = pytest.importorskip("jax")
jnp = jax.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

from .test_jax import COLLECTIVES, copies  # noqa: E402

BATCH, HEADS, DIM = 4, 8, 4
# Devices along "data" and "model", and what each divides.
PARTITIONS = {
    "heads": ((1, 8), (None, "model")),
    "batch": ((4, 2), ("data",)),
    "both": ((2, 4), ("data", "model")),
}


def sharded(partition="both", types="Auto"):
    """The sharding of keys, of a mesh whose axes are of these types."""
    sizes, spec = PARTITIONS[partition]
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(getattr(AxisType, types),) * 2)
    return NamedSharding(mesh, PartitionSpec(*spec))


def backend_for(*arguments):
    return get_backend("jax", sharding=sharded(*arguments))


@pytest.fixture(params=PARTITIONS)
def partition(request):
    return request.param


@pytest.fixture(params=[("both", "Auto"), ("heads", "Explicit")], ids="-".join)
def backend(request):
    return backend_for(*request.param)


def coded(positions, batch=BATCH, heads=HEADS):
    """Keys whose numbers say where they belong; values are their negatives."""
    keys = np.zeros((batch, heads, len(positions), DIM), np.float32)
    keys[..., 0] = np.arange(batch)[:, None, None]
    keys[..., 1] = np.arange(heads)[:, None]
    keys[..., 2] = np.asarray(positions)
    return keys


def placed(backend, array, dtype="float32", axes="bhtd"):
    """An array as a model has it: divided as the cache is."""
    return backend.from_host_axes(array.astype(HOST_DTYPES[dtype]), axes)


def push(cache, backend, tokens, dtype="float32"):
    """Updates a cache with the next tokens, and checks what comes back."""
    new = coded(range(cache.offset, cache.offset + tokens))
    pair = cache.update(placed(backend, new, dtype), placed(backend, -new, dtype))
    check(cache, backend, pair)
    return pair


def check(cache, backend, pair):
    """Keys, values and mask of the last token are right, and lie where they are to."""
    held = np.flatnonzero(cache.positions >= 0)
    positions = cache.positions[held]
    for array, sign in zip(pair, (1, -1), strict=True):
        assert array.sharding.is_equivalent_to(backend.sharding, 4)
        host = backend.to_host(array)[:, :, held].astype(np.float32)
        np.testing.assert_array_equal(host, sign * coded(positions))
    mask = cache.mask(1)
    if mask is not None:
        assert mask.sharding.is_fully_replicated
        assert len(mask.sharding.device_set) == 8
        seen = cache.positions[np.flatnonzero(backend.to_host(mask)[0])]
        assert sorted(seen) == visible(cache)
    else:
        assert sorted(cache.positions) == visible(cache)


def visible(cache):
    """The positions that the last token sees."""
    if isinstance(cache, RotatingKVCache):
        window = cache.max_size - cache.keep
        latest = range(max(0, cache.offset - window), cache.offset)
        return sorted({*range(min(cache.keep, cache.offset)), *latest})
    return list(range(cache.offset))


def check_held(cache, backend):
    """What a cache holds is that of its positions, and divided."""
    positions = cache.positions[: cache.len]
    for array, sign in zip(cache.state, (1, -1), strict=True):
        assert array.sharding.is_equivalent_to(backend.sharding, 4)
        np.testing.assert_array_equal(backend.to_host(array), sign * coded(positions))


KINDS = {"growing": lambda b: KVCache(b, step=4), "ring": lambda b: RotatingKVCache(6, 2, b)}


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


# Per-layer caches.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2"])
def test_updates_keep_the_sharding(partition, make, dtype):
    backend = backend_for(partition)
    cache = make(backend)
    # Floats of eight bits tell no more than these positions apart.
    for tokens in (3, 1, 4) if dtype == "float8_e5m2" else (3, 1, 1, 4, 1, 1, 1):
        push(cache, backend, tokens, dtype)


def test_snapshots_copies_and_files_keep_it(backend, make, tmp_path):
    cache = make(backend)
    push(cache, backend, 5)
    snapshot = cache.snapshot()
    twin = copy.copy(cache)
    cache.checkpoint()
    push(cache, backend, 3)
    cache.rollback(accepted=1)
    push(cache, backend, 2)
    for other in (twin, make(backend)):
        if not other.offset:
            other.restore(snapshot)
        assert other.offset == 5
        check_held(other, backend)
        push(other, backend, 1)
    LayerCaches([cache]).save(tmp_path / "cache")
    loaded = LayerCaches.load(tmp_path / "cache", backend=backend)[0]
    check_held(loaded, backend)
    push(loaded, backend, 1)


def test_to_and_from_one_device(backend, make):
    cache = make(backend)
    push(cache, backend, 7)
    for name in ("numpy", "jax"):
        there = cache.to_backend(name)
        back = there.to_backend(backend)
        for one, other in zip(cache.state, there.state, strict=True):
            np.testing.assert_array_equal(backend.to_host(one), there.backend.to_host(other))
        check_held(back, backend)
        push(back, backend, 2)


def test_one_backend_for_equal_shardings():
    assert backend_for("both") is backend_for("both")
    assert backend_for("both") is not backend_for("heads")
    assert backend_for("both").spec == "jax:8 cpu devices, batch over data=2, kv_heads over model=4"
    assert get_backend(backend_for("both")) is backend_for("both")


def test_states_of_recurrent_layers(backend):
    """A state is kept as it comes; restored, its batch and heads are divided."""
    cache = StateCache(backend)
    matrix, other = coded(range(3)), np.ones((BATCH, 3), np.float32)
    cache.advance(4, placed(backend, matrix, axes="bc"), placed(backend, other, axes="bc"))
    restored = StateCache(backend)
    restored.restore(cache.snapshot())
    for state in (cache.state, restored.state, cache.to_backend("numpy").to_backend(backend).state):
        np.testing.assert_array_equal(backend.to_host(state[0]), matrix)
        assert state[0].sharding.is_equivalent_to(backend.sharding, 4)
        # Three channels are not divided by any number of devices here.
        wanted = backend.sharding_of((BATCH, HEADS), "b")
        assert state[1].sharding.is_equivalent_to(wanted, 2)


def test_host_copies_leave_donation_alone():
    """A view that stayed alive would have the next write copy the buffer."""
    backend = backend_for("heads")
    buffer = backend.alloc_axes((BATCH, HEADS, 16, DIM), "float32", "bhtd")
    token = placed(backend, coded([1]))
    parts = [shard.data.unsafe_buffer_pointer() for shard in buffer.addressable_shards]
    for start in range(3):
        backend.to_host(buffer)
        buffer = backend.slice_update(buffer, token, start, 2)
    assert parts == [shard.data.unsafe_buffer_pointer() for shard in buffer.addressable_shards]


def test_rows_of_the_batch():
    """They are taken, joined and cut on a divided axis as on any other."""
    for types in ("Auto", "Explicit"):
        backend = backend_for("batch", types)
        rows = np.arange(8, dtype=np.float32).reshape(8, 1, 1, 1) * np.ones(
            (8, 2, 3, 4), np.float32
        )
        buffer, order = placed(backend, rows), [7, 0, 0, 5]
        for got, wanted in (
            (backend.gather(buffer, order, 0), rows[order]),
            (backend.concat([buffer, buffer], 0), np.concatenate([rows, rows])),
            (backend.slice(buffer, 2, 6, 0), rows[2:6]),
        ):
            assert got.sharding.is_equivalent_to(backend.sharding, 4)
            np.testing.assert_array_equal(backend.to_host(got), wanted)
        with pytest.raises(kvcache.ShapeError, match=r"axis 0 divided over the 4 .* got 3"):
            backend.gather(buffer, [0, 1, 2], 0)


# What comes in.


def test_other_shardings_over_the_mesh_are_resharded(backend, make):
    cache, mesh = make(backend), backend.sharding.mesh
    others = [PartitionSpec(), PartitionSpec(None, ("data", "model")), PartitionSpec(("data",))]
    for spec in others:
        new = coded(range(cache.offset, cache.offset + 2))
        keys, values = (jax.device_put(a, NamedSharding(mesh, spec)) for a in (new, -new))
        check(cache, backend, cache.update(keys, values))


def test_a_mesh_of_another_order_or_type_of_axes():
    for partition, types in (("both", "Explicit"), ("heads", "Auto")):
        cache, backend = KVCache(backend_for("both")), backend_for(partition, types)
        new = coded(range(3))
        pair = cache.update(placed(backend, new), placed(backend, -new))
        check(cache, cache.backend, pair)


def test_arrays_of_other_devices_are_refused(make):
    backend, new = backend_for("both"), jnp.asarray(coded(range(2)))
    half = NamedSharding(jax.sharding.Mesh(np.array(jax.devices()[:4]), "x"), PartitionSpec())
    cache = make(backend)
    for wrong in (new, jax.device_put(new, half)):
        with pytest.raises(kvcache.DTypeError, match=r"8 cpu devices.*jax\.device_put"):
            cache.update(wrong, wrong)
        assert (cache.offset, cache.nbytes) == (0, 0)
    push(cache, backend, 3)


def test_arrays_of_other_devices_are_refused_by_pools():
    backend, new = backend_for("both"), jnp.asarray(coded(range(2))[0])
    cache = pool(backend)
    cache.start_forward(Batch([0, 1], [0, 0]))
    with pytest.raises(kvcache.DTypeError, match=r"8 cpu devices.*jax\.device_put"):
        cache.put(new, new)


@pytest.mark.parametrize("named", [None, "jax"])
def test_a_cache_on_one_device_refuses_several(make, named):
    backend, cache = backend_for("both"), make(named)
    new = placed(backend, coded(range(2)))
    with pytest.raises(kvcache.UnknownBackendError, match=r"get_backend\('jax', sharding="):
        cache.update(new, new)
    pool = CausalCache()
    pool.init("jax", "float32", max_sequences=1, capacity=16, max_batch=4)
    pool.start_forward(Batch([0, 1], [0, 0]))
    with pytest.raises(kvcache.UnknownBackendError, match="sharding="):
        pool.put(new[0], new[0])


# What cannot be divided.

SIX = r"kv_heads divided over the 8 devices of mesh axis model must be a multiple of 8; got 6"


def test_six_heads_on_eight_devices(make):
    backend = backend_for("heads")
    cache, six = make(backend), coded(range(2), heads=6)
    new = backend.from_host(six)
    with pytest.raises(kvcache.ShapeError, match=SIX):
        cache.update(new, new)
    assert (cache.offset, cache.nbytes, cache.dtype) == (0, 0, None)
    other = make("numpy")
    other.update(six, six)
    with pytest.raises(kvcache.ShapeError, match=SIX):
        cache.restore(other.snapshot())
    with pytest.raises(kvcache.ShapeError, match=SIX):
        other.to_backend(backend)
    assert (cache.offset, cache.nbytes, cache.dtype) == (0, 0, None)
    push(cache, backend, 3)


def test_a_batch_that_cannot_be_divided(make):
    backend = backend_for("batch")
    cache, new = make(backend), backend.from_host(coded(range(2), batch=6))
    with pytest.raises(kvcache.ShapeError, match=r"batch divided over the 4 .* data .* got 6"):
        cache.update(new, new)
    assert (cache.offset, cache.nbytes) == (0, 0)
    push(cache, backend, 3)


def test_six_heads_in_a_pool():
    backend = backend_for("heads")
    cache = pool(backend)
    new = backend.from_host(coded(range(2), heads=6)[0])
    with pytest.raises(kvcache.ShapeError, match=SIX):
        cache.allocate([0], 6, DIM)
    cache.start_forward(Batch([0, 1], [0, 0]))
    with pytest.raises(kvcache.ShapeError, match=SIX):
        cache.put(new, new)
    eight = placed(backend, coded(range(2))[0], axes="htd")
    cache.put(eight, -eight)  # nothing of the layer was made for six
    put(cache, backend, [2])


def test_six_heads_of_a_snapshot():
    """Refused by the restore, not by a later pass, which would write them."""
    backend = backend_for("heads")
    cache, other = pool(backend), pool("numpy")
    other.start_forward(Batch([0, 1], [0, 0]))
    other.put(*[coded(range(2), heads=6)[0]] * 2)
    with pytest.raises(kvcache.ShapeError, match=SIX):
        cache.restore(0, other.snapshot(0))
    assert not cache.holds_tokens(0)
    put(cache, backend, range(3))


def test_shardings_that_are_none(partition):
    mesh = sharded(partition).mesh
    for spec in ((None, None, "model"), (None, None, None, "model")):
        with pytest.raises(kvcache.NotSupportedError, match="not over tokens or head_dim"):
            get_backend("jax", sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    for wrong in (PartitionSpec("data"), mesh, jax.devices()[0].id, [mesh]):
        with pytest.raises(kvcache.UnknownBackendError, match="NamedSharding over a mesh"):
            get_backend("jax", sharding=wrong)
    five = NamedSharding(mesh, PartitionSpec(None, None, None, None, "model"))
    with pytest.raises(kvcache.UnknownBackendError, match="for batch, kv_heads, tokens, head_dim"):
        get_backend("jax", sharding=five)


def test_a_sharding_comes_without_a_device_and_on_jax_alone():
    with pytest.raises(kvcache.NotSupportedError, match="made on jax; got 'numpy'"):
        get_backend("numpy", sharding=sharded())
    for arguments in (("jax:cpu:0",), ("jax", "cpu:0")):
        with pytest.raises(kvcache.UnknownBackendError, match="Name the framework alone"):
            get_backend(*arguments, sharding=sharded())


def test_a_mesh_is_not_pickled(make):
    cache = make(backend_for("both"))
    with pytest.raises(kvcache.NotSupportedError, match="load it on the backend"):
        pickle.dumps(cache)


# Pools.


def pool(backend, **config):
    cache = CausalCache()
    if config:
        cache.set_config(kvcache.CacheConfig(**config))
    cache.init(backend, "float32", max_sequences=2, capacity=32, max_batch=8)
    return cache


def turned(rows, layout):
    """Rows in layout "htd" in another, and back."""
    return rows.transpose(["htd".index(axis) for axis in layout])


def turned_back(array, layout):
    return array.transpose([layout.index(axis) for axis in "htd"])


def put(cache, backend, positions, layouts=("htd", "htd"), sequence=0):
    """Puts tokens of a sequence, and checks what the pass gets."""
    rows = coded(positions)[0]
    new = [turned(rows, layouts[0]), turned(-rows, layouts[1])]
    pairs = zip(new, layouts, strict=True)
    cache.start_forward(Batch(positions, [sequence] * len(positions)))
    cache.put(*[placed(backend, array, axes=layout) for array, layout in pairs])
    check_pass(backend, cache.get(), layouts, range(positions[-1] + 1))


def check_pass(backend, got, layouts, positions):
    """What the last token of a pass sees is that of `positions`, and divided."""
    *pair, mask = got
    assert mask.sharding.is_fully_replicated
    seen = np.flatnonzero(backend.to_host(mask)[-1])
    for array, layout, sign in zip(pair, layouts, (1, -1), strict=True):
        assert array.sharding.is_equivalent_to(backend.sharding_of(array.shape, layout), 3)
        host = sign * turned_back(backend.to_host(array), layout)[:, seen]
        host = host[:, np.argsort(host[0, :, 2])]
        np.testing.assert_array_equal(host, coded(positions)[0])


@pytest.mark.parametrize("layouts", [("htd", "htd"), ("thd", "hdt")])
def test_pools_keep_the_sharding(backend, layouts):
    config = dict(zip(("key_layout", "value_layout"), layouts, strict=True))
    cache = pool(backend, **config)
    put(cache, backend, range(3), layouts)
    put(cache, backend, [3], layouts, sequence=0)
    put(cache, backend, range(5), layouts, sequence=1)  # beside the others
    put(cache, backend, [4, 5], layouts)  # not one after the other
    snapshot = cache.snapshot(0)
    others = pool(backend, **config), cache.copy(), cache.to_backend("numpy").to_backend(backend)
    others[0].restore(0, snapshot)
    for other in (cache, *others):
        put(other, backend, [6], layouts)


def test_attention_over_divided_keys(backend):
    """As over the same keys on one device, whether cells follow each other or not."""
    alone, rng = get_backend("jax"), np.random.default_rng(0)
    caches = [(own, pool(own)) for own in (backend, alone)]
    passes = ([0, 1, 2], [0] * 3), ([0, 1], [1] * 2), ([3, 2, 4], [0, 1, 0])
    for positions, sequences in passes:
        keys, values, queries = rng.normal(size=(3, HEADS, len(positions), DIM)).astype(np.float32)
        outputs = []
        for own, cache in caches:
            cache.start_forward(Batch(positions, sequences))
            cache.put(placed(own, keys, axes="htd"), placed(own, values, axes="htd"))
            outputs.append(own.to_host(cache.attend(placed(own, queries, axes="htd"))))
        np.testing.assert_allclose(*outputs, rtol=1e-5)


def test_a_removal_from_the_middle_shifts_sharded_keys(backend):
    def shift(layer, keys, offsets):
        assert keys.sharding.is_equivalent_to(backend.sharding_of(keys.shape, "htd"), 3)
        return keys.at[:, :, 2].add(offsets.astype(keys.dtype))

    cache = CausalCache(shift=shift)
    cache.init(backend, "float32", max_sequences=1, capacity=32, max_batch=8)
    put(cache, backend, range(6))
    cache.remove(0, 1, 4)
    cache.start_forward(Batch([3], [0]))
    new = placed(backend, coded([3])[0], axes="htd")
    cache.put(new, -new)
    keys, values, mask = cache.get()
    seen = np.flatnonzero(backend.to_host(mask)[0])
    assert sorted(backend.to_host(keys)[0, seen, 2]) == [0, 1, 2, 3]
    assert sorted(backend.to_host(values)[0, seen, 2]) == [-5, -4, -3, 0]
    assert keys.sharding.is_equivalent_to(backend.sharding_of(keys.shape, "htd"), 3)


def test_output_of_encoders(backend):
    layouts = "thd", "hdt"
    config = kvcache.CacheConfig(key_layout="thd", value_layout="hdt")

    def encoder(target):
        cache = EncoderCache()
        cache.set_config(config)
        cache.init(target, max_sequences=3)
        return cache

    cache = encoder(backend)
    rows = coded(range(6))[0]
    cache.start_forward(Batch([0, 0], [0, 1], [0, 1]))
    new = [turned(rows, layouts[0]), turned(-rows, layouts[1])]
    pairs = zip(new, layouts, strict=True)
    cache.put(*[placed(backend, array, axes=layout) for array, layout in pairs], frames=[2, 4])
    restored = encoder(backend)
    restored.restore(2, cache.snapshot(1))
    for each, sequences, frames in (
        (cache, [0, 1], rows),
        (cache.to_backend("numpy").to_backend(backend), [1], rows[:, 2:]),
        (restored, [2], rows[:, 2:]),
    ):
        each.start_forward(Batch([1] * len(sequences), sequences))
        *got, _ = each.get()
        for array, layout, sign in zip(got, layouts, (1, -1), strict=True):
            assert array.sharding.is_equivalent_to(backend.sharding_of(array.shape, layout), 3)
            host = sign * turned_back(backend.to_host(array), layout)
            np.testing.assert_array_equal(host, frames)


def test_rotary_keys_are_shifted(backend):
    shifted = []
    for target in (get_backend("numpy"), backend):
        cache = CausalCache(shift=RoPEShift([1.0, 0.1]))
        cache.init(target, "float32", max_sequences=1, capacity=32, max_batch=8)
        new = placed(target, coded(range(6))[0], axes="htd")
        cache.start_forward(Batch(range(6), [0] * 6))
        cache.put(new, new)
        cache.remove(0, 1, 4)
        snapshot = cache.snapshot(0)
        fresh = CausalCache()
        fresh.init("numpy", "float32", max_sequences=1, capacity=8, max_batch=8)
        fresh.restore(0, snapshot)
        fresh.start_forward(Batch([3], [0]))
        fresh.put(*[coded([3])[0]] * 2)
        keys, _, mask = fresh.get()
        shifted.append(keys[:, mask[0]])
    np.testing.assert_allclose(*shifted, atol=1e-6)


def test_states_in_pools(backend):
    cache = RecurrentCache()
    cache.init(backend, max_sequences=2, max_batch=8)
    matrix, other = coded(range(3))[:1], np.ones((1, 3), np.float32)
    states = [placed(backend, array, axes="tc") for array in (matrix, other)]
    for position, sequence in ((0, 0), (1, 0)):
        cache.start_forward(Batch([position], [sequence]))
        cache.get_states()
        cache.put_states(*states)
    cache.copy_prefix(0, 1, 2)
    restored = RecurrentCache()
    restored.init(backend, max_sequences=1, max_batch=8)
    restored.restore(0, cache.snapshot(1))
    for each in (cache, restored, cache.copy(), cache.to_backend("numpy").to_backend(backend)):
        each.start_forward(Batch([2], [0]))
        got = each.get_states()
        each.put_states(*states)
        for array, given in zip(got, (matrix, other), strict=True):
            assert array.sharding.is_equivalent_to(
                backend.sharding_of(array.shape, "tc"), array.ndim
            )
            np.testing.assert_array_equal(backend.to_host(array), given)


# Programs of the user.

LAYERS = 2


def attended(x, keys, values, mask):
    scores = jnp.where(mask, x @ keys.astype(x.dtype).swapaxes(-1, -2), -jnp.inf)
    return x + jax.nn.softmax(scores, axis=-1) @ values.astype(x.dtype)


def layer_step(states, x, writes=True):
    """A step of a model of several layers, with a cache each."""
    after = []
    for before in states:
        state, keys, values = before, before.keys, before.values
        if writes:
            rows = x.astype(state.likes[0].dtype)
            state, keys, values = functional.append(before, rows, -rows)
        x = attended(x, keys, values, functional.mask(state, x.shape[2]))
        after.append(state)
    return after, x


def pool_step(state, plan, x, writes=True):
    for layer in range(LAYERS):
        rows = x.astype(plan.key_like.dtype)
        if writes:
            state = functional.put(state, plan, layer, rows, -rows)
        x = attended(x, *functional.get(state, plan, layer))
    return state, x


def state_step(state, plan, x, writes=True):
    """x: [runs, heads]."""
    for layer in range(LAYERS):
        matrix, last = functional.get_states(state, plan, layer)
        matrix = matrix * 0.5 + x[:, :, None, None]
        last = last + x.astype(last.dtype)
        x = x + matrix.sum((2, 3)) + last.astype(x.dtype)
        if writes:
            state = functional.put_states(state, plan, layer, matrix, last)
    return state, x


def compiled(step, *arguments):
    return jax.jit(step, donate_argnums=0).lower(*arguments).compile()


def check_program(step, state, *arguments):
    """A donated step has no collective, copies no buffer, and returns the state as it lay."""
    arrays = jax.tree.leaves(state)
    largest = max(array.addressable_shards[0].data.size for array in arrays)
    program = compiled(step, state, *arguments)
    assert COLLECTIVES.findall(program.as_text()) == []
    if copied := copies(program.as_text(), largest):
        # Some products transpose the keys, whoever wrote them.
        unwritten = compiled(partial(step, writes=False), state, *arguments)
        assert copied == copies(unwritten.as_text(), largest)
    held = sum(array.addressable_shards[0].data.nbytes for array in arrays)
    assert program.memory_analysis().alias_size_in_bytes >= held
    shardings = [(array.sharding, array.ndim) for array in arrays]
    after, out = program(state, *arguments)
    for array, (sharding, ndim) in zip(jax.tree.leaves(after), shardings, strict=True):
        assert array.sharding.is_equivalent_to(sharding, ndim)
    return after, out


@pytest.mark.parametrize(
    ("types", "dtype", "tokens"),
    [("Auto", "float32", 1), ("Auto", "bfloat16", 3), ("Explicit", "float32", 3)],
)
def test_steps_of_layers(partition, types, dtype, tokens):
    backend, x = backend_for(partition, types), coded(range(tokens)) / 8
    shape, expected = (BATCH, HEADS, 512, DIM), None
    for target in (get_backend("jax"), backend):
        states = [functional.empty([shape] * 2, dtype, backend=target) for _ in range(LAYERS)]
        new = placed(target, x)
        if target is not backend:
            _, expected = jax.jit(layer_step)(states, new)
            continue
        states, out = check_program(layer_step, states, new)
        assert out.sharding.is_equivalent_to(backend.sharding, 4)
        np.testing.assert_allclose(out, expected, rtol=1e-5)
        assert [int(state.offset) for state in states] == [tokens] * LAYERS


def test_a_step_moves_no_more_than_one_written_by_hand():
    backend, shape = backend_for("both"), (BATCH, HEADS, 1024, 16)
    new = backend.from_host_axes(np.ones((BATCH, HEADS, 1, 16), np.float32), "bhtd")

    def by_hand(state, x):
        after, position = {}, state[-1]
        for layer in range(LAYERS):
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(buffer, rows, position, 2)
                for buffer, rows in zip(state[layer], (x, -x), strict=True)
            )
            x = attended(x, keys, values, jnp.arange(shape[2]) <= position)
            after[layer] = keys, values
        return {**after, -1: position + 1}, x

    def zeros():
        return backend.alloc_axes(shape, "float32", "bhtd")

    state = {layer: (zeros(), zeros()) for layer in range(LAYERS)}
    ours = [functional.empty([shape] * 2, "float32", backend=backend) for _ in range(LAYERS)]
    moved = [
        compiled(step, *arguments).cost_analysis()["bytes accessed"]
        for step, *arguments in (
            (layer_step, ours, new),
            (by_hand, {**state, -1: backend.from_host(np.int32(0))}, new),
        )
    ]
    assert moved[0] <= 1.05 * moved[1]


def test_a_step_of_a_ring(backend):
    cache, plain = RotatingKVCache(6, 2, backend), RotatingKVCache(6, 2, "jax")
    new = coded(range(7))
    cache.update(placed(backend, new), placed(backend, -new))
    plain.update(jnp.asarray(new), jnp.asarray(-new))
    x = coded([7]) / 8
    [state], out = check_program(layer_step, [cache.export_state(1)], placed(backend, x))
    [expected_state], expected = jax.jit(layer_step)([plain.export_state(1)], jnp.asarray(x))
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    cache.import_state(state)
    plain.import_state(expected_state)
    for one, other in zip(cache.state, plain.state, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding.is_equivalent_to(backend.sharding, 4)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(("both", "Auto"), "bfloat16"), (("heads", "Explicit"), "float32")],
    indirect=["backend"],
)
def test_an_exported_cache_goes_on(backend, dtype):
    cache = KVCache(backend, step=4)
    push(cache, backend, 3, dtype)
    state = cache.export_state(4)
    new = coded([3])

    def step(state, k, writes=True):
        if writes:
            state, _, _ = functional.append(state, k, -k)
        return state, k

    state, _ = check_program(step, state, placed(backend, new, dtype))
    cache.import_state(state)
    check_held(cache, backend)
    push(cache, backend, 2, dtype)


@pytest.mark.parametrize(("dtype", "sequences"), [("float32", 1), ("bfloat16", 3)])
def test_steps_of_pools(backend, dtype, sequences):
    x = np.concatenate([coded([i])[0] for i in range(sequences)], 1) / 8
    expected = None
    for target in (get_backend("jax"), backend):
        cache = CausalCache()
        cache.init(target, dtype, max_sequences=sequences, capacity=512, max_batch=8)
        cache.allocate(range(LAYERS), HEADS, DIM)
        plan = cache.plan(Batch([0] * sequences, range(sequences)))
        assert all(leaf.sharding.is_fully_replicated for leaf in plan if hasattr(leaf, "sharding"))
        new = placed(target, x, axes="htd")
        if target is not backend:
            _, expected = jax.jit(pool_step)(cache.program_state, plan, new)
            continue
        state = cache.program_state
        cache.program_state, out = check_program(pool_step, state, plan, new)
        np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_planned_steps_in_one_program(backend):
    def decode(state, plans, x):
        return jax.lax.scan(
            lambda carry, plan: (pool_step(carry[0], plan, carry[1]), None), (state, x), plans
        )

    outputs = []
    for target in (get_backend("jax"), backend):
        cache = pool(target)
        cache.allocate(range(LAYERS), HEADS, DIM)
        plans = cache.plan_steps(Batch([0, 0], [0, 1]), 4)
        x = placed(target, coded(range(2))[0] / 8, axes="htd")
        program = compiled(decode, cache.program_state, plans, x)
        assert COLLECTIVES.findall(program.as_text()) == []
        (cache.program_state, out), _ = program(cache.program_state, plans, x)
        outputs.append(out)
        assert cache.next_position(1) == 4
    np.testing.assert_allclose(*outputs, rtol=1e-4)


def test_a_prefix_is_found_again(backend):
    """A session goes on from rows in the cells, and after they gave way from the host."""
    cache = CausalCache()
    cache.init(backend, "float32", max_sequences=1, capacity=16, max_batch=8)
    prefix = PrefixCache(cache)
    tokens = [*range(7)]
    for other in ([7, 8, 9], None):
        with prefix.session([*tokens, 99]) as session:
            matched = session.matched
            put(cache, backend, range(matched, 8), sequence=session.sequence)
        if other:
            with prefix.session([*other, 98]) as session:
                put(cache, backend, range(4), sequence=session.sequence)
    assert matched == 7


@pytest.mark.parametrize("runs", [1, 2])
def test_steps_of_states(backend, runs):
    x, expected = np.arange(runs * HEADS, dtype=np.float32).reshape(runs, HEADS), None
    for target in (get_backend("jax"), backend):
        cache = RecurrentCache()
        cache.init(target, max_sequences=2, max_batch=8)
        cache.allocate(range(LAYERS), ((HEADS, 8, 8), "float32"), ((HEADS,), "bfloat16"))
        plan = cache.plan(Batch([0] * runs, range(runs)))
        new = placed(target, x, axes="tc")
        if target is not backend:
            _, expected = jax.jit(state_step)(cache.program_state, plan, new)
            continue
        state = cache.program_state
        cache.program_state, out = check_program(state_step, state, plan, new)
        np.testing.assert_allclose(out, expected, rtol=1e-5)


# States that programs make.


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(("both", "Auto"), "bfloat16"), (("heads", "Explicit"), "float32")],
    indirect=["backend"],
)
def test_a_state_made_in_a_program(backend, dtype):
    shapes = [(BATCH, HEADS, 16, DIM), (BATCH, HEADS, 16, 2 * DIM)]
    keys = placed(backend, coded(range(3)), dtype)
    values = jnp.concatenate([-keys, -keys], -1)

    def prefill(keys, values):
        state = functional.empty(shapes, dtype, backend.sharding)
        return functional.append(state, keys, values)

    inside = jax.jit(prefill)(keys, values)
    outside = prefill(keys, values)
    assert COLLECTIVES.findall(jax.jit(prefill).lower(keys, values).compile().as_text()) == []
    for state, held, other in (inside, outside):
        assert held.sharding.is_equivalent_to(backend.sharding, 4)
        assert state.offset.sharding.is_fully_replicated
        assert state.keys.dtype == (jnp.uint16 if dtype == "bfloat16" else jnp.float32)
        np.testing.assert_array_equal(held[:, :, :3].astype(np.float32), coded(range(3)))
        assert not np.any(other[:, :, 3:])


@pytest.mark.parametrize("stacked", [False, True])
def test_states_of_all_layers(backend, stacked):
    """Each device has its part of the stacked states, too, and writes to nothing else."""

    def step(states, x, writes=True):
        def layer(carry, number):
            states, x = carry
            after, keys, values, mask = update(states, x, -x, layer=number)
            return (after if writes else states, attended(x, keys, values, mask)), None

        if stacked:
            return jax.lax.scan(layer, (states, x), jnp.arange(LAYERS))[0]
        return layer_step(states, x, writes)

    options = {"kv_heads": HEADS, "head_dim": DIM, "dtype": "float32", "stacked": stacked}
    states = init(LAYERS, BATCH, 512, sharding=backend.sharding, **options)
    keys = states.keys if stacked else states[0].keys
    part = keys.addressable_shards[0].data
    assert part.size * len(jax.devices()) == keys.size
    x = coded([0]) / 8
    _, out = check_program(step, states if stacked else list(states), placed(backend, x))
    plain = init(LAYERS, BATCH, 512, **options)
    _, expected = jax.jit(step)(plain if stacked else list(plain), jnp.asarray(x))
    np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_parts_that_a_program_handles_itself(backend):
    """Inside of shard_map, a state is one of the part of a device."""
    spec, new = backend.sharding.spec, placed(backend, coded(range(3)))
    part = new.addressable_shards[0].data.shape

    def prefill(keys):
        state = functional.empty([(*part[:2], 16, DIM)] * 2, "float32")
        return functional.append(state, keys, -keys)[1]

    program = jax.jit(
        jax.shard_map(prefill, mesh=backend.sharding.mesh, in_specs=spec, out_specs=spec)
    )
    np.testing.assert_array_equal(program(new)[:, :, :3], coded(range(3)))


def test_a_state_that_cannot_be_divided():
    with pytest.raises(kvcache.ShapeError, match=SIX):
        functional.empty([(1, 6, 16, DIM)] * 2, "float32", sharded("heads"))
