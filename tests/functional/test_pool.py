"""Plan and apply: what a program does with a pool is what put and get do with it."""

import numpy as np
import pytest

from kvcache import (
    Batch,
    CacheConfig,
    CacheFullError,
    CausalCache,
    DTypeError,
    KVCacheError,
    NotSupportedError,
    ShapeError,
    WrapperCache,
    functional,
    get_backend,
)

from .. import peek

# What the compiler of torch imports warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

LAYERS, HEADS, DIM, VALUE_DIM = 2, 2, 4, 3
LIMITS = [{}, {"window": 6}, {"chunk": 8}]


def make(backend, dtype="float32", config=None, **limits):
    cache = CausalCache(**limits)
    if config:
        cache.set_config(config)
    cache.init(backend, dtype, max_sequences=3, capacity=64, max_batch=16)
    return cache


def allocated(backend, dtype="float32", config=None, **limits):
    cache = make(backend, dtype, config, **limits)
    cache.allocate(range(LAYERS), HEADS, DIM, VALUE_DIM)
    return cache


def tokens(backend, dtype, count, rng, layouts=("htd", "htd")):
    """Keys and values that no other token has."""
    sizes = {"h": HEADS, "t": count}
    return [
        backend.from_host(rng.normal(size=[{**sizes, "d": dim}[axis] for axis in layout]), dtype)
        for dim, layout in zip((DIM, VALUE_DIM), layouts, strict=True)
    ]


def step(state, plan, keys, values):
    """A model that stores the same in all layers."""
    seen = []
    for layer in range(LAYERS):
        state = functional.put(state, plan, layer, keys, values)
        seen.append(functional.get(state, plan, layer))
    return state, seen


def passes(rng):
    """Batches of three sequences in turn: prompts, decoding, both mixed."""
    ends = [0, 0, 0]
    for number in range(12):
        counts = (5, 0, 0) if number == 0 else rng.integers(0, 3, 3)
        positions = [end + i for end, n in zip(ends, counts, strict=True) for i in range(n)]
        ends = [end + int(n) for end, n in zip(ends, counts, strict=True)]
        if positions:
            yield Batch(positions, np.repeat([0, 1, 2], counts))


def same(backend, got, expected):
    for mine, other in zip(got, expected, strict=True):
        assert mine.dtype == other.dtype
        np.testing.assert_array_equal(backend.to_host(mine), backend.to_host(other))


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2"])
def test_program_sees_what_get_returns(backend, program, dtype, limits):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    if dtype != "float32" and limits:
        pytest.skip("a dtype is stored alike under every limit")
    plain, cache = make(backend, dtype, **limits), allocated(backend, dtype, **limits)
    rng, compiled = np.random.default_rng(0), program(step)
    for batch in passes(rng):
        news = tokens(backend, dtype, len(batch), rng)
        plain.start_forward(batch)
        expected = []
        for layer in range(LAYERS):
            plain.set_layer(layer)
            plain.put(*news)
            expected.append(plain.get())
        cache.program_state, got = compiled(cache.program_state, cache.plan(batch), *news)
        for mine, other in zip(got, expected, strict=True):
            same(backend, mine, other)
    # And both go on as they are, without programs.
    for each in (plain, cache):
        each.start_forward(Batch([60], [0]))
        each.set_layer(1)
        each.put(*tokens(backend, dtype, 1, np.random.default_rng(1)))
    same(backend, cache.get(), plain.get())


@pytest.mark.parametrize("layouts", [("thd", "thd"), ("htd", "hdt")], ids="-".join)
def test_layouts_and_float_masks(backend, layouts):
    config = CacheConfig(2, *layouts, "float32")
    plain, cache = make(backend, config=config), allocated(backend, config=config)
    rng = np.random.default_rng(0)
    for batch in passes(rng):
        news = tokens(backend, "float32", len(batch), rng, layouts)
        plain.start_forward(batch)
        plain.put(*news)
        cache.program_state, got = step(cache.program_state, cache.plan(batch), *news)
        same(backend, got[0], plain.get())


def test_keys_only(backend, program):
    cache = make(backend)
    cache.allocate([0], HEADS, DIM, 0)
    keys, _ = tokens(backend, "float32", 2, np.random.default_rng(0))
    plan = cache.plan(Batch([0, 1], [0, 0]))
    put = program(lambda state, plan, keys: functional.put(state, plan, 0, keys))
    cache.program_state = put(cache.program_state, plan, keys)
    found, values, _ = functional.get(cache.program_state, plan, 0)
    assert values is None
    np.testing.assert_array_equal(backend.to_host(found)[:, :2], backend.to_host(keys))
    with pytest.raises(ShapeError, match="layer 0 has values in every pass or in none"):
        functional.put(cache.program_state, plan, 0, keys, keys)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_steps_are_passes_one_after_the_other(backend, limits):
    """Planned at once or one by one: the same cells seen, in their order in time."""
    single, cache = allocated(backend, **limits), allocated(backend, **limits)
    rng = np.random.default_rng(0)
    prompt = Batch([*range(5), *range(9)], [0] * 5 + [2] * 9)
    news = tokens(backend, "float32", 14, rng)
    for each in (single, cache):
        each.program_state = step(each.program_state, each.plan(prompt), *news)[0]
    first = Batch([9, 5], [2, 0])
    plans = cache.plan_steps(first, 10)
    state = cache.program_state
    for i in range(10):
        news = tokens(backend, "float32", 2, rng)
        state, got = step(state, nth(plans, i), *news)
        again = single.plan(Batch(first.positions + i, first.sequences))
        single.program_state, expected = step(single.program_state, again, *news)
        for mine, other in zip(got, expected, strict=True):
            assert attended(backend, mine) == attended(backend, other)
    cache.program_state = state
    assert cache.plan(Batch([19], [2])).mask.shape == single.plan(Batch([19], [2])).mask.shape


def nth(plans, i):
    """One step of a plan of several. Array-API indexing names every axis."""
    leaves = [leaf[i, ...] if hasattr(leaf, "shape") else leaf and leaf[i] for leaf in plans]
    return type(plans)(*leaves)


def attended(backend, seen):
    """The keys and values that each token attends to, whatever cells they are in."""
    keys, values, mask = (backend.to_host(array) for array in seen)
    return [
        sorted(keys[:, cell].tobytes() + values[:, cell].tobytes() for cell in np.flatnonzero(row))
        for row in mask
    ]


def test_padding_repeats_the_last_token(backend, program):
    """What a program does four times over for the last token, it does once for the cache."""
    plain, cache = allocated(backend), allocated(backend)
    rng, batch = np.random.default_rng(0), Batch([0, 1, 0], [0, 0, 1])
    news = tokens(backend, "float32", 3, rng)
    plain.program_state, expected = step(plain.program_state, plain.plan(batch), *news)
    padded = [backend.gather(array, np.array([0, 1, 2, 2, 2, 2]), 1) for array in news]
    cache.program_state, got = program(step)(
        cache.program_state, cache.plan(batch, tokens=6), *padded
    )
    for mine, other in zip(got, expected, strict=True):
        same(backend, mine[:2], other[:2])
        mask = backend.to_host(mine[2])
        np.testing.assert_array_equal(mask[:3], backend.to_host(other[2]))
        np.testing.assert_array_equal(mask[3:], mask[[2, 2, 2]])
    with pytest.raises(ValueError, match=r"padded to its length or more; got 1 for 2"):
        cache.plan(Batch([2, 3], [0, 0]), tokens=1)
    cache.plan(Batch([2, 3], [0, 0]))  # nothing had been begun


def test_plan_of_a_pass_begun_before(backend):
    cache = allocated(backend)
    cache.start_forward(Batch([0, 1, 2], [0, 0, 0]))
    cache.set_causal(except_=[0])
    mask = backend.to_host(cache.plan().mask)
    assert mask[:, :3].tolist() == [[True] * 3, [True, True, False], [True] * 3]


def test_plans_of_a_wrapper(backend):
    """It begins the pass in all of its caches; each of those has the plan of its own layers."""
    wrapper = WrapperCache(CausalCache(window=2), CausalCache())
    wrapper.init(backend, max_sequences=1, capacity=16, max_batch=8)
    wrapper.start_forward(Batch(range(4), [0] * 4))
    narrow, full = (backend.to_host(part.plan().mask) for part in wrapper.caches)
    assert narrow.sum(-1).tolist() == [1, 2, 2, 2]
    assert full.sum(-1).tolist() == [1, 2, 3, 4]


# What is refused.

NUMPY = get_backend("numpy")


def test_a_plan_that_does_not_fit_changes_nothing():
    cache = make(NUMPY, window=4)
    cache.allocate([0], HEADS, DIM)
    cache.plan(Batch(range(10), [0] * 10))
    rows = [peek.table(cache).cells_of(sequence).tolist() for sequence in range(3)]
    with pytest.raises(CacheFullError, match="one free cell per token; 30 needed"):
        cache.plan(Batch(range(30), [1] * 30))
    assert [peek.table(cache).cells_of(sequence).tolist() for sequence in range(3)] == rows


def test_steps_that_do_not_fit_change_nothing():
    cache = CausalCache()
    cache.init(NUMPY, max_sequences=2, capacity=8, max_batch=8)
    cache.start_forward(Batch([0, 1, 2, 0], [0, 0, 0, 1]))
    cache.put(*(np.ones((HEADS, 4, DIM), np.float32) for _ in range(2)))
    before = [peek.table(cache).cells_of(sequence).tolist() for sequence in range(2)]
    with pytest.raises(CacheFullError, match="2 needed, 0 of 16 free"):
        cache.plan_steps(Batch([3, 1], [0, 1]), 7)
    assert cache.get()[2].sum(-1).tolist() == [1, 2, 3, 1]  # the pass before goes on
    assert [peek.table(cache).cells_of(sequence).tolist() for sequence in range(2)] == before
    assert peek.table(cache).free == 12
    assert cache.plan_steps(Batch([3, 1], [0, 1]), 6).cells.shape == (6, 2)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Batch([3, 4], [0, 0]), "a decode step has one token per sequence"),
        (Batch([2], [0]), "sequence 0 has 3, got position 2"),
        (Batch([0], [7]), r"sequence ids must lie in \[0, 3\)"),
    ],
)
def test_steps_that_are_none(batch, message):
    cache = make(NUMPY)
    cache.start_forward(Batch([0, 1, 2], [0, 0, 0]))
    cache.put(*(np.ones((HEADS, 3, DIM), np.float32) for _ in range(2)))
    with pytest.raises(ValueError, match=message):
        cache.plan_steps(batch, 2)


def test_a_pass_that_is_none():
    cache = make(NUMPY)
    with pytest.raises(KVCacheError, match="Call start_forward first"):
        cache.plan()
    cache.start_forward(Batch([0], [0]), reserve=True)
    with pytest.raises(
        NotSupportedError, match=r"^a reserve pass has no plan: it stores nothing\. Use a"
    ):
        cache.plan()


def test_states_of_another_cache(backend):
    cache, other = allocated(backend), make(backend)
    other.allocate(range(LAYERS), HEADS, DIM + 1, VALUE_DIM)
    with pytest.raises(ShapeError, match=r"layers \[0, 1\] differ"):
        cache.program_state = other.program_state
    with pytest.raises(ShapeError, match=r"layers \[1\] differ"):
        cache.program_state = {0: cache.program_state[0]}
    assert sorted(cache.program_state) == [0, 1]


def test_layers_and_shapes_are_checked_while_tracing(backend, program):
    cache = allocated(backend)
    plan = cache.plan(Batch([0, 1], [0, 0]))
    keys, values = tokens(backend, "float32", 3, np.random.default_rng(0))
    with pytest.raises(ShapeError, match="as many tokens as it has, 2; got 3"):
        functional.put(cache.program_state, plan, 0, keys, values)
    with pytest.raises(ShapeError, match=r"every axis but 1; got \[2, 3, 3\] for \[2, "):
        functional.put(cache.program_state, plan, 0, values, keys)
    other = backend.from_host(np.ones((HEADS, 2, DIM)), "int32")
    with pytest.raises(DTypeError, match=r"this cache holds .*float32; got .*int32"):
        functional.put(cache.program_state, plan, 0, other, other[:, :, :VALUE_DIM])
    with pytest.raises(KVCacheError, match=r"layer 5 has no buffers; there are \[0, 1\]"):
        functional.put(cache.program_state, plan, 5, keys, values)
    with pytest.raises(KVCacheError, match="layer 5 has no buffers"):
        functional.get(cache.program_state, plan, 5)


def test_layers_are_allocated_once(backend):
    cache = allocated(backend)
    cache.program_state = step(
        cache.program_state,
        cache.plan(Batch([0], [0])),
        *tokens(backend, "float32", 1, np.random.default_rng(0)),
    )[0]
    before = backend.to_host(cache.program_state[0][0])
    cache.allocate(range(LAYERS), HEADS, DIM, VALUE_DIM)
    np.testing.assert_array_equal(backend.to_host(cache.program_state[0][0]), before)
    with pytest.raises(ShapeError, match="keep their heads and head_dim"):
        cache.allocate([1], HEADS + 1, DIM, VALUE_DIM)
    with pytest.raises(ValueError, match="value_dim must be >= 0, 0 for keys only; got -1"):
        cache.allocate([1], HEADS, DIM, -1)
    with pytest.raises(ValueError, match="kv_heads must be >= 1; got 0"):
        cache.allocate([1], 0, DIM)
