"""Programs with the states of all layers: the tokens are those of a model without any state."""

import importlib.util
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="needs pip install 'kvcache[jax]'")

from kvcache import NotSupportedError, ShapeError, TrimError, functional  # noqa: E402
from kvcache.adapters.jax import (  # noqa: E402
    Full,
    Window,
    advance,
    init,
    layer_of,
    select,
    trim,
    update,
)

pytestmark = pytest.mark.one_backend(name="jax")
jnp, lax = jax.numpy, jax.lax


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = loaded("tiny")
KINDS = {
    "hybrid": tiny.HYBRID,
    "full": [Full()] * 3,
    "window": [Window(5, 1)] * 3,
    "recurrent": [tiny.MEMORY] * 3,
}
UNIFORM = ["full", "window", "recurrent"]
ROWS, PROMPT, COUNT = 2, 9, 40


def many(value):
    """A cell that only `nox -s adapters` runs."""
    return pytest.param(value, marks=pytest.mark.matrix)


def prompt():
    return np.random.default_rng(1).integers(0, tiny.VOCABULARY, (ROWS, PROMPT)).astype(np.int32)


@cache
def reference(name):
    """Weights, and the tokens that the model chooses without a state."""
    params = tiny.parameters(len(KINDS[name]))
    return params, tiny.expected(params, KINDS[name], prompt(), COUNT)


def chosen(logits):
    return logits[:, -1].argmax(-1).astype(jnp.int32)[:, None]


def prefilled(step, states, chunks):
    """States and logits behind the prompt, given in chunks of such sizes."""
    start, logits = 0, None
    for size in chunks:
        positions = jnp.arange(start, start + size)
        states, logits = step(states, prompt()[:, start : start + size], positions)
        start += size
    assert start == PROMPT
    return states, chosen(logits)


def decoded(step, states, token, between=lambda states: states):
    """The tokens chosen one by one, ``[B, COUNT]``."""
    tokens = [token]
    for position in range(PROMPT, PROMPT + COUNT - 1):
        states, logits = step(between(states), tokens[-1], jnp.array([position]))
        tokens.append(chosen(logits))
    return np.concatenate(tokens, 1)


@cache
def program(name, step=tiny.step):
    """A step with donated states, compiled once for all tests."""
    return jax.jit(partial(step, reference(name)[0]), donate_argnums=0)


@pytest.mark.parametrize("name", KINDS)
def test_outputs_vary(name):
    assert len(set(reference(name)[1].ravel().tolist())) >= 20


@pytest.mark.parametrize("chunks", [many([9]), [5, 4], many([1] * 9)], ids=str)
@pytest.mark.parametrize("name", ["hybrid", *map(many, UNIFORM)])
def test_step_by_step(name, chunks):
    _, expected = reference(name)
    step = program(name)
    states, token = prefilled(step, tiny.fresh(KINDS[name], ROWS), chunks)
    np.testing.assert_array_equal(decoded(step, states, token), expected)


def broken(state):
    """A state that gives ten times what it holds, with the other sign."""
    if hasattr(state, "arrays"):
        return state._replace(arrays=tuple(-10 * array for array in state.arrays))
    return state._replace(values=-10 * state.values)


@pytest.mark.parametrize("name", ["hybrid", *map(many, UNIFORM)])
def test_a_broken_state_shows(name):
    """What the tests above compare depends on every layer: each, broken alone, changes tokens."""
    _, expected = reference(name)
    step = program(name)
    for layer in range(len(KINDS[name])):
        states, token = prefilled(step, tiny.fresh(KINDS[name], ROWS), [9])
        states = tuple(broken(s) if n == layer else s for n, s in enumerate(states))
        assert (decoded(step, states, token) != expected).any()


@pytest.mark.parametrize("name", ["hybrid"])
def test_scan_over_tokens(name):
    params, expected = reference(name)

    @partial(jax.jit, donate_argnums=0)
    def generate(states, token):
        def body(carry, position):
            states, token = carry
            states, logits = tiny.step(params, states, token, position[None])
            return (states, chosen(logits)), token

        positions = jnp.arange(PROMPT, PROMPT + COUNT)
        carry, tokens = lax.scan(body, (states, token), positions)
        return carry, tokens[..., 0].T

    carry = prefilled(program(name), tiny.fresh(KINDS[name], ROWS), [9])
    np.testing.assert_array_equal(generate(*carry)[1], expected)


def test_while_loop_and_eval_shape():
    """The shapes of a state stay, so it is the carry of a loop; and all of it is made inside."""
    params, expected = reference("hybrid")

    @jax.jit
    def generate(tokens):
        states = tiny.fresh(tiny.HYBRID, ROWS)
        states, logits = tiny.step(params, states, tokens, jnp.arange(PROMPT))
        out = jnp.zeros((ROWS, COUNT), jnp.int32)

        def body(carry):
            states, token, out, done = carry
            out = lax.dynamic_update_slice(out, token, (0, done))
            states, logits = tiny.step(params, states, token, PROMPT + done[None])
            return states, chosen(logits), out, done + 1

        carry = states, chosen(logits), out, jnp.int32(0)
        return lax.while_loop(lambda carry: carry[3] < COUNT, body, carry)

    shapes = jax.eval_shape(generate, prompt())
    states, _, out, _ = generate(prompt())
    np.testing.assert_array_equal(out, expected)
    outside = jax.eval_shape(partial(tiny.fresh, tiny.HYBRID, ROWS))
    for one, other, made in zip(*map(jax.tree.leaves, (shapes[0], outside, states)), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype) == (made.shape, made.dtype)


@pytest.mark.parametrize("chunks", [many([9]), [5, 4]], ids=str)
@pytest.mark.parametrize("name", [many("full"), "window", many("recurrent")])
def test_scan_over_layers(name, chunks):
    _, expected = reference(name)
    step = program(name, tiny.scanned_step)
    states = tiny.fresh(KINDS[name], ROWS, stacked=True)
    states, token = prefilled(step, states, chunks)
    np.testing.assert_array_equal(decoded(step, states, token), expected)


@pytest.mark.parametrize("name", [many("full"), "window", many("recurrent")])
def test_a_broken_stack_shows(name):
    _, expected = reference(name)
    step = program(name, tiny.scanned_step)
    states, token = prefilled(step, tiny.fresh(KINDS[name], ROWS, stacked=True), [9])
    states = jax.tree.map(lambda array: jnp.roll(array, 1, 0), states)  # of the wrong layers
    assert (decoded(step, states, token) != expected).any()


def test_rows_of_unequal_length():
    kinds, padding = [Full(), Window(6), Full()], [3, 0]
    params = tiny.parameters(3)
    expected = tiny.expected(params, kinds, prompt(), COUNT, padding)
    rows = jnp.array(padding, jnp.int32)

    @partial(jax.jit, donate_argnums=0)
    def step(states, tokens, positions):
        own = positions[None] - rows[:, None]
        return tiny.step(params, states, tokens, own)

    states = jax.jit(lambda rows: tiny.fresh(kinds, ROWS, padding=rows))(rows)
    states, token = prefilled(step, states, [5, 4])
    np.testing.assert_array_equal(decoded(step, states, token), expected)


@pytest.mark.parametrize(
    ("name", "stacked"),
    [("hybrid", False), *[pytest.param(name, True, marks=pytest.mark.matrix) for name in UNIFORM]],
)
def test_beams(name, stacked):
    """Rows that change places in every step, as beams do, are those of the prompt they go on."""
    _, expected = reference(name)
    step = program(name, tiny.scanned_step if stacked else tiny.step)
    states, token = prefilled(step, tiny.fresh(KINDS[name], ROWS, stacked=stacked), [9])
    swap, tokens = jnp.array([1, 0], jnp.int32), [token]
    for turn, position in enumerate(range(PROMPT, PROMPT + 9)):
        states, last = jax.jit(select)(states, swap), tokens[-1][swap]
        states, logits = step(states, last, jnp.array([position]))
        tokens.append(chosen(logits))
        order = [1, 0] if turn % 2 == 0 else [0, 1]
        np.testing.assert_array_equal(tokens[-1][:, 0], expected[order, turn + 1])


def test_going_back():
    """Tokens proposed and refused leave no trace; a ring and a recurrent layer say that they do."""
    _, expected = reference("full")
    step = program("full")
    states, token = prefilled(step, tiny.fresh(KINDS["full"], ROWS), [9])
    states, _ = step(states, np.full((ROWS, 3), 7), jnp.arange(9, 12))
    states = jax.jit(trim)(states, jnp.int32(3))
    np.testing.assert_array_equal(decoded(step, states, token), expected)
    with pytest.raises(TrimError, match="a ring cannot go back in a program"):
        trim(tiny.fresh([Full(), Window(4)], ROWS), 1)
    with pytest.raises(TrimError, match="a recurrent layer cannot go back"):
        trim(tiny.fresh([tiny.MEMORY], ROWS, stacked=True), 1)


def test_one_compilation_per_shape():
    params, _ = reference("hybrid")
    traced = []

    def step(states, tokens, positions):
        traced.append(tokens.shape)
        return tiny.step(params, states, tokens, positions)

    states = tiny.fresh(tiny.HYBRID, ROWS)
    compiled = jax.jit(step, donate_argnums=0)
    states, token = prefilled(compiled, states, [5, 4])
    decoded(compiled, states, token)
    assert traced == [(ROWS, 5), (ROWS, 4), (ROWS, 1)]


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_layouts_and_dims(layout):
    """Values of another head_dim, and either order of the axes."""
    [state] = init(1, 2, 8, kv_heads=3, head_dim=4, value_dim=6, dtype="bfloat16", layout=layout)
    keys = jnp.ones((2, 3, 5, 4) if layout == "bhtd" else (2, 5, 3, 4), jnp.bfloat16)
    values = jnp.ones((*keys.shape[:3], 6), jnp.bfloat16)
    state, K, V, mask = update(state, keys, values)
    assert K.shape[-1], V.shape[-1] == (4, 6)
    assert K.shape[2 if layout == "bhtd" else 1] == 8
    assert (K.dtype, V.dtype, mask.shape) == (jnp.bfloat16, jnp.bfloat16, (5, 8))
    np.testing.assert_array_equal(mask, np.tri(5, 8, dtype=bool))


def test_a_window_of_more_than_all_tokens_is_a_full_layer():
    states = tiny.fresh([Window(64), Window(62, 1), Window(2**31)], ROWS, max_len=64)
    kinds = [type(state) for state in states]
    assert kinds == [functional.LayerState, functional.RingState, functional.LayerState]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: init([], 1, 8, kv_heads=1, head_dim=4, dtype="float32"), ValueError, "got none"),
        (lambda: tiny.fresh([5], 1), TypeError, r"Full\(\), Window\(size\) or .*; got 5"),
        (
            lambda: tiny.fresh([Full(), Window(4)], 1, stacked=True),
            NotSupportedError,
            "of one kind",
        ),
        (lambda: tiny.fresh([tiny.MEMORY], 1, padding=[2]), NotSupportedError, "skip padding"),
        (lambda: tiny.fresh([Window(3, 1)], 1, padding=[2]), NotSupportedError, "sinks"),
        (lambda: tiny.fresh([Window(0)], 1), ValueError, "size must be >= 1"),
        (lambda: tiny.fresh(2, 0), ValueError, "batch must be >= 1; got 0"),
        (lambda: layer_of(tiny.fresh(2, 1)[0], 0), ShapeError, "got one of a single layer"),
        (
            lambda: advance(tiny.fresh([tiny.MEMORY] * 2, 1, stacked=True), 1),
            ShapeError,
            "stacked one without layer=",
        ),
    ],
)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kind", [Full(), Window(5)])
def test_updates_that_are_refused(kind, tokens):
    [state] = tiny.fresh([kind], ROWS)
    keys = jnp.ones((ROWS, tiny.HEADS, tokens, tiny.DIM))
    with pytest.raises(ShapeError, match="keys and values match their buffer"):
        update(state, keys[:1], keys[:1])
    with pytest.raises(TypeError, match="this cache holds float32"):
        update(state, keys.astype(jnp.bfloat16), keys.astype(jnp.bfloat16))
    with pytest.raises(ShapeError, match="stacked one without layer="):
        update(tiny.fresh([kind] * 2, ROWS, stacked=True), keys, keys)
    assert int(state.offset) == 0


def test_an_array_of_padding_is_left_to_its_caller():
    rows = jnp.array([1, 0], jnp.int32)
    states = tiny.fresh(2, ROWS, padding=rows)
    jax.jit(lambda states: states, donate_argnums=0)(states)
    assert rows.tolist() == [1, 0]
