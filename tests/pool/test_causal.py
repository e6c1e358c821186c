"""The causal cache: what one test each can show. Everything together is in test_any_sequence."""

from __future__ import annotations

import importlib
import itertools

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
    SharedCellsError,
    get_backend,
)
from kvcache.pool import passes

from .. import peek
from .oracle import add_positions, attended, check_table, fingerprint, put_tokens, rows

NUMPY = get_backend("numpy")


def make(backend=NUMPY, config=None, max_sequences=2, capacity=16, max_batch=8, **limits):
    cache = CausalCache(**limits)
    if config is not None:
        cache.set_config(config)
    cache.init(backend, max_sequences=max_sequences, capacity=capacity, max_batch=max_batch)
    return cache


def store(cache, positions, sequence=0):
    """A pass whose tokens are named after their positions and sequence."""
    positions = list(positions)
    cache.start_forward(Batch(positions, [sequence] * len(positions)))
    put_tokens(
        peek.buffers(cache).backend, cache, [p + 100 * sequence for p in positions], positions
    )


def seen(cache):
    """Positions that each token of the pass sees."""
    return [[p for _, p in line] for line in attended(NUMPY, cache, 0)]


@pytest.mark.parametrize("name", ["window", "memory", "chunk"])
def test_limits_are_at_least_one_token(name):
    with pytest.raises(ValueError, match=f"{name} must be >= 1 token, or None for no limit; got 0"):
        CausalCache(**{name: 0})


@pytest.mark.parametrize("name", ["max_sequences", "capacity", "max_batch"])
def test_sizes_are_at_least_one(name):
    with pytest.raises(ValueError, match=f"{name} must be >= 1; got 0"):
        make(**{name: 0})


def test_one_sequence_is_the_default():
    cache = CausalCache()
    cache.init("numpy", capacity=4, max_batch=4)
    assert cache.cells == 4
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        cache.can_resume(1, 0)


def test_memory_is_at_least_the_window():
    with pytest.raises(ValueError, match="memory must be at least the window; got 3 for 4"):
        make(window=4, memory=3)
    with pytest.raises(ValueError, match="got 4 for None"):
        make(memory=4)
    make(window=4, memory=4)


@pytest.mark.parametrize(
    ("limits", "sizes", "cells"),
    [
        ({}, (2, 16, 8), 32),
        ({"window": 4}, (1, 16, 8), 3 + 8),
        ({"window": 4}, (3, 16, 8), 3 * 4 + 8),
        ({"window": 4, "memory": 7}, (3, 16, 8), 3 * 6 + 8),
        ({"window": 4, "memory": 16}, (1, 16, 8), 15 + 8),
        ({"window": 4, "memory": 17}, (1, 16, 8), 16),
        ({"window": 16}, (2, 16, 8), 32),
        ({"window": 16}, (1, 16, 8), 23),
        ({"chunk": 4}, (2, 16, 8), 32),
    ],
)
def test_how_many_cells_there_are(limits, sizes, cells):
    names = ("max_sequences", "capacity", "max_batch")
    cache = make(**dict(zip(names, sizes, strict=True)), **limits)
    assert peek.table(cache).cells == cells
    padded = make(NUMPY, CacheConfig(padding=5), **dict(zip(names, sizes, strict=True)), **limits)
    assert peek.table(padded).cells == -(-cells // 5) * 5


def test_a_window_counts_the_token_itself():
    cache = make(window=3)
    store(cache, range(6))
    assert seen(cache) == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]


def test_a_chunk_is_seen_from_within_only():
    cache = make(chunk=3)
    store(cache, range(5))
    assert seen(cache) == [[0], [0, 1], [0, 1, 2], [3], [3, 4]]
    cache.set_causal([0, 3])
    assert seen(cache) == [[0, 1, 2, 3, 4], [0, 1], [0, 1, 2], [3, 4], [3, 4]]


def test_set_causal_is_for_this_pass():
    cache = make(window=2)
    store(cache, range(3))
    cache.set_causal([1])
    assert seen(cache) == [[0], [0, 1, 2], [1, 2]]
    cache.set_causal()
    assert seen(cache) == [[0], [0, 1], [1, 2]]
    cache.set_causal([0])
    store(cache, [3, 4])
    assert seen(cache) == [[2, 3], [3, 4]]


def test_tokens_of_an_image_see_each_other_and_no_later_image():
    cache = make(capacity=32, max_batch=32)
    cache.start_forward(Batch([0, 1, 2, 3, 4, 5, 6, 0, 1], [0] * 7 + [1] * 2))
    put_tokens(NUMPY, cache, [*range(7), 100, 101], [*range(7), 0, 1])
    cache.set_causal([[1, 2], [3, 4, 5]])
    alone = [[0], [0, 1, 2], [0, 1, 2], *[[0, 1, 2, 3, 4, 5]] * 3, list(range(7))]
    assert seen(cache) == [*alone, [0], [0, 1]]
    with pytest.raises(ValueError, match=r"a group belongs to one sequence; got batch indices"):
        cache.set_causal([[1, 2], [6, 7]])


def test_an_image_wider_than_the_window_is_seen_whole():
    cache = make(window=2)
    store(cache, range(6))
    cache.set_causal([[1, 2, 3, 4]])
    assert seen(cache) == [[0], *[[0, 1, 2, 3, 4]], *[[1, 2, 3, 4]] * 3, [4, 5]]


def test_the_mask_is_made_once_a_pass(monkeypatch):
    cache = make()
    store(cache, range(3))
    _, _, mask = cache.get()
    cache.set_layer(1)
    assert cache.get()[2] is mask
    cache.set_causal([])
    assert cache.get()[2] is mask
    cache.set_causal([0])
    assert cache.get()[2] is not mask


@pytest.mark.parametrize("mask_dtype", ["bool", "float32", "float16", "bfloat16"])
def test_mask_dtypes(backend, mask_dtype):
    if mask_dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {mask_dtype}")
    cache = make(backend, CacheConfig(mask_dtype=mask_dtype))
    store(cache, range(3))
    mask = cache.get()[2]
    assert backend.dtype_name(mask) == mask_dtype
    host = backend.to_host(mask)
    lower = np.tri(3, dtype=bool)
    expected = lower if mask_dtype == "bool" else np.where(lower, 0.0, -np.inf)
    np.testing.assert_array_equal(host[:, :3].astype(expected.dtype), expected)
    assert (host[:, 3:] == (False if mask_dtype == "bool" else -np.inf)).all()  # padding


@pytest.mark.parametrize(("keys", "values"), [*itertools.product(["thd", "htd", "hdt"], repeat=2)])
def test_layouts(backend, keys, values):
    """What is put and got is in the layout asked for, whether cells follow each other or not."""
    if backend.name == "jax" and keys != "htd":
        pytest.skip("compiles for long, and the code is the same")
    order = {"htd": (0, 1, 2), "thd": (1, 0, 2), "hdt": (0, 2, 1)}
    back = {"htd": (0, 1, 2), "thd": (1, 0, 2), "hdt": (0, 2, 1)}
    config = CacheConfig(key_layout=keys, value_layout=values)

    def shift(layer, moved, offsets):
        host = backend.to_host(moved).transpose(back[keys]).copy()
        host[..., 1] += backend.to_host(offsets)
        return backend.from_host(np.ascontiguousarray(host.transpose(order[keys])))

    cache = make(backend, config, shift=shift)

    def put(tokens, positions):
        k, v = rows(tokens, positions)
        cache.put(
            backend.from_host(np.ascontiguousarray(k.transpose(order[keys]))),
            backend.from_host(np.ascontiguousarray(v.transpose(order[values]))),
        )

    cache.start_forward(Batch([0, 1, 2, 0, 1], [0, 0, 0, 1, 1]))
    put([1, 2, 3, 4, 5], [0, 1, 2, 0, 1])  # two runs of cells
    cache.remove(0, 0, 1)
    cache.start_forward(Batch([2, 2], [0, 1]))
    put([6, 7], [2, 2])
    k, v, mask = (backend.to_host(part) for part in cache.get())
    k, v = k.transpose(back[keys]), v.transpose(back[values])
    found = [sorted(map(tuple, k[0, line].tolist())) for line in mask]
    assert found == [[(2, 0), (3, 1), (6, 2)], [(4, 0), (5, 1), (7, 2)]]
    for line in mask:
        np.testing.assert_array_equal(v[0, line, 2], k[0, line, 0] + 0.5)


@pytest.mark.one_backend(name="torch")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sequences", [1, 2], ids=["one range of cells", "scattered cells"])
def test_autograd_knows_of_later_writes(sequences, dtype):
    torch, cache = importlib.import_module("torch"), CausalCache()
    cache.init("torch", dtype, max_sequences=2, capacity=8, max_batch=8)
    new = torch.ones(1, sequences, 4, dtype=getattr(torch, dtype))
    queries, read = torch.ones(4, dtype=new.dtype, requires_grad=True), []
    for position in range(2):
        cache.start_forward(Batch([position] * sequences, range(sequences)))
        cache.put(new, new)
        read += [(queries * array).sum() for array in cache.get()[:2]]
    for result in read[:2]:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()
    for result in read[2:]:
        result.backward()


def test_layers_may_differ_and_hold_keys_only():
    cache = make()
    cache.start_forward(Batch([0, 1], [0, 0]))
    for layer, (heads, width) in enumerate([(1, 2), (4, 3)]):
        cache.set_layer(layer)
        cache.put(np.full((heads, 2, width), layer, np.float32))
        keys, values, _ = cache.get()
        assert (keys.shape, values) == ((heads, 2, width), None)
    with pytest.raises(ShapeError, match="layer 1 has values in every pass or in none"):
        cache.put(np.ones((4, 2, 3), np.float32), np.ones((4, 2, 3), np.float32))


def bad_puts():
    ones = lambda *shape: np.ones(shape, np.float32)  # noqa: E731
    good = ones(2, 3, 4)
    return [
        (ones(2, 2, 4), good, ShapeError, r"keys hold the 3 tokens of this pass in layout 'htd'"),
        (ones(3, 4), good, ShapeError, "keys hold the 3 tokens"),
        (good, ones(2, 4, 4), ShapeError, "values hold the 3 tokens"),
        (
            good.astype(np.float16),
            good,
            DTypeError,
            "keys must be float32 arrays of numpy:cpu; got",
        ),
        (good, good.astype(np.float16), DTypeError, "values must be float32 arrays"),
        ([[[1.0]]], good, DTypeError, "keys must be float32 arrays.*list"),
        (ones(1, 3, 4), good, ShapeError, "keys of a layer keep their heads and head_dim"),
        (good, ones(2, 3, 1), ShapeError, "values of a layer keep their heads and head_dim"),
        (good, None, ShapeError, "layer 0 has values in every pass or in none"),
    ]


@pytest.mark.parametrize(("keys", "values", "error", "message"), bad_puts())
def test_what_put_refuses(keys, values, error, message):
    cache = make()
    cache.start_forward(Batch([0, 1, 2], [0, 0, 0]))
    good = np.full((2, 3, 4), 7, np.float32)
    cache.put(good, good)
    before = fingerprint(cache)
    with pytest.raises(error, match=message):
        cache.put(keys, values)
    assert fingerprint(cache) == before


def test_calls_out_of_turn():
    cache = CausalCache()
    with pytest.raises(KVCacheError, match="Call init first"):
        cache.start_forward(Batch([0], [0]))
    with pytest.raises(KVCacheError, match="Call init first"):
        cache.can_resume(0, 0)
    cache.init("numpy", capacity=4, max_batch=4)
    for call in (cache.get, cache.set_causal, lambda: cache.put(rows([1], [0])[0])):
        with pytest.raises(KVCacheError, match="Call start_forward first"):
            call()
    with pytest.raises(KVCacheError, match=r"^set_config comes before init\. Make a new cache\.$"):
        cache.set_config(CacheConfig())
    cache.start_forward(Batch([0], [0]))
    with pytest.raises(KVCacheError, match=r"layer 0 was never put\. Put it before you get it"):
        cache.get()


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.copy_prefix(1, 0, 3),
        lambda cache: cache.copy_prefix(0, 0, 1),
        lambda cache: cache.remove(0, 1),
    ],
)
def test_a_pass_goes_on_without_a_sequence_that_changes(change):
    cache = make(shift=add_positions(NUMPY))
    store(cache, range(4), 1)
    cache.start_forward(Batch([0, 1, 4], [0, 0, 1]))
    put_tokens(NUMPY, cache, [0, 1, 104], [0, 1, 4])
    before = seen(cache)
    change(cache)
    assert seen(cache) == before
    with pytest.raises(KVCacheError, match="a pass is over once every layer was put and a seq"):
        cache.put(*rows([0, 1, 104], [0, 1, 4]))
    store(cache, [5], 1)
    assert seen(cache) == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.remove(1, 0),
        lambda cache: cache.remove(1, 0, 2),
        lambda cache: cache.copy_prefix(1, 2, 3),
        lambda cache: cache.restore(2, cache.snapshot(1)),
    ],
)
def test_a_pass_goes_on_while_other_sequences_come_and_go(change):
    cache = make(max_sequences=3, shift=add_positions(NUMPY))
    store(cache, range(4), 1)
    store(cache, range(2), 0)
    before = seen(cache)
    change(cache)
    assert seen(cache) == before


def test_close_frees_and_ends():
    with make() as cache:
        store(cache, range(3))
    for call in (lambda: cache.can_resume(0, 0), cache.get):
        with pytest.raises(KVCacheError, match="Call"):
            call()
    cache.close()


def test_a_batch_is_its_own():
    """The caller may use its arrays for the next pass before the mask is made."""
    positions, sequences = np.arange(3, dtype=np.int32), np.zeros(3, np.int32)
    cache = make()
    cache.start_forward(Batch(positions, sequences))
    positions += 3
    sequences += 1
    put_tokens(NUMPY, cache, [0, 1, 2], [0, 1, 2])
    assert seen(cache) == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("positions", "sequences", "multimodal", "message"),
    [
        ([], [], (), "at least one token; got 0 positions and 0 sequence ids"),
        ([0, 1], [0], (), "got 2 positions and 1 sequence ids"),
        ([0.5], [0], (), "lists of integers; got float64"),
        ([[0]], [0], (), r"lists of integers; got int64 \(1, 1\)"),
        ([2**32], [0], (), "are int32; got 4294967296"),
        ([0], [2**32 + 1], (), "are int32"),
        ([0], [0], (1,), r"multimodal holds batch indices, 0 to 0; got \(1,\)"),
        ([0], [0], (-1,), "multimodal holds batch indices"),
    ],
)
def test_what_a_batch_refuses(positions, sequences, multimodal, message):
    with pytest.raises(ValueError, match=message):
        Batch(positions, sequences, multimodal)


def test_full():
    cache = make(max_sequences=1, capacity=4)
    store(cache, range(3))
    before = fingerprint(cache)
    with pytest.raises(CacheFullError, match=r"2 needed, 1 of 4 free\. Remove sequences, or make"):
        cache.start_forward(Batch([3, 4], [0, 0]))
    assert fingerprint(cache) == before
    store(cache, [3])
    assert seen(cache) == [[0, 1, 2, 3]]


def test_a_range_is_the_smallest_that_is_padded():
    cache = make(NUMPY, CacheConfig(padding=4), capacity=32)
    store(cache, range(5), 0)
    assert cache.get()[0].shape[1] == 8
    store(cache, range(3), 1)
    assert (peek.forward_pass(cache).start, peek.forward_pass(cache).stop) == (32, 36)
    assert np.shares_memory(cache.get()[0], peek.layers(cache)[1][0])
    cache.start_forward(Batch([3, 5], [1, 0]))
    assert (peek.forward_pass(cache).start, peek.forward_pass(cache).stop) == (0, 36)


def test_where_slices_are_copies_ranges_have_few_lengths():
    class Copying(type(NUMPY)):
        slices_are_views = False

    cache = make(Copying(), CacheConfig(padding=4), capacity=64)
    lengths = set()
    for position in range(60):
        store(cache, [position], 1)
        lengths.add(cache.get()[0].shape[1])
        assert seen(cache) == [list(range(position + 1))]
    assert lengths == {4, 8, 16, 32, 64}
    store(cache, range(4), 0)
    assert (peek.forward_pass(cache).start, peek.forward_pass(cache).stop) == (0, 4)


def test_reserve_allocates_everything_and_stores_nothing():
    cache = make(NUMPY, max_sequences=2, capacity=8)
    store(cache, range(3))
    before = fingerprint(cache)
    cache.start_forward(Batch(range(5), [1] * 5), reserve=True)
    put_tokens(NUMPY, cache, [9] * 5, range(5))
    keys, _, mask = cache.get()
    assert (
        peek.forward_pass(cache).cells.dtype == np.int32
    )  # as in every pass: the same programs serve both
    assert keys.shape[1] == mask.shape[1] == 16
    assert not mask.any()
    assert fingerprint(cache)[:5] == before[:5]
    assert not cache.can_resume(1, 1)


def test_copying_takes_no_cell_and_no_memory():
    cache = make(max_sequences=3)
    store(cache, range(6))
    buffer, free = peek.layers(cache)[0][0], peek.table(cache).free
    cache.copy_prefix(0, 1, 4)
    cache.copy_prefix(1, 2, 100)
    assert peek.table(cache).free == free
    assert peek.layers(cache)[0][0] is buffer
    store(cache, [4], 1)
    assert attended(NUMPY, cache, 0) == [[(0, 0), (1, 1), (2, 2), (3, 3), (104, 4)]]
    assert cache.can_resume(2, 4)
    assert not cache.can_resume(2, 5)


def test_a_window_lets_go_of_shared_cells():
    cache = make(window=3, max_sequences=2, max_batch=4)
    store(cache, range(4))
    cache.copy_prefix(0, 1, 4)
    for position in range(4, 40):
        store(cache, [position], 0)
        store(cache, [position], 1)
        check_table(peek.table(cache))
    assert peek.table(cache).cells - peek.table(cache).free <= 2 * 4
    cache.remove(0, 0)
    cache.remove(1, 0)
    assert peek.table(cache).free == peek.table(cache).cells


def test_what_copy_prefix_and_remove_refuse():
    cache = make(shift=add_positions(NUMPY))
    store(cache, range(6))
    cache.copy_prefix(0, 1, 4)
    before = fingerprint(cache)
    for call, error, message in (
        (lambda: cache.copy_prefix(0, 2, 1), ValueError, r"sequence ids must lie in \[0, 2\)"),
        (lambda: cache.copy_prefix(-1, 0, 1), ValueError, "sequence ids must lie in"),
        (lambda: cache.copy_prefix(0, 1, -1), ValueError, "length >= 0; got -1"),
        (lambda: cache.remove(2, 0), ValueError, "sequence ids must lie in"),
        (lambda: cache.remove(-1, 0), ValueError, "sequence ids must lie in"),
        (lambda: cache.remove(0, 3, 1), ValueError, r"0 <= start <= stop; got \[3, 1\)"),
        (lambda: cache.remove(0, -1), ValueError, r"0 <= start <= stop; got \[-1, None\)"),
        (lambda: cache.remove(0, 1, 2), SharedCellsError, "at or behind position 2 of sequence 0"),
        (lambda: cache.can_resume(2, 0), ValueError, "sequence ids must lie in"),
    ):
        with pytest.raises(error, match=message):
            call()
        assert fingerprint(cache) == before
    cache.remove(0, 0)
    with pytest.raises(ValueError, match="copy_prefix needs a source that holds tokens; 0 is"):
        cache.copy_prefix(0, 1, 3)
    assert cache.can_resume(1, 4)


def test_without_a_shift_only_tails_go():
    cache = make()
    store(cache, range(6))
    message = (
        r"^removing from the middle moves later tokens, and this cache has no shift\. "
        r"Make it with CausalCache\(shift=\.\.\.\)\.$"
    )
    with pytest.raises(NotSupportedError, match=message):
        cache.remove(0, 1, 5)
    cache.remove(0, 2, 2)
    cache.remove(0, 4, 6)
    cache.remove(0, 3, 99)
    assert peek.table(cache).positions[peek.table(cache).cells_of(0)].tolist() == [0, 1, 2]


def failing(layer, keys, offsets):
    if layer == 1:
        raise RuntimeError("no shift today")
    return keys + 1


@pytest.mark.parametrize(
    "shift",
    [
        failing,
        lambda layer, keys, offsets: keys.astype(np.float64),
        lambda layer, keys, offsets: keys[:, :1] if layer else keys,
    ],
)
def test_a_shift_that_fails_changes_nothing(shift):
    cache = make(shift=shift)
    store(cache, range(6))
    before = fingerprint(cache)
    with pytest.raises(Exception, match=r"no shift today|handles arrays|shift"):
        cache.remove(0, 1, 2)
    assert fingerprint(cache) == before


def test_a_shift_is_asked_for_the_cells_that_move_only():
    asked = []

    def shift(layer, keys, offsets):
        asked.append((layer, keys[0].tolist(), offsets.tolist(), offsets.dtype))
        return keys

    cache = make(shift=shift)
    store(cache, range(6))
    cache.remove(0, 1, 4)
    moved = [[4.0, 4.0], [5.0, 5.0]]
    assert asked == [(layer, moved, [-3, -3], np.int32) for layer in (0, 1)]


@pytest.mark.parametrize("limits", [{}, {"window": 3}, {"window": 3, "memory": 5}, {"chunk": 4}])
@pytest.mark.parametrize("seed", range(6))
def test_the_short_way_gives_what_the_long_way_gives(monkeypatch, limits, seed):
    """The same calls, with and without what `plan_single` finds, lead to the same bytes."""

    def run():
        random = np.random.default_rng(seed)
        cache = make(
            max_sequences=3, capacity=20, max_batch=4, shift=add_positions(NUMPY), **limits
        )
        for step in range(250):
            sequence, other = (int(n) for n in random.integers(3, size=2))
            table, end = peek.table(cache), peek.table(cache).next_position(sequence)
            kind = random.random()
            if kind < 0.1 or end >= 18:
                cache.remove(sequence, int(random.integers(end + 1)))
            elif kind < 0.15 and table.cells_of(sequence).size:
                cache.copy_prefix(sequence, other, end)
            elif kind < 0.2 and not table.is_shared(table.cells_of(sequence)):
                cache.remove(sequence, end // 3, end // 2)
            else:
                for position in range(end, min(end + int(random.integers(1, 8)), 19)):
                    cache.start_forward(Batch([position], [sequence]))
                    put_tokens(NUMPY, cache, [step], [position])
                    plans.append(
                        (
                            peek.forward_pass(cache).cells.tolist(),
                            peek.forward_pass(cache).start,
                            peek.forward_pass(cache).stop,
                        )
                    )
            check_table(peek.table(cache))
            states.append(fingerprint(cache)[:6])
            # The end of a row that is full moves it: not a difference.
        return states, plans

    states, plans = [], []
    fast = run()
    states, plans = [], []
    taken = []
    real = passes.plan_single
    monkeypatch.setattr(passes, "plan_single", lambda *a: taken.append(real(*a)) and None)
    assert run() == fast
    assert sum(step is not None for step in taken) > 100


def test_memory_is_accounted_for_after_long_use():
    random = np.random.default_rng(1)
    cache = make(max_sequences=4, capacity=30, max_batch=8, window=5, memory=9)
    for _ in range(600):
        sequence = int(random.integers(4))
        end = peek.table(cache).next_position(sequence)
        if random.random() < 0.2:
            cache.remove(sequence, int(random.integers(end + 1)))
        elif random.random() < 0.1 and end:
            cache.copy_prefix(sequence, int(random.integers(4)), end)
        else:
            store(cache, range(end, end + int(random.integers(1, 9))), sequence)
    assert set(peek.layers(cache)) == {0, 1}
    assert peek.layers(cache)[0][0].shape[1] == 4 * 8 + 8
    for sequence in range(4):
        cache.remove(sequence, 0)
    assert peek.table(cache).free == peek.table(cache).cells
    check_table(peek.table(cache))


def test_a_row_that_is_let_go_of_at_its_very_end():
    """A sequence loses all of its cells while its row of the table has no more room."""
    cache = make(max_sequences=2, capacity=64, window=1)
    for position in range(64):
        store(cache, [position])
    store(cache, [0], sequence=1)  # trims sequence 0 to its last cell, the last of its row
    store(cache, [200])
    assert seen(cache) == [[200]]
    check_table(peek.table(cache))
