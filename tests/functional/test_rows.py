"""Batches of rows of unequal length in programs: append and mask do what update and mask do."""

import numpy as np
import pytest

from kvcache import KVCache, RotatingKVCache, functional

# What the compiler of torch imports warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

PADDING = [0, 2, 5]
KINDS = {
    "growing": (KVCache, {}, 6),
    "ring": (RotatingKVCache, {"max_size": 5}, 6),
    "ring to fill": (RotatingKVCache, {"max_size": 9}, 6),
    "sinks": (RotatingKVCache, {"max_size": 6, "keep": 2}, 6),
    "sinks, turned": (RotatingKVCache, {"max_size": 6, "keep": 2}, 17),
}


def update_of(cache, dtypes, tokens, rng):
    """Keys and values of tokens, in the layout of the cache."""
    lead = (3, 2, tokens) if cache.options.get("layout") is None else (3, tokens, 2)
    shapes = zip(((*lead, 4), (*lead, 3)), dtypes, strict=True)
    return [cache.backend.from_host(rng.normal(size=shape), dtype) for shape, dtype in shapes]


def stepper(tokens, window):
    def step(state, keys, values):
        ahead = functional.mask(state, tokens, window, ahead=True)
        state, keys, values = functional.append(state, keys, values)
        return state, keys, values, ahead, functional.mask(state, tokens, window)

    return step


def on_host(backend, mask, columns):
    """A mask as bools ``[B, queries, columns]``; that of an update may be 0 and -inf, or None."""
    if mask is None:
        return np.ones((len(PADDING), 1, columns), bool)
    seen = backend.to_host(mask)
    seen = seen if seen.dtype == bool else seen == 0
    return seen[:, 0] if seen.ndim == 4 else np.broadcast_to(seen, (len(PADDING), *seen.shape))


def attended(cache, columns, mask, order):
    """Keys and values of everything that each query of each row sees, in the order of columns."""
    backend, axis = cache.backend, 2 if cache.options.get("layout") is None else 1
    keys, values = (np.moveaxis(backend.to_host(array), axis, 1) for array in columns)
    seen = on_host(backend, mask, len(order))
    return [
        [
            [
                keys[row, column].tobytes() + values[row, column].tobytes()
                for column in order
                if query[column]
            ]
            for query in seen[row]
        ]
        for row in range(len(PADDING))
    ]


def check_same(eager, mask, columns, compiled, program_mask, positions):
    """A program shows each query the same tokens, and no more, as the eager cache does."""
    order = np.argsort(positions, kind="stable")
    got = attended(eager, compiled, program_mask, order[positions[order] >= 0])
    assert got == attended(eager, columns, mask, range(eager.positions.shape[-1]))


@pytest.mark.parametrize(("layout", "mixed"), [("bhtd", False), ("bthd", True)])
@pytest.mark.parametrize(("kind", "window"), [*((k, None) for k in KINDS), ("growing", 3)])
def test_program_is_update(backend, program, kind, window, layout, mixed):
    dtypes = ("bfloat16" if mixed and "bfloat16" in backend.dtypes else "float32", "float32")
    make, options, prompt = KINDS[kind]
    count = 2 if kind == "growing" else 1
    plain, cache = (make(backend=backend, step=4, layout=layout, **options) for _ in range(2))
    rng = np.random.default_rng(0)
    first = update_of(plain, dtypes, prompt, rng)
    for each in (plain, cache):
        each.pad(PADDING)
        each.update(*first)
    state, step = cache.export_state(8 * count), program(stepper(count, window))
    for _ in range(8):
        update = update_of(plain, dtypes, count, rng)
        columns, mask = plain.update(*update), plain.mask(count, window)
        state, keys, values, ahead, shown = step(state, *update)
        assert [keys.dtype, values.dtype] == [array.dtype for array in update]
        np.testing.assert_array_equal(backend.to_host(ahead), backend.to_host(shown))
        positions = backend.to_host(state.positions)
        check_same(plain, mask, columns, (keys, values), shown, positions)
    cache.import_state(state)
    assert (cache.offset, cache.padding.tolist()) == (plain.offset, PADDING)
    update = update_of(plain, dtypes, 3, rng)
    got, expected = ((*each.update(*update), each.mask(3, window)) for each in (cache, plain))
    for row in range(len(PADDING)):
        shown, wanted = cache.positions[row], plain.positions[row]
        np.testing.assert_array_equal(shown[shown >= 0], wanted[wanted >= 0])
    assert attended(cache, got[:2], got[2], range(cache.positions.shape[-1])) == attended(
        plain, expected[:2], expected[2], range(plain.positions.shape[-1])
    )


@pytest.mark.parametrize("kind", ["growing", "sinks"])
def test_a_query_of_padding_sees_itself_alone(backend, program, kind):
    """Softmax over nothing is NaN; here a row begins in the program."""
    make, options, _ = KINDS[kind]
    cache, rng = make(backend=backend, step=4, **options), np.random.default_rng(0)
    cache.pad(PADDING)
    cache.update(*update_of(cache, ("float32", "float32"), 2, rng))
    state, step = cache.export_state(6), program(stepper(1, None))
    for offset in range(3, 8):
        state, *_, mask = step(state, *update_of(cache, ("float32", "float32"), 1, rng))
        sees = backend.to_host(mask)[:, 0, 0].sum(1).tolist()
        latest = [offset - padding for padding in PADDING]
        limit = 6 if kind == "sinks" else offset
        assert sees == [min(max(1, number), limit) for number in latest]


@pytest.mark.parametrize("kind", ["ring", "sinks"])
def test_rows_selected_between_two_programs(backend, program, kind):
    """At last no row is padded, and still the ring holds as many first tokens as before."""
    make, options, _ = KINDS[kind]
    cache, plain = (make(backend=backend, step=4, **options) for _ in range(2))
    rng, dtypes = np.random.default_rng(0), ("float32", "float32")
    first, step = update_of(cache, dtypes, 9, rng), program(stepper(1, None))
    for each in (cache, plain):
        each.pad(PADDING)
        each.update(*first)
    for rows, padding in (([2, 0, 1], [5, 0, 2]), ([1, 2, 1], [0, 2, 0]), ([0, 2, 0], None)):
        for each in (cache, plain):
            each.select(rows)
        assert (None if cache.padding is None else cache.padding.tolist()) == padding
        state, update = cache.export_state(2), update_of(cache, dtypes, 1, rng)
        columns, mask = plain.update(*update), plain.mask(1)
        state, keys, values, _, shown = step(state, *update)
        positions = backend.to_host(state.positions)
        check_same(plain, mask, columns, (keys, values), shown, positions)
        cache.import_state(state)
