"""Attention of a pass over what its tokens see, against float64, on every backend."""

import numpy as np
import pytest

from kvcache import (
    Batch,
    CacheConfig,
    CausalCache,
    DTypeError,
    EncoderCache,
    KVCacheError,
    NotSupportedError,
    RecurrentCache,
    ShapeError,
    WrapperCache,
    get_backend,
)
from kvcache.backends.products import ReadCosts, Scoring

from .. import peek
from .attention_oracle import HEAD_DIM, KV_HEADS, Q_HEADS, History, attention

SCALE = HEAD_DIM**-0.5
TOLERANCE = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}
"""What rounding of inputs to kernels, weights and outputs may add up to."""


# JAX compiles a program for each shape.
BACKENDS = (
    "numpy",
    "torch",
    pytest.param("jax", marks=pytest.mark.matrix),
    "mlx",
    "array_api:array_api_strict",
    "torch:cuda",
    pytest.param("jax:gpu", marks=pytest.mark.matrix),
)


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request):
    return get_backend(request.param)


@pytest.fixture
def pieces(backend):
    """A backend that reads in as many pieces as it can."""
    eager = get_backend(backend.spec)
    eager.read_costs = ReadCosts(shared=1, run=2, least=1)
    return eager


def make(backend, *, sequences=4, capacity=40, dtype="float32", config=None, **options):
    cache = CausalCache(**options)
    if config is not None:
        cache.set_config(config)
    cache.init(backend, dtype, max_sequences=sequences, capacity=capacity, max_batch=32)
    return cache


def run(cache, history, pairs, axes="htd", sees=None, ahead=(), **scoring):
    """One pass of ``(position, sequence)``; its outputs are compared with what they should be."""
    positions, sequences = zip(*pairs, strict=True)
    cache.start_forward(Batch(positions, sequences))
    q = history.put(cache, positions, sequences, axes)
    if ahead:
        cache.set_causal(ahead)
    check(cache, history, q, positions, sequences, axes, sees, **scoring)


def check(cache, history, q, positions, sequences, axes="htd", sees=None, **scoring):
    on_device = dict(scoring)
    if scoring.get("sinks") is not None:
        on_device["sinks"] = history.backend.from_host(scoring["sinks"])
    out = cache.attend(history.to_device(q, axes), **on_device)
    host = history.backend.to_host(out)
    assert host.dtype == q.dtype
    host = host.transpose([axes.index(axis) for axis in "htd"]).astype(np.float64)
    scoring.setdefault("scale", SCALE)
    expected = history.expected(q, positions, sequences, sees, **scoring)
    assert host.shape == expected.shape
    np.testing.assert_allclose(host, expected, rtol=0, atol=TOLERANCE[history.dtype])


def span(start, stop, sequence):
    return [(position, sequence) for position in range(start, stop)]


def test_prefill_decode_and_mixed_passes(backend):
    cache, history = make(backend), History(backend)
    run(cache, history, span(0, 9, 0) + span(0, 4, 1))
    run(cache, history, [(4, 1), (9, 0)])
    run(cache, history, [(10, 0), (0, 2), (5, 1), (1, 2), (11, 0)])
    run(cache, history, [(3, 2), (2, 2), (6, 1)])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_dtypes(pieces, dtype):
    if dtype not in pieces.dtypes:
        with pytest.raises(DTypeError):
            make(pieces, dtype=dtype)
        return
    cache, history = make(pieces, dtype=dtype), History(pieces, dtype)
    run(cache, history, span(0, 9, 0))
    cache.copy_prefix(0, 1, 8)
    history.copy(0, 1, 8)
    run(cache, history, [(9, 0), (8, 1)])
    run(cache, history, [*span(10, 14, 0), (9, 1)], softcap=2.0)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_keys_of_float8_take_wider_queries(backend, dtype):
    if dtype not in backend.dtypes:
        return
    cache, history = make(backend, dtype=dtype), History(backend, dtype)
    positions, sequences = zip(*span(0, 5, 0), strict=True)
    cache.start_forward(Batch(positions, sequences))
    q = history.put(cache, positions, sequences).astype(np.float32)
    history.dtype = "float32"
    check(cache, history, q, positions, sequences)
    with pytest.raises(DTypeError, match="queries must be float8"):
        cache.attend(backend.from_host(q.astype(np.int8)))


@pytest.mark.parametrize(
    ("options", "sees"),
    [
        ({"window": 4}, lambda i, p, o: p - 4 < o <= p),
        ({"chunk": 5}, lambda i, p, o: p // 5 * 5 <= o <= p),
        ({"window": 3, "chunk": 5}, lambda i, p, o: max(p - 2, p // 5 * 5) <= o <= p),
    ],
)
def test_windows_and_chunks(pieces, options, sees):
    cache, history = make(pieces, **options), History(pieces)
    run(cache, history, span(0, 12, 0) + span(0, 3, 1), sees=sees)
    for step in range(4):
        run(cache, history, [(12 + step, 0), (3 + step, 1)], sees=sees)
    run(cache, history, span(16, 23, 0), sees=sees)


def test_tokens_that_see_others_ahead(backend):
    cache, history = make(backend, window=3), History(backend)
    image = {2, 3, 4, 5}

    def sees(i, position, other):
        own = position - 3 < other <= position
        return own or (i in image and other in image)

    run(cache, history, span(0, 8, 0), sees=sees, ahead=[sorted(image)])


def test_what_is_ahead_may_be_said_after_attention(backend):
    cache, history = make(backend), History(backend)
    run(cache, history, span(0, 4, 0))
    cache.start_forward(Batch([4, 5], [0, 0]))
    q = history.put(cache, [4, 5], [0, 0])
    check(cache, history, q, [4, 5], [0, 0])
    cache.set_causal([0])
    check(cache, history, q, [4, 5], [0, 0], sees=lambda i, position, other: True)


def test_all_of_a_sequence_ahead(backend):
    cache, history = make(backend), History(backend)
    run(cache, history, span(0, 4, 0))
    sees = lambda i, position, other: other <= position or i == 1  # noqa: E731
    run(cache, history, span(4, 9, 0), sees=sees, ahead=[1])


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [None, np.linspace(-1, 2, Q_HEADS, dtype=np.float32)])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_scoring(pieces, softcap, sinks, scale):
    scoring = {"softcap": softcap, "sinks": sinks}
    if scale is not None:
        scoring["scale"] = scale
    cache, history = make(pieces), History(pieces)
    run(cache, history, span(0, 9, 0), **scoring)
    cache.copy_prefix(0, 1, 9)
    history.copy(0, 1, 9)
    run(cache, history, [(9, 0), (9, 1)], **scoring)


@pytest.mark.parametrize(("keys", "values"), [("thd", "thd"), ("hdt", "htd"), ("thd", "hdt")])
def test_layouts(backend, keys, values):
    config = CacheConfig(key_layout=keys, value_layout=values)
    cache, history = make(backend, config=config), History(backend)
    for pairs in (span(0, 5, 0), [(5, 0), (0, 1)], [(6, 0), (1, 1)]):
        positions, sequences = zip(*pairs, strict=True)
        cache.start_forward(Batch(positions, sequences))
        q = history.put(cache, positions, sequences, keys, values)
        check(cache, history, q, positions, sequences, keys)


@pytest.mark.parametrize("value_dim", [None, 5])
def test_keys_alone_and_values_of_another_size(pieces, value_dim):
    cache, history = make(pieces), History(pieces, value_dim=value_dim)
    run(cache, history, span(0, 9, 0))
    run(cache, history, [(9, 0), (0, 1)])


@pytest.mark.parametrize("columns", [341, 342, 1500])
def test_one_query_over_a_long_history(backend, columns):
    """NumPy multiplies it with 341 keys at a time."""
    rng = np.random.default_rng(0)
    shapes = (Q_HEADS, 1, 128), (KV_HEADS, columns, 128), (KV_HEADS, columns, 16)
    q, keys, values = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    arrays = map(backend.from_host, (q, keys, values))
    out, _ = backend.attention(*arrays, Scoring(128**-0.5))
    expected = attention(q[:, 0], keys, values, 128**-0.5)
    np.testing.assert_allclose(backend.to_host(out)[:, 0], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("columns", [1_500, 20_000])
@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1)], ids=["rows", "columns"])
def test_many_queries_over_a_long_history(backend, columns, axes):
    """torch multiplies them by oneDNN, 52 rows at a time where the keys are 20,000."""
    rng = np.random.default_rng(0)
    shapes = (Q_HEADS, 32, 128), (KV_HEADS, columns, 128), (KV_HEADS, columns, 128)
    q, keys, values = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    own = [backend.from_host(array.transpose(axes).copy()) for array in (keys, values)]
    views = [backend.xp.permute_dims(array, axes) for array in own]
    scoring = Scoring(128**-0.5, log_sum_exp=True)
    out, logarithm = map(backend.to_host, backend.attention(backend.from_host(q), *views, scoring))
    for query in range(0, 32, 31):
        expected = attention(q[:, query], keys, values, 128**-0.5)
        np.testing.assert_allclose(out[:, query], expected, rtol=0, atol=2e-6)
        scores = np.einsum("hd,hcd->hc", q[:, query], keys.repeat(Q_HEADS // KV_HEADS, 0))
        total = np.exp(scores.astype(np.float64) * 128**-0.5).sum(-1)
        np.testing.assert_allclose(logarithm[:, query], np.log(total), rtol=1e-6)


def test_many_tokens_in_blocks(backend, monkeypatch):
    for name in ("products.SCORES", "products._BAND"):
        monkeypatch.setattr(f"kvcache.backends.{name}", 128)
    cache, history = make(backend, capacity=80), History(backend)
    run(cache, history, span(0, 45, 0) + span(0, 20, 1))
    run(cache, history, span(45, 80, 0))


@pytest.mark.one_backend(name="jax")
def test_jax_in_programs_for_few_lengths():
    traced = []

    class Noting(type(get_backend("jax"))):
        @classmethod
        def traced_attention(cls, q, *others):
            traced.append(q.shape[1])
            return super().traced_attention(q, *others)

    backend = Noting()
    cache, history = make(backend, sequences=8), History(backend)
    for tokens in (5, 6, 7, 8, 3, 4):
        start = {sequence: cache.next_position(sequence) for sequence in range(tokens)}
        run(cache, history, [(position, sequence) for sequence, position in start.items()])
    assert traced == [8, 4]


@pytest.mark.one_backend(name="jax")
def test_jax_reads_a_prefix_once():
    backend = get_backend("jax")
    backend.read_costs = ReadCosts(shared=1, run=2, least=1)
    cache, history = make(backend), History(backend)
    run(cache, history, span(0, 5, 0) + span(0, 6, 1))
    cache.copy_prefix(0, 2, 5)
    history.copy(0, 2, 5)
    for step in range(3):
        run(cache, history, [(5 + step, 0), (6 + step, 1), (5 + step, 2)])


# Sharing.


def shared_pool(backend, window=None):
    """A pool of five sequences: a prompt for all, and a document that three of them have."""
    cache, history = make(backend, sequences=5, window=window), History(backend)
    run(cache, history, span(0, 12, 0))
    for target, length in ((1, 12), (2, 12), (3, 6), (4, 6)):
        cache.copy_prefix(0, target, length)
        history.copy(0, target, length)
    return cache, history


def products(cache):
    """By segment and level of the plan: the tokens of every product, and the columns it meets."""
    return [
        [[(read.start, read.stop, read.cells.size) for read in level] for level in part.levels]
        for part in peek.reads(cache).segments
    ]


def test_shared_prefixes_are_read_once(pieces):
    cache, history = shared_pool(pieces)
    run(cache, history, [(12, 0), (6, 3), (12, 1), (12, 2), (6, 4)])
    own = [(0, 1, 1), (1, 2, 1), (2, 3, 1), (3, 4, 1), (4, 5, 1)]
    assert products(cache) == [[own, [(0, 5, 6)], [(0, 3, 6)]]]
    for step in (7, 8):
        run(cache, history, [(step, 3), (6 + step, 0), (6 + step, 1), (step, 4), (6 + step, 2)])
    run(cache, history, [*span(15, 18, 1), (9, 3), (15, 2)])


def test_sharing_waits_until_it_pays(backend):
    backend = get_backend(backend.spec)
    backend.read_costs = ReadCosts(shared=19, run=99, least=6)
    cache, history = shared_pool(backend)
    run(cache, history, [(12, 0), (12, 1), (6, 3)])
    assert {len(part.levels) for part in peek.reads(cache).segments} == {1}
    run(cache, history, [(13, 0), (13, 1), (12, 2), (7, 3), (6, 4)])
    assert [len(part.levels) for part in peek.reads(cache).segments] == [2]


def test_windows_share_only_where_they_begin_alike(pieces):
    sees = lambda i, position, other: position - 20 < other <= position  # noqa: E731
    cache, history = make(pieces, sequences=3, window=20, capacity=60), History(pieces)
    run(cache, history, span(0, 30, 0), sees=sees)
    for target in (1, 2):
        cache.copy_prefix(0, target, 30)
        history.copy(0, target, 30)
    for step in range(3):
        run(cache, history, [(30 + step, 0), (30 + step, 1)], sees=sees)
        assert len(peek.reads(cache).segments[0].levels) >= 2
    run(cache, history, [(33, 0), (30, 2)], sees=sees)
    cache.copy_prefix(0, 1, 34)
    history.copy(0, 1, 34)
    run(cache, history, [*span(34, 36, 0), *span(34, 36, 1)], sees=sees)


def test_scattered_cells(pieces):
    cache = make(pieces, sequences=3, capacity=12, config=CacheConfig(padding=1))
    history = History(pieces)
    for step in range(0, 12, 2):  # sequences outgrow their parts of the pool in turn
        run(cache, history, span(step, step + 2, 0))
        if step < 4:
            run(cache, history, span(step, step + 2, 1) + span(step, step + 2, 2))
    cache.remove(1, 0)
    history.held[1] = {}
    run(cache, history, span(12, 24, 0))
    run(cache, history, [(24, 0), (4, 2)])
    assert not peek.table(cache).is_run(peek.table(cache).cells_of(0))


def test_rows_copied_for_one_layer_stay_apart_from_those_of_another(backend, monkeypatch):
    """Also while another thread attends, here in the middle of a product of the first layer."""
    config = CacheConfig(padding=1)
    cache, history = make(backend, sequences=2, capacity=4, config=config), History(backend)
    # The first sequence outgrows its part of the pool, up to that of the second one and beyond.
    for pairs in ([(0, 0), (0, 1)], span(1, 5, 0), [(5, 0), (1, 1)]):
        positions, sequences = zip(*pairs, strict=True)
        cache.start_forward(Batch(positions, sequences))
        q = history.put(cache, positions, sequences)
        put_negative(cache, history, pairs)
    assert not any(peek.table(cache).is_run(peek.table(cache).cells_of(s)) for s in (0, 1))
    queries, attention = history.to_device(q, "htd"), backend.attention
    expected = history.expected(q, positions, sequences, scale=SCALE)
    nested = []

    def attend(layer):
        cache.set_layer(layer)
        return backend.to_host(cache.attend(queries)) * (-1 if layer else 1)

    def interrupted(*args):
        if not nested:
            nested.append(None)
            nested[0] = attend(1)
        return attention(*args)

    monkeypatch.setattr(backend, "attention", interrupted)
    for out in (attend(0), attend(1), attend(0), *nested):
        np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE["float32"])


def put_negative(cache, history, pairs):
    """Put the same tokens in layer 1, with values of the other sign."""
    rows = [history.held[sequence][position] for position, sequence in pairs]
    keys, values = (np.stack(arrays, axis=1) for arrays in zip(*rows, strict=True))
    cache.set_layer(1)
    cache.put(history.to_device(keys, "htd"), history.to_device(-values, "htd"))


def test_sequences_whose_cells_lie_alike_are_read_together(pieces):
    config = CacheConfig(padding=1)
    cache, history = make(pieces, sequences=5, capacity=6, config=config), History(pieces)
    for sequence in range(4):  # two of them fill their part of the pool, up to the next one
        run(cache, history, span(0, 6 - sequence % 2, sequence))
    run(cache, history, [(6, 0), (5, 1), (6, 2), (5, 3)])
    in_a_row, stray = peek.reads(cache).segments
    assert [len(part.levels) for part in (in_a_row, stray)] == [1, 2]
    assert peek.reads(cache).order.tolist() == [1, 3, 0, 2]
    assert (in_a_row.start, in_a_row.stop, stray.start, stray.stop) == (0, 2, 2, 4)


def test_after_a_removal_that_moves_keys(backend):
    cache = make(backend, shift=lambda layer, keys, offsets: keys)
    history = History(backend)
    run(cache, history, span(0, 9, 0))
    cache.remove(0, 2, 5)
    held = history.held[0]
    history.held[0] = {p if p < 2 else p - 3: row for p, row in held.items() if not 2 <= p < 5}
    run(cache, history, [(6, 0), (7, 0), (0, 1)])
    run(cache, history, [(8, 0), (1, 1)])


def test_a_sequence_removed_during_the_pass_is_read_as_it_was(backend):
    cache, history = make(backend), History(backend)
    run(cache, history, span(0, 5, 0) + span(0, 3, 1))
    positions, sequences = [5, 3], [0, 1]
    cache.start_forward(Batch(positions, sequences))
    q = history.put(cache, positions, sequences)
    cache.remove(0, 0)
    check(cache, history, q, positions, sequences)


# What a query may not see.


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_cells_that_nobody_sees_may_hold_anything(pieces, number):
    cache, history = shared_pool(pieces)
    run(cache, history, [(12, 0), (6, 3)])
    run(cache, history, [(7, 3), (12, 2)])
    pairs = [(8, 3), (13, 2)]
    positions, sequences = zip(*pairs, strict=True)
    cache.start_forward(Batch(positions, sequences))
    q = history.put(cache, positions, sequences)
    table = peek.table(cache)
    seen = np.concatenate([table.cells_of(sequence) for sequence in (2, 3)])
    peek.poison(cache, np.setdiff1d(np.arange(cache.cells), seen), number)
    check(cache, history, q, positions, sequences)


def test_a_window_hides_what_it_has_left(pieces):
    sees = lambda i, position, other: position - 3 < other <= position  # noqa: E731
    cache, history = make(pieces, window=3, memory=12), History(pieces)
    run(cache, history, span(0, 9, 0), sees=sees)
    cache.start_forward(Batch([9, 10], [0, 0]))
    q = history.put(cache, [9, 10], [0, 0])
    peek.poison(cache, peek.table(cache).cells_of(0)[:7], np.nan)
    check(cache, history, q, [9, 10], [0, 0], sees=sees)


def test_nan_of_one_sequence_stays_there(pieces):
    cache, history = shared_pool(pieces)
    cache.start_forward(Batch([12, 12], [0, 1]))
    q = history.put(cache, [12, 12], [0, 1])
    q[:, 1] = np.nan
    out = pieces.to_host(cache.attend(pieces.from_host(q)))
    expected = history.expected(q, [12, 12], [0, 1], scale=SCALE)
    np.testing.assert_allclose(out[:, 0], expected[:, 0], rtol=0, atol=TOLERANCE["float32"])


def test_a_reserve_pass_has_shapes_alone(backend):
    cache, history = make(backend), History(backend, value_dim=5)
    cache.start_forward(Batch(range(6), [0] * 6), reserve=True)
    q = history.put(cache, range(6), [0] * 6)
    out = backend.to_host(cache.attend(backend.from_host(q)))
    np.testing.assert_array_equal(out, np.zeros((Q_HEADS, 6, 5)))


def test_no_array_of_tokens_by_pool():
    cache, history = make("numpy", sequences=8, capacity=5000), History(get_backend("numpy"))
    run(cache, history, span(0, 20, 0) + span(0, 30, 5))
    for part in peek.reads(cache).segments:
        for read in (read for level in part.levels for read in level):
            assert read.cells.size <= 30


# What is refused.


def begun(backend, **options):
    cache, history = make(backend, **options), History(backend)
    cache.start_forward(Batch([0, 1], [0, 0]))
    return cache, history.put(cache, [0, 1], [0, 0])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((Q_HEADS, 3, HEAD_DIM), "the 2 tokens of this pass"),
        ((Q_HEADS, HEAD_DIM), "the 2 tokens of this pass"),
        ((Q_HEADS, 2, 7), "head_dim of the keys, 8; got 7"),
        ((5, 2, HEAD_DIM), "multiple of the 2 kv_heads; got 5"),
        ((0, 2, HEAD_DIM), "multiple of the 2 kv_heads; got 0"),
    ],
)
def test_queries_of_another_shape(backend, shape, message):
    cache, _ = begun(backend)
    with pytest.raises(ShapeError, match=message):
        cache.attend(backend.from_host(np.zeros(shape, np.float32)))


def test_queries_of_another_dtype_or_framework(backend):
    cache, q = begun(backend)
    with pytest.raises(DTypeError, match="queries must be float32 arrays"):
        cache.attend(backend.from_host(q.astype(np.int32)))
    with pytest.raises(DTypeError, match="queries must be float32 arrays"):
        cache.attend([1.0])


@pytest.mark.parametrize(
    ("scoring", "kind", "message"),
    [
        ({"softcap": 0.0}, ValueError, "softcap is a finite number above 0"),
        ({"softcap": float("inf")}, ValueError, "softcap is a finite number above 0"),
        ({"scale": float("nan")}, ValueError, "scale is a finite number"),
        ({"sinks": [0.0] * Q_HEADS}, DTypeError, "sinks must be float arrays"),
    ],
)
def test_bad_scoring(backend, scoring, kind, message):
    cache, q = begun(backend)
    with pytest.raises(kind, match=message):
        cache.attend(backend.from_host(q), **scoring)


def test_sinks_are_one_per_head(backend):
    cache, q = begun(backend)
    with pytest.raises(ShapeError, match=r"one logit per query head, \[6\]"):
        cache.attend(backend.from_host(q), sinks=backend.from_host(np.zeros(KV_HEADS, np.float32)))


def test_integers_are_no_scores():
    cache = make("numpy", dtype="int8")
    cache.start_forward(Batch([0], [0]))
    cache.put(np.zeros((1, 1, 4), np.int8), np.zeros((1, 1, 4), np.int8))
    with pytest.raises(DTypeError, match="computed on floats"):
        cache.attend(np.zeros((1, 1, 4), np.int8))


def test_values_of_other_heads():
    cache = make("numpy")
    cache.start_forward(Batch([0], [0]))
    cache.put(np.zeros((2, 1, 4), np.float32), np.zeros((1, 1, 4), np.float32))
    with pytest.raises(ShapeError, match="a value for each key"):
        cache.attend(np.zeros((2, 1, 4), np.float32))


def test_a_layer_that_the_pass_has_not_put(backend):
    cache, q = begun(backend)
    cache.set_layer(1)
    with pytest.raises(KVCacheError, match="layer 1 was not put in this pass"):
        cache.attend(backend.from_host(q))
    cache.set_layer(0)
    cache.start_forward(Batch([2, 3], [0, 0]))
    with pytest.raises(KVCacheError, match="layer 0 was not put in this pass"):
        cache.attend(backend.from_host(q))


def test_without_a_pass():
    with pytest.raises(KVCacheError, match="Call start_forward first"):
        make("numpy").attend(np.zeros((2, 1, 4), np.float32))


@pytest.mark.one_backend(name="torch")
def test_gradients_do_not_flow():
    torch = pytest.importorskip("torch")
    cache, q = begun(get_backend("torch"))
    with pytest.raises(NotSupportedError, match="gradients do not flow through a pool"):
        cache.attend(torch.tensor(q, requires_grad=True))


def test_a_wrapper_asks_the_cache_of_the_layer(backend):
    cache = WrapperCache(CausalCache(window=2), CausalCache(), RecurrentCache())
    cache.init(backend, max_sequences=2, capacity=20, max_batch=20)
    histories = [History(backend, seed=seed) for seed in (0, 1)]
    positions, sequences = zip(*span(0, 6, 1), strict=True)
    cache.start_forward(Batch(positions, sequences))
    sees = [lambda i, p, o: p - 2 < o <= p, lambda i, p, o: o <= p]
    for kind, (history, seen) in enumerate(zip(histories, sees, strict=True)):
        cache.set_layer_type(kind)
        q = history.put(cache, positions, sequences)
        check(cache, history, q, positions, sequences, sees=seen)
    cache.set_layer_type(2)
    with pytest.raises(NotSupportedError, match="RecurrentCache computes no attention"):
        cache.attend(backend.from_host(q))


def test_encoder_output_is_read_by_get():
    cache = EncoderCache()
    cache.init("numpy")
    with pytest.raises(NotSupportedError, match="EncoderCache computes no attention"):
        cache.attend(np.zeros((2, 1, 4), np.float32))
