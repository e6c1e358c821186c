"""Attention of planned passes in programs, against float64 and against the pool's own attention."""

import numpy as np
import pytest

from kvcache import (
    Batch,
    CacheConfig,
    CausalCache,
    DTypeError,
    KVCacheError,
    NotSupportedError,
    RecurrentCache,
    ShapeError,
    WrapperCache,
    functional,
    get_backend,
)
from kvcache.backends.products import ReadCosts

from .. import peek
from ..pool.attention_oracle import HEAD_DIM, KV_HEADS, Q_HEADS, History
from .conftest import COMPILERS

# What the compiler of torch imports warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

SCALE = HEAD_DIM**-0.5
TOLERANCE = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}


# JAX compiles a loop for each shape, in a program or not.
@pytest.fixture(
    params=(
        "numpy",
        "torch",
        pytest.param("jax", marks=pytest.mark.matrix),
        "mlx",
        "array_api:array_api_strict",
    )
)
def backend(request, monkeypatch):
    """A backend that reads in as many pieces as it can."""
    made = get_backend(request.param)
    made.read_costs = ReadCosts(shared=1, run=2, least=1)
    if request.param == "jax":  # two blocks of 128 cells in a round
        monkeypatch.setattr("kvcache.backends._jax_attention._BYTES", 32768)
    return made


class Recorder:
    """Takes what a model would put, for a program."""

    def set_layer(self, layer):
        pass

    def put(self, *arrays):
        self.arrays = arrays


def make(backend, *, value_dim=None, dtype="float32", config=None, capacity=40, **options):
    cache = CausalCache(**options)
    if config is not None:
        cache.set_config(config)
    cache.init(backend, dtype, max_sequences=5, capacity=capacity, max_batch=32)
    cache.allocate([0], KV_HEADS, HEAD_DIM, value_dim)
    return cache


def step(state, plan, q, scoring, *arrays):
    """A layer: what it puts, and then attends to."""
    state = functional.put(state, plan, 0, *arrays)
    return state, functional.attend(state, plan, 0, q, **scoring)


def run(cache, history, pairs, axes="htd", sees=None, ahead=(), program=step, tokens=0, **scoring):
    """One planned pass of ``(position, sequence)``; its outputs are compared with float64."""
    positions, sequences = zip(*pairs, strict=True)
    plan = planned(cache, Batch(positions, sequences), ahead, tokens)
    recorder = Recorder()
    q = history.put(recorder, positions, sequences, axes)
    extra = max(0, tokens - len(pairs))
    index, axis = np.pad(np.arange(len(pairs)), (0, extra), "edge"), axes.index("t")
    padded = [
        history.backend.gather(array, index, axis) if extra else array
        for array in (history.to_device(q, axes), *recorder.arrays)
    ]
    state, out = program(
        cache.program_state, plan, padded[0], on_device(history, scoring), *padded[1:]
    )
    cache.program_state = state
    check(history, out, q[:, index], [*pairs, *[pairs[-1]] * extra], axes, sees, **scoring)
    return plan


def planned(cache, batch, ahead, tokens):
    if not ahead:
        return cache.plan(batch, tokens or None, reads=True)
    cache.start_forward(batch)
    cache.set_causal(ahead)
    return cache.plan(reads=True)


def on_device(history, scoring):
    if scoring.get("sinks") is None:
        return scoring
    return {**scoring, "sinks": history.backend.from_host(scoring["sinks"])}


def check(history, out, q, pairs, axes="htd", sees=None, **scoring):
    host = history.backend.to_host(out)
    assert host.dtype == q.dtype
    host = host.transpose([axes.index(axis) for axis in "htd"]).astype(np.float64)
    expected = history.expected(q, *zip(*pairs, strict=True), sees, **{"scale": SCALE, **scoring})
    assert host.shape == expected.shape
    np.testing.assert_allclose(host, expected, rtol=0, atol=TOLERANCE[history.dtype])


def span(start, stop, sequence):
    return [(position, sequence) for position in range(start, stop)]


def test_prefill_decode_and_mixed_passes(backend):
    cache, history = make(backend), History(backend)
    run(cache, history, span(0, 9, 0) + span(0, 4, 1))
    run(cache, history, [(4, 1), (9, 0)])
    plan = run(cache, history, [(10, 0), (0, 2), (5, 1), (1, 2), (11, 0)])
    assert [blocks.last.shape[1] for blocks in plan.reads.blocks] == [1, 2]
    run(cache, history, [(3, 2), (2, 2), (6, 1)])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_dtypes(backend, dtype):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    cache, history = make(backend, dtype=dtype), History(backend, dtype)
    run(cache, history, span(0, 9, 0))
    run(cache, history, [(9, 0), (0, 1)], softcap=2.0)


@pytest.mark.parametrize(
    ("options", "sees"),
    [
        ({"window": 4}, lambda i, p, o: p - 4 < o <= p),
        ({"chunk": 5}, lambda i, p, o: p // 5 * 5 <= o <= p),
    ],
)
def test_windows_and_chunks(backend, options, sees):
    cache, history = make(backend, **options), History(backend)
    run(cache, history, span(0, 12, 0) + span(0, 3, 1), sees=sees)
    for number in range(4):
        run(cache, history, [(12 + number, 0), (3 + number, 1)], sees=sees)


def test_blocks_that_no_query_sees_are_no_padding(backend, monkeypatch):
    monkeypatch.setattr("kvcache.pool.blocks._COLUMNS", (2, 2))
    monkeypatch.setattr("kvcache.backends.blocks.SCORES", 1)  # each by itself
    cache, history = make(backend, chunk=5), History(backend)
    sees = lambda i, p, o: p // 5 * 5 <= o <= p  # noqa: E731
    run(cache, history, span(5, 20, 0), sees=sees)
    run(cache, history, [(24, 0), (3, 0), (0, 1)], sees=sees)  # one behind these, one before


def test_tokens_that_see_others_ahead(backend):
    cache, history = make(backend, window=3), History(backend)
    image = {2, 3, 4, 5}

    def sees(i, position, other):
        return position - 3 < other <= position or (i in image and other in image)

    run(cache, history, span(0, 8, 0), sees=sees, ahead=[sorted(image)])


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [None, np.linspace(-1, 2, Q_HEADS, dtype=np.float32)])
def test_scoring_over_a_shared_prefix(backend, softcap, sinks):
    cache, history = make(backend), History(backend)
    run(cache, history, span(0, 9, 0), softcap=softcap, sinks=sinks, scale=0.5)
    cache.copy_prefix(0, 1, 9)
    history.copy(0, 1, 9)
    plan = run(cache, history, [(9, 0), (9, 1)], softcap=softcap, sinks=sinks)
    # One block of each sequence's own cell, and one of the prefix with the queries of both.
    assert [tuple(blocks.last.shape) for blocks in plan.reads.blocks] == [(2, 1), (1, 2)]


@pytest.mark.parametrize(("keys", "values"), [("thd", "thd"), ("hdt", "htd"), ("thd", "hdt")])
def test_layouts(backend, keys, values):
    cache = make(backend, config=CacheConfig(key_layout=keys, value_layout=values))
    history, recorder = History(backend), Recorder()
    for pairs in (span(0, 5, 0), [(5, 0), (0, 1)]):
        positions, sequences = zip(*pairs, strict=True)
        plan = cache.plan(Batch(positions, sequences), reads=True)
        q = history.put(recorder, positions, sequences, keys, values)
        state, out = step(
            cache.program_state, plan, history.to_device(q, keys), {}, *recorder.arrays
        )
        cache.program_state = state
        check(history, out, q, pairs, keys)


@pytest.mark.parametrize("value_dim", [0, 5])
def test_keys_alone_and_values_of_another_size(backend, value_dim):
    cache, history = make(backend, value_dim=value_dim), History(backend, value_dim=value_dim)
    run(cache, history, span(0, 9, 0))
    run(cache, history, [(9, 0), (0, 1)])


def test_long_histories_in_blocks(backend, monkeypatch):
    for name in ("pool.blocks._QUERIES", "backends.blocks.SCORES"):
        monkeypatch.setattr(f"kvcache.{name}", 16)
    monkeypatch.setattr("kvcache.pool.blocks._COLUMNS", (4, 8))
    cache, history = make(backend, capacity=60), History(backend)
    plan = run(cache, history, span(0, 20, 0) + span(0, 7, 1))
    assert [blocks.cells.shape[-1] for blocks in plan.reads.blocks] == [8]
    run(cache, history, [(20, 0), (7, 1)])
    run(cache, history, [*span(21, 24, 0), (8, 1), (0, 2)])


def test_padding_repeats_the_last_token(backend):
    cache, history = make(backend), History(backend)
    run(cache, history, [*span(0, 3, 0), (0, 1)], tokens=8)
    run(cache, history, [(3, 0), (1, 1), (0, 2)], tokens=4)
    run(cache, history, span(4, 7, 0), tokens=4)


def test_steps_are_passes_one_after_the_other(backend):
    cache, history = make(backend, window=6), History(backend)
    sees = lambda i, p, o: p - 6 < o <= p  # noqa: E731
    run(cache, history, span(0, 4, 0) + span(0, 9, 1), sees=sees)
    plans = cache.plan_steps(Batch([4, 9], [0, 1]), 3, reads=True)
    state, recorder = cache.program_state, Recorder()
    for number in range(3):
        pairs = [(4 + number, 0), (9 + number, 1)]
        q = history.put(recorder, *zip(*pairs, strict=True))
        plan = nth(plans, number)
        state, out = step(state, plan, history.to_device(q, "htd"), {}, *recorder.arrays)
        check(history, out, q, pairs, sees=sees)
    cache.program_state = state
    run(cache, history, [(7, 0), (12, 1)], sees=sees)


def nth(tree, number):
    """One step of a plan of several."""
    if hasattr(tree, "_fields"):
        return type(tree)(*(nth(leaf, number) for leaf in tree))
    if isinstance(tree, tuple):
        return tuple(nth(leaf, number) for leaf in tree)
    return tree[number, ...] if hasattr(tree, "shape") else tree[number]


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_cells_that_nobody_sees_may_hold_anything(backend, number):
    cache, history = make(backend, capacity=80), History(backend)
    run(cache, history, span(0, 9, 0))
    run(cache, history, span(0, 70, 1) + span(0, 3, 2) + span(0, 2, 3))
    pairs = [(70, 1), (3, 2), (2, 3)]
    plan, recorder = cache.plan(Batch(*zip(*pairs, strict=True)), reads=True), Recorder()
    q = history.put(recorder, *zip(*pairs, strict=True))
    table = peek.table(cache)
    seen = np.concatenate([table.cells_of(sequence) for sequence in (1, 2, 3)])
    state = poisoned(cache, np.setdiff1d(np.arange(cache.cells), seen), number)
    _, out = step(state, plan, history.to_device(q, "htd"), {}, *recorder.arrays)
    check(history, out, q, pairs)


def poisoned(cache, cells, number):
    """The state of programs, with a number in these cells that no put would store."""
    cache.program_state = cache.program_state  # so that the pool knows no other form of it
    peek.buffers(cache)._exported = None
    peek.poison(cache, cells, number)
    state = cache.program_state
    assert not np.isfinite(peek.buffers(cache).backend.to_host(state[0][0])[:, cells]).any()
    return state


def test_a_wrapper_plans_the_reads_of_all_its_parts(backend):
    wrapper = WrapperCache(CausalCache(window=2), CausalCache(), RecurrentCache())
    wrapper.init(backend, max_sequences=1, capacity=16, max_batch=8)
    wrapper.caches[2].allocate([0], ((2,), "float32"))
    narrow, full, _ = wrapper.plan(Batch(range(4), [0] * 4), reads=True)
    counts = [
        backend.to_host(plan.reads.blocks[0].last) - backend.to_host(plan.reads.blocks[0].first)
        for plan in (narrow, full)
    ]
    assert [count[0].tolist() for count in counts] == [[1, 2, 2, 2], [1, 2, 3, 4]]
    wrapper.abort()
    narrow, full, _ = wrapper.plan_steps(Batch([0], [0]), 2, reads=True)
    assert narrow.reads.order.shape == full.reads.order.shape == (2, 1)


# In compiled programs.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jax", "torch", "mlx"])
def test_compiled(name):
    backend = get_backend(name)
    program = COMPILERS[name](lambda state, plan, q, *arrays: step(state, plan, q, {}, *arrays))

    def compiled(state, plan, q, scoring, *arrays):
        return program(state, plan, q, *arrays)

    cache, history = make(backend), History(backend)
    run(cache, history, [*span(0, 9, 0), (0, 1)], program=compiled)
    for number in range(3):
        run(cache, history, [(9 + number, 0), (1 + number, 1)], program=compiled)


# What is refused.


def test_plans_of_the_other_kind(backend):
    cache, history = make(backend), History(backend)
    q = history.to_device(history.random(Q_HEADS, 1, HEAD_DIM), "htd")
    masked = cache.plan(Batch([0], [0]))
    with pytest.raises(KVCacheError, match=r"Plan with cache\.plan\(batch, reads=True\)"):
        functional.attend(cache.program_state, masked, 0, q)
    plan = cache.plan(Batch([0], [0]), reads=True)
    with pytest.raises(KVCacheError, match=r"Call attend, or plan with cache\.plan\(batch\)"):
        functional.get(cache.program_state, plan, 0)
    with pytest.raises(KVCacheError, match="layer 5 has no buffers"):
        functional.attend(cache.program_state, plan, 5, q)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((6, 3, 8), r"the 2 tokens of the plan on axis 1; got \[6, 3, 8\]"),
        ((6, 2), r"three axes"),
        ((6, 2, 4), "the head_dim of the keys, 8; got 4"),
        ((5, 2, 8), "a multiple of the 2 kv_heads; got 5"),
    ],
)
def test_queries_of_other_shapes(backend, shape, message):
    cache = make(backend)
    plan = cache.plan(Batch([0, 1], [0, 0]), reads=True)
    q = backend.from_host(np.ones(shape, np.float32))
    with pytest.raises(ShapeError, match=message):
        functional.attend(cache.program_state, plan, 0, q)


@pytest.mark.parametrize(
    ("scoring", "error", "message"),
    [
        ({"scale": np.inf}, ValueError, "scale is a finite number; got inf"),
        ({"softcap": 0.0}, ValueError, "softcap is a finite number above 0"),
        ({"sinks": np.ones(5, np.float32)}, ShapeError, r"one logit per query head, \[6\]"),
        ({"sinks": np.ones(6, np.int32)}, DTypeError, "sinks are float arrays; got .*int32"),
    ],
)
def test_scoring_that_is_none(backend, scoring, error, message):
    cache, history = make(backend), History(backend)
    plan = cache.plan(Batch([0], [0]), reads=True)
    q = backend.from_host(np.ones((6, 1, 8), np.float32))
    with pytest.raises(error, match=message):
        functional.attend(cache.program_state, plan, 0, q, **on_device(history, scoring))


def test_dtypes_that_do_not_attend(backend):
    cache = make(backend)
    plan = cache.plan(Batch([0], [0]), reads=True)
    q = backend.from_host(np.ones((6, 1, 8), np.int32))
    with pytest.raises(DTypeError, match=r"this cache holds .*float32; got queries of .*int32"):
        functional.attend(cache.program_state, plan, 0, q)


@pytest.mark.one_backend(name="torch")
def test_no_gradients():
    backend = get_backend("torch")
    cache = make(backend)
    plan = cache.plan(Batch([0], [0]), reads=True)
    q = backend.from_host(np.ones((6, 1, 8), np.float32)).requires_grad_()
    with pytest.raises(NotSupportedError, match="gradients do not flow through attend"):
        functional.attend(cache.program_state, plan, 0, q)


def test_a_reserve_pass(backend):
    cache = make(backend)
    cache.start_forward(Batch([0], [0]), reserve=True)
    with pytest.raises(NotSupportedError, match="a reserve pass has no plan"):
        cache.plan(reads=True)
