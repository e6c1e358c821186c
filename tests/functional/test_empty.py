"""A state that no cache made: the same as one of an empty cache, in a program and outside."""

import numpy as np
import pytest

from kvcache import DTypeError, KVCache, NotSupportedError, ShapeError, StateError, functional

# What the compiler of torch imports warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
SHAPES = (2, 3, 8, 4), (2, 3, 8, 6)


def tokens(backend, dtype, count, start=0):
    """Keys and values whose numbers tell their position."""
    rows = np.arange(start, start + count, dtype=np.float32)[:, None]
    return [
        backend.from_host(np.broadcast_to(sign * rows, (*shape[:2], count, shape[3])), dtype)
        for sign, shape in zip((1, -1), SHAPES, strict=True)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inside", [True, False])
def test_it_goes_on_like_a_cache(backend, program, inside, dtype):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    cache = KVCache(backend)

    def prefill(_, keys, values):  # the first argument of a program is donated
        state = functional.empty(SHAPES, dtype, backend=backend)
        return functional.append(state, keys, values)

    def step(state, keys, values):
        state, keys, values = functional.append(state, keys, values)
        return state, keys, values, functional.mask(state, 1)

    first, second = tokens(backend, dtype, 3), tokens(backend, dtype, 1, start=3)
    state, *_ = (program(prefill) if inside else prefill)((), *first)
    state, keys, values, mask = program(step)(state, *second)
    cache.update(*first)
    expected = cache.update(*second)
    assert [int(state.offset), int(state.written)] == [4, 4]
    np.testing.assert_array_equal(backend.to_host(mask)[0], np.arange(8) < 4)
    for pair in zip((keys, values), expected, strict=True):
        got, wanted = map(backend.to_host, pair)
        np.testing.assert_array_equal(got[:, :, :4], wanted[:, :, :4])
        assert not got[:, :, 4:].any()


def test_more_tokens_than_slots_are_not_written(backend):
    state = functional.empty(SHAPES, "float32", backend=backend)
    state, *_ = functional.append(state, *tokens(backend, "float32", 7))
    before = backend.to_host(state.keys)[:, :, :7]
    state, *_ = functional.append(state, *tokens(backend, "float32", 2, start=7))
    np.testing.assert_array_equal(backend.to_host(state.keys)[:, :, :7], before)


def test_states_are_independent(backend):
    """Zeros of their own: what one program writes, no other state shows."""
    one, other = (functional.empty(SHAPES, "float32", backend=backend) for _ in range(2))
    functional.append(one, *tokens(backend, "float32", 3))
    assert not backend.to_host(other.keys).any()
    assert int(other.offset) == 0


def test_no_cache_takes_it(backend):
    cache = KVCache(backend)
    cache.update(*tokens(backend, "float32", 3))
    cache.export_state(1)
    with pytest.raises(StateError, match=r"got one of number -1"):
        cache.import_state(functional.empty(SHAPES, "float32", backend=backend))


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 3, 8, 4)],
        [(2, 3, 8), (2, 3, 8)],
        [(2, 3, 8, 4), (2, 3, 9, 4)],
        [(2, 3, 8, 4), (1, 3, 8, 4)],
        [(2, 3, 0, 4), (2, 3, 0, 4)],
        [],
    ],
    ids=str,
)
def test_shapes_that_do_not_go_together(shapes):
    with pytest.raises(ShapeError, match="of one batch, kv_heads and slots"):
        functional.empty(shapes, "float32", backend="numpy")


def test_other_arguments_that_are_refused():
    with pytest.raises(DTypeError, match="float128"):
        functional.empty(SHAPES, "float128", backend="numpy")
    with pytest.raises(NotSupportedError, match="made on jax; got 'numpy'"):
        functional.empty(SHAPES, "float32", sharding="model", backend="numpy")
    with pytest.raises(TypeError, match="integer"):
        functional.empty([(2, 3, 8.5, 4)] * 2, "float32", backend="numpy")
