"""What a decode step costs beside the best program written by hand, read from the compiled ones."""

import re

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="needs pip install 'kvcache[jax]'")

from kvcache.adapters.jax import init, update  # noqa: E402

pytestmark = pytest.mark.one_backend(name="jax")
jnp, lax = jax.numpy, jax.lax
LAYERS, HEADS, SLOTS, DIM = 3, 2, 512, 16


def attended(x, keys, values, mask):
    scores = jnp.where(mask, x @ keys.swapaxes(-1, -2), -jnp.inf)
    return x + jax.nn.softmax(scores, -1) @ values


def ours(states, x):
    after = []
    for before in states:
        state, *columns = update(before, x, x)
        x = attended(x, *columns)
        after.append(state)
    return tuple(after), x


def ours_stacked(states, x):
    def layer(carry, number):
        states, x = carry
        states, *columns = update(states, x, x, layer=number)
        return (states, attended(x, *columns)), None

    return lax.scan(layer, (states, x), jnp.arange(LAYERS))[0]


def as_scanned_inputs(states, x):
    """The layers as inputs and outputs of the scan, as one would write first."""

    def layer(x, state):
        state, *columns = update(state, x, x)
        return attended(x, *columns), state

    x, states = lax.scan(layer, x, states)
    return states, x


def written(buffer, rows, *start):
    """A write of one token that XLA on CPU does not fuse with the read after it."""
    return lax.fori_loop(0, 2, lambda _, out: lax.dynamic_update_slice(out, rows, start), buffer)


def by_hand(states, x):
    after, offset = [], states["offset"]
    mask = jnp.arange(SLOTS)[None] <= offset
    for keys, values in states["layers"]:
        pair = [written(buffer, x, 0, 0, offset, 0) for buffer in (keys, values)]
        x = attended(x, *pair, mask)
        after.append(pair)
    return {"layers": after, "offset": offset + 1}, x


def by_hand_stacked(states, x):
    offset = states["offset"]
    mask = jnp.arange(SLOTS)[None] <= offset

    def layer(carry, number):
        x, *buffers = carry
        buffers = [written(buffer, x[None], number, 0, 0, offset, 0) for buffer in buffers]
        pair = [lax.dynamic_index_in_dim(buffer, number, keepdims=False) for buffer in buffers]
        return (attended(x, *pair, mask), *buffers), None

    (x, keys, values), _ = lax.scan(
        layer, (x, states["keys"], states["values"]), jnp.arange(LAYERS)
    )
    return {"keys": keys, "values": values, "offset": offset + 1}, x


def zeros(*shape):
    return jnp.zeros((*shape, HEADS, SLOTS, DIM))


def states_of(batch, stacked):
    sizes = {"kv_heads": HEADS, "head_dim": DIM, "dtype": "float32"}
    held = {"offset": jnp.int32(0)}
    if stacked:
        held |= {"keys": zeros(LAYERS, batch), "values": zeros(LAYERS, batch)}
    else:
        held |= {"layers": [[zeros(batch), zeros(batch)] for _ in range(LAYERS)]}
    return init(LAYERS, batch, SLOTS, stacked=stacked, **sizes), held


def compiled(step, states, batch):
    x = jnp.ones((batch, HEADS, 1, DIM))
    return jax.jit(step, donate_argnums=0).lower(states, x).compile()


def moved(program):
    return program.cost_analysis()["bytes accessed"]


def copied(program, size):
    """Shapes of the copies in a program of at least so many elements."""
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", program.as_text())
    return [shape for shape in shapes if np.prod([*map(int, shape.split(","))]) >= size]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("stacked", "step", "hand"),
    [(False, ours, by_hand), (True, ours_stacked, by_hand_stacked)],
    ids=["layers", "stacked"],
)
def test_a_step_is_as_good_as_by_hand(stacked, step, hand, batch):
    states, held = states_of(batch, stacked)
    program, best = compiled(step, states, batch), compiled(hand, held, batch)
    assert moved(program) <= 1.05 * moved(best)
    buffer = (states if stacked else states[0]).keys
    assert len(copied(program, buffer.size)) <= len(copied(best, buffer.size))
    arrays = jax.tree.leaves(states)
    assert program.memory_analysis().alias_size_in_bytes >= sum(array.nbytes for array in arrays)


def test_states_as_inputs_of_a_scan_are_copied():
    """Why a scan over layers carries the states: this is what the comparison must find."""
    states, held = states_of(4, True)
    wrong = compiled(as_scanned_inputs, states, 4)
    assert moved(wrong) > 2 * moved(compiled(by_hand_stacked, held, 4))
    assert wrong.memory_analysis().temp_size_in_bytes >= states.keys.nbytes
