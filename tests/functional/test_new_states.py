"""Rings and recurrent states that no cache made, layouts, padding, and rows of the batch."""

import numpy as np
import pytest

from kvcache import (
    DTypeError,
    KVCache,
    NotSupportedError,
    RotatingKVCache,
    ShapeError,
    StateCache,
    functional,
)

# What the compiler of torch imports warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
ROWS, HEADS, DIM, SLOTS = 3, 2, 4, 6


def shapes(layout="bhtd"):
    sizes = {"b": ROWS, "h": HEADS, "t": SLOTS, "d": DIM}
    return [tuple(sizes[axis] for axis in layout)] * 2


def token(backend, position, layout="bhtd", dtype="float32"):
    """Keys that tell their position and row, and values that are those negated."""
    shape = [
        1 if axis == "t" else size for axis, size in zip(layout, shapes(layout)[0], strict=True)
    ]
    keys = np.zeros(shape) + position + 100 * np.arange(ROWS)[:, None, None, None]
    return [backend.from_host(sign * keys, dtype) for sign in (1, -1)]


def seen(backend, columns, mask, layout="bhtd"):
    """The keys that the latest query of each row sees, ascending; values are those negated."""
    keys, values = (np.moveaxis(backend.to_host(array), layout.index("t"), 0) for array in columns)
    np.testing.assert_array_equal(values, -keys)
    visible = np.ones(keys.shape[0], bool) if mask is None else backend.to_host(mask)
    visible = (
        np.broadcast_to(visible, (ROWS, 1, *visible.shape[-2:]))[:, 0, -1]
        if mask is not None
        else [visible] * ROWS
    )
    return [sorted(keys[visible[row], row, 0, 0].tolist()) for row in range(ROWS)]


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_ring_goes_on_like_a_cache(backend, sinks, layout):
    cache = RotatingKVCache(SLOTS, sinks, backend, layout=layout)
    state = functional.empty_ring(
        shapes(layout), "float32", backend=backend, sinks=sinks, layout=layout
    )
    for position in range(2 * SLOTS + 1):
        new = token(backend, position, layout)
        expected = seen(backend, cache.update(*new), cache.mask(1), layout)
        state, *columns = functional.append(state, *token(backend, position, layout))
        assert seen(backend, columns, functional.mask(state, 1), layout) == expected
    assert int(state.offset) == 2 * SLOTS + 1


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("on_device", [False, True])
def test_padding_is_that_of_a_cache(backend, ring, on_device):
    padding = [0, 2, 1]
    cache = RotatingKVCache(SLOTS, 0, backend) if ring else KVCache(backend)
    cache.pad(padding)
    given = backend.from_host(np.asarray(padding), "int32") if on_device else padding
    make = functional.empty_ring if ring else functional.empty
    state = make(shapes(), "float32", backend=backend, padding=given)
    for position in range(SLOTS + 2 if ring else SLOTS):
        new = token(backend, position)
        expected = seen(backend, cache.update(*new), cache.mask(1))
        state, *columns = functional.append(state, *token(backend, position))
        assert seen(backend, columns, functional.mask(state, 1)) == expected
    if on_device:  # a program that consumes the state leaves its caller this array
        np.testing.assert_array_equal(backend.to_host(given), padding)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recurrent_state_begins_with_zeros(backend, dtype):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    state = functional.empty_recurrent(
        [((ROWS, 4, 4), "float32"), ((ROWS, 5), dtype)], None, backend
    )
    assert [backend.dtype_name(array) for array in state.arrays] == ["float32", dtype]
    new = [
        backend.from_host(np.ones(array.shape), name)
        for array, name in zip(state.arrays, ["float32", dtype], strict=True)
    ]
    assert not any(backend.to_host(array).any() for array in state.arrays)
    state = functional.advance(state, 3, *new)
    assert int(state.offset) == 3
    cache = StateCache(backend)
    cache.advance(1, *new)
    cache.export_state()
    with pytest.raises(Exception, match="of number -1"):
        cache.import_state(state)


def made(backend, kind):
    """A state with tokens or without, and the arrays of it that have a batch."""
    if kind == "recurrent":
        state = functional.empty_recurrent([((ROWS, 2), "float32")], None, backend)
        rows = np.arange(ROWS)[:, None] * np.ones(2)
        return functional.advance(state, 1, backend.from_host(rows, "float32"))
    make = functional.empty_ring if kind == "ring" else functional.empty
    state = make(shapes(), "float32", backend=backend, padding=[0, 1, 2])
    for position in range(3):
        state, *_ = functional.append(state, *token(backend, position))
    return state


def with_batch(state):
    return state.arrays if hasattr(state, "arrays") else (state.keys, state.values, state.padding)


@pytest.mark.parametrize("kind", ["growing", "ring", "recurrent"])
@pytest.mark.parametrize("rows", [[2, 0, 0], [1], [0, 1, 2, 2]], ids=str)
def test_select(backend, kind, rows):
    """Beams that go on, in any order and number; all else of a state stays."""
    state = made(backend, kind)
    before = [backend.to_host(array).copy() for array in with_batch(state)]
    index = backend.from_host(np.asarray(rows), "int32")
    after = functional.select(state, index)
    for array, old in zip(with_batch(after), before, strict=True):
        np.testing.assert_array_equal(backend.to_host(array), old[rows])
    assert int(after.offset) == int(state.offset)
    for array, old in zip(with_batch(state), before, strict=True):
        np.testing.assert_array_equal(backend.to_host(array), old)


def test_select_in_a_program(backend, program):
    """The selected rows go on for themselves, as those of a cache do."""
    cache = KVCache(backend)
    dtype = "bfloat16" if "bfloat16" in backend.dtypes else "float32"
    state = functional.empty(shapes(), dtype, backend=backend)
    for position in range(3):
        cache.update(*token(backend, position, dtype=dtype))
        state, *_ = functional.append(state, *token(backend, position, dtype=dtype))

    def step(state, rows, keys, values):
        state = functional.select(state, rows)
        state, keys, values = functional.append(state, keys, values)
        return state, keys, values, functional.mask(state, 1)

    cache.select([2, 2, 0])
    new = token(backend, 3, dtype=dtype)
    expected = seen(backend, cache.update(*new), cache.mask(1))
    rows = backend.from_host(np.asarray([2, 2, 0]), "int32")
    state, keys, values, mask = program(step)(state, rows, *token(backend, 3, dtype=dtype))
    assert seen(backend, (keys, values), mask) == expected
    assert expected[0] == [3, 200, 201, 202]


def test_refusals(backend):
    state, rows = made(backend, "growing"), backend.from_host(np.zeros((1, 1)), "int32")
    with pytest.raises(ShapeError, match=r"rows have one axis, of one row or more; got \[1, 1\]"):
        functional.select(state, rows)
    with pytest.raises(DTypeError, match="rows are int32; got"):
        functional.select(state, backend.from_host(np.zeros(1), "float32"))
    floats = backend.from_host(np.zeros(ROWS), "float32")
    for padding, error in [(rows, ShapeError), (floats, DTypeError)]:
        # An array of NumPy is a list on the host as well.
        with pytest.raises(TypeError if backend.name == "numpy" else error, match="padding"):
            functional.empty(shapes(), "float32", backend=backend, padding=padding)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"sinks": SLOTS}, ValueError, "sinks must be fewer than slots.*got 6 sinks in 6 slots"),
        ({"sinks": 1, "padding": [0] * ROWS}, NotSupportedError, r"Export .* RotatingKVCache"),
        ({"padding": [0]}, ShapeError, "one number for each row"),
        ({"padding": [0, 0, -1]}, ValueError, "0 tokens or more"),
        ({"layout": "thbd"}, ValueError, "layout must be bhtd or bthd; got 'thbd'"),
    ],
    ids=str,
)
def test_rings_that_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        functional.empty_ring(shapes(), "float32", backend="numpy", **options)


@pytest.mark.parametrize("arrays", [[], [((), "float32")], [((2, 0), "float32")]], ids=str)
def test_recurrent_states_that_are_refused(arrays):
    with pytest.raises(ShapeError, match="one array or more, batch first"):
        functional.empty_recurrent(arrays, None, "numpy")
