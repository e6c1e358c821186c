"""What makes programs worth it on JAX: no copy, few compilations, and scan."""

import re

import numpy as np
import pytest

from kvcache import Batch, CausalCache, KVCache, RecurrentCache, functional, get_backend

jax = pytest.importorskip("jax", reason="needs pip install 'kvcache[jax]'")
pytestmark = pytest.mark.one_backend(name="jax")

LAYERS, HEADS, DIM = 2, 2, 8
JAX = get_backend("jax:cpu")


def pool(dtype="float32", max_sequences=1, capacity=2048):
    cache = CausalCache()
    cache.init(JAX, dtype, max_sequences=max_sequences, capacity=capacity, max_batch=64)
    cache.allocate(range(LAYERS), HEADS, DIM)
    return cache


def step(state, plan, x):
    """A model: each layer attends with what the one before found."""
    for layer in range(LAYERS):
        new = x.astype(plan.key_like.dtype)
        state = functional.put(state, plan, layer, new, new)
        keys, values, mask = functional.get(state, plan, layer)
        scores = x @ keys.astype(x.dtype).swapaxes(-1, -2)
        weights = jax.nn.softmax(jax.numpy.where(mask, scores, -jax.numpy.inf), axis=-1)
        x = x + weights @ values.astype(x.dtype)
    return state, x


def inputs(count):
    return np.random.default_rng(0).normal(size=(HEADS, count, DIM)).astype(np.float32)


def copies(program, buffer):
    """Shapes of what a compiled program copies, as far as it is as large as `buffer`."""
    made = (line.partition(" copy(") for line in program.as_text().splitlines())
    shapes = [
        re.findall(r"\d+", left.partition("[")[2].partition("]")[0])
        for left, found, _ in made
        if found
    ]
    return [shape for shape in shapes if np.prod([*map(int, shape)]) >= buffer.size]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_no_copy_of_a_buffer(dtype, batch):
    """All buffers are aliased, and what a program needs besides is less than a buffer's float32."""
    cache = pool(dtype, batch)
    plan = cache.plan(Batch([0] * batch, range(batch)))
    program = (
        jax.jit(step, donate_argnums=0).lower(cache.program_state, plan, inputs(batch)).compile()
    )
    held = sum(buffer.nbytes for pair in cache.program_state.values() for buffer in pair)
    assert program.memory_analysis().alias_size_in_bytes >= held
    assert not copies(program, cache.program_state[0][0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_stays_where_it_is(dtype):
    cache = pool(dtype)
    program, state = jax.jit(step, donate_argnums=0), cache.program_state
    where = {buffer.unsafe_buffer_pointer() for pair in state.values() for buffer in pair}
    for position in range(3):
        state, _ = program(state, cache.plan(Batch([position], [0])), inputs(1))
    assert where == {buffer.unsafe_buffer_pointer() for pair in state.values() for buffer in pair}


def test_compiled_once_per_padded_length():
    cache, traced = pool(max_sequences=2), []

    def noted(state, plan, x):
        traced.append(plan.mask.shape)
        return step(state, plan, x)

    program = jax.jit(noted, donate_argnums=0)
    for position in range(0, 2000, 50):
        cache.plan(Batch(range(position, position + 49), [1] * 49))
        cache.program_state = cache.program_state  # as if a program had stored them
        cache.program_state, _ = program(
            cache.program_state, cache.plan(Batch([position + 49], [1])), inputs(1)
        )
    assert traced == [(1, 256), (1, 512), (1, 1024), (1, 2048)]


def test_scan_over_decode_steps():
    single, cache = pool(max_sequences=2), pool(max_sequences=2)
    first, steps = Batch([0, 0], [1, 0]), 6
    x, expected = JAX.from_host(inputs(2)), []
    for i in range(steps):
        single.program_state, x = step(
            single.program_state, single.plan(Batch(first.positions + i, first.sequences)), x
        )
        expected.append(x)

    def body(carry, plan):
        state, x = step(*carry[:1], plan, carry[1])
        return (state, x), x

    @jax.jit
    def decode(state, plans, x):
        return jax.lax.scan(body, (state, x), plans)

    (cache.program_state, _), found = decode(
        cache.program_state, cache.plan_steps(first, steps), inputs(2)
    )
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-5)


def attending_step(state, plan, x):
    """The same by attend."""
    for layer in range(LAYERS):
        new = x.astype(plan.key_like.dtype)
        state = functional.put(state, plan, layer, new, new)
        x = x + functional.attend(state, plan, layer, new, scale=1.0).astype(x.dtype)
    return state, x


@pytest.mark.parametrize(
    ("batch", "dtype"),
    [
        (8, "float32"),
        pytest.param(1, "float32", marks=pytest.mark.matrix),
        pytest.param(8, "bfloat16", marks=pytest.mark.matrix),
        pytest.param(1, "bfloat16", marks=pytest.mark.matrix),
    ],
)
def test_attention_copies_no_buffer(batch, dtype):
    """A program needs a little for blocks, and nothing of the size of the pool or its mask."""
    cache = pool(dtype, batch)
    plan = cache.plan(Batch([0] * batch, range(batch)), reads=True)
    compiled = jax.jit(attending_step, donate_argnums=0)
    program = compiled.lower(cache.program_state, plan, inputs(batch)).compile()
    buffers = [buffer for pair in cache.program_state.values() for buffer in pair]
    analysis = program.memory_analysis()
    assert analysis.alias_size_in_bytes >= sum(buffer.nbytes for buffer in buffers)
    assert not copies(program, buffers[0])
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(plan)) < cache.cells * batch


def test_attention_is_compiled_once_per_padded_length():
    cache, traced = pool(max_sequences=2), []

    def noted(state, plan, x):
        [blocks] = plan.reads.blocks
        traced.append(blocks.cells.shape)
        return attending_step(state, plan, x)

    program = jax.jit(noted, donate_argnums=0)
    for position in range(0, 1200, 100):
        cache.plan(Batch(range(position, position + 99), [1] * 99), reads=True)
        cache.program_state = cache.program_state  # as if a program had stored them
        cache.program_state, _ = program(
            cache.program_state, cache.plan(Batch([position + 99], [1]), reads=True), inputs(1)
        )
    assert traced == [(1, 128), (1, 256), (2, 256), (4, 256), (8, 256)]


def test_scan_over_decode_steps_that_attend():
    """As in a scan over ranges and masks."""
    ranges, cache = pool(max_sequences=2), pool(max_sequences=2)
    first, steps = Batch([0, 0], [1, 0]), 6

    def decode(step, state, plans, x):
        def body(carry, plan):
            state, x = step(*carry[:1], plan, carry[1])
            return (state, x), x

        return jax.lax.scan(body, (state, x), plans)

    found = []
    for own, body, reads in ((ranges, step, False), (cache, attending_step, True)):
        plans = own.plan_steps(first, steps, reads=reads)
        program = jax.jit(decode, static_argnums=0)
        (own.program_state, _), out = program(body, own.program_state, plans, inputs(2))
        found.append(out)
    np.testing.assert_allclose(*found, rtol=1e-5)


def recurrent_step(state, plan, x):
    """Two recurrent layers, of a matrix and a short convolution. x: [runs]."""
    for layer in range(LAYERS):
        matrix, last = functional.get_states(state, plan, layer)
        matrix, last = matrix * 0.5 + x[:, None, None], last + x[:, None].astype(last.dtype)
        x = matrix.sum((1, 2)) + last.astype(x.dtype).sum(1)
        state = functional.put_states(state, plan, layer, matrix, last)
    return state, x


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("runs", [1, 8])
def test_no_copy_of_the_states(runs, steps):
    """A program needs less than the buffers besides, in a step and in a scan over several."""
    cache = RecurrentCache()
    cache.init(JAX, max_sequences=runs, max_batch=runs)
    cache.allocate(range(LAYERS), ((8, 8), "float32"), ((40,), "bfloat16"))
    batch = Batch([0] * runs, range(runs))
    plan = cache.plan(batch) if steps is None else cache.plan_steps(batch, steps)

    def scan(state, plans, x):
        return jax.lax.scan(lambda c, p: (recurrent_step(c[0], p, c[1]), None), (state, x), plans)

    step, x = scan if steps else recurrent_step, np.ones(runs, np.float32)
    program = jax.jit(step, donate_argnums=0).lower(cache.program_state, plan, x).compile()
    buffers = [buffer for layer in cache.program_state.values() for buffer in layer]
    held = sum(buffer.nbytes for buffer in buffers)
    assert program.memory_analysis().alias_size_in_bytes >= held
    assert not copies(program, min(buffers, key=lambda buffer: buffer.size))


@pytest.mark.parametrize("batch", [1, 8])
def test_append_copies_nothing(batch):
    cache = KVCache(JAX)
    new = np.ones((batch, HEADS, 1, DIM), np.float32)
    cache.update(*(JAX.from_host(new) for _ in range(2)))
    state = cache.export_state(2000)

    def attend(state, x, keys, values):
        mask = functional.mask(state, 1)
        scores = jax.numpy.where(mask, x @ keys.swapaxes(-1, -2), -jax.numpy.inf)
        return state, jax.nn.softmax(scores, axis=-1) @ values

    def run(state, x):
        state, keys, values = functional.append(state, x, x)
        return attend(state, x, keys, values)

    def reads_only(state, x):
        return attend(state, x, state.keys, state.values)

    def copied(function):
        program = jax.jit(function, donate_argnums=0).lower(state, new).compile()
        return copies(program, state.keys)

    # The product with a batch of one transposes the keys, whoever wrote them.
    assert copied(run) == copied(reads_only)
