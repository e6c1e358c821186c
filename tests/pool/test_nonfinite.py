"""What is not finite stays with the sequence that computed it, whatever attends to its neighbours.

Sequence 0 puts NaN or infinity, sequence 1 puts ones: every output of sequence 1 is a mean of ones.
"""

import importlib

import numpy as np
import pytest

from kvcache import Batch, CacheConfig, CausalCache, EncoderCache, functional
from kvcache.backends import HOST_DTYPES

HEADS, DIM = 2, 8
DTYPES = ("float32", "float16", "bfloat16")
BAD = {"keys": (np.nan, 1), "values": (1, np.nan), "inf keys": (np.inf, 1), "inf": (1, -np.inf)}


def docs(backend, q, k, v, mask):
    """The attention of the docs."""
    q, k, v = (backend.to_host(array).astype(np.float32) for array in (q, k, v))
    mask = backend.to_host(mask)
    scores = q @ k.swapaxes(-1, -2)
    if mask.dtype == bool:
        scores = np.where(mask, scores, np.finfo(np.float32).min)
    else:
        scores, mask = scores + mask.astype(np.float32), mask == 0
    weights = np.where(mask, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1) @ v


def kernel(backend, q, k, v, mask):
    """The framework's own attention."""
    if backend.name == "torch":
        torch = importlib.import_module("torch")
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if backend.name == "mlx":
        fast = importlib.import_module("mlx.core").fast
        args = (array[None] for array in (q, k, v))
        return fast.scaled_dot_product_attention(*args, scale=1.0, mask=mask[None, None])[0]
    if backend.name == "jax":
        jax = importlib.import_module("jax")
        args = (array.swapaxes(0, 1)[None] for array in (q, k, v))
        how = {"mask" if mask.dtype == bool else "bias": mask[None, None]}
        return jax.nn.dot_product_attention(*args, **how)[0].swapaxes(0, 1)
    pytest.skip("no attention of its own")


ATTENTION = {"docs": docs, "kernel": kernel}


def rows(backend, dtype, sequences, bad):
    """Keys and values of a pass: those of sequence 0 are bad."""
    for number in bad:
        host = np.ones((HEADS, len(sequences), DIM), np.float32)
        host[:, [sequence == 0 for sequence in sequences], :] = number
        yield backend.from_host(host.astype(HOST_DTYPES[dtype]))


def step(cache, backend, dtype, positions, sequences, bad):
    cache.start_forward(Batch(positions, sequences))
    cache.put(*rows(backend, dtype, sequences, bad))
    return cache.get()


def clean(backend, dtype, attention, sequences, held):
    """Whether every token of sequence 1 has ones as its output."""
    keys, values, mask = held
    if str(mask.dtype) != str(keys.dtype) and "bool" not in str(mask.dtype):
        pytest.skip("a float mask has the dtype of the queries")
    q = backend.from_host(np.ones((HEADS, len(sequences), DIM)).astype(HOST_DTYPES[dtype]))
    out = ATTENTION[attention](backend, q, keys, values, mask)
    out = (out if attention == "docs" else backend.to_host(out)).astype(np.float32)
    return np.allclose(out[:, np.array(sequences) == 1], 1, atol=1e-2)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("masks", ["bool", "own"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours(backend, dtype, attention, masks, bad):
    if dtype not in backend.dtypes:
        pytest.skip("no such dtype")
    cache = CausalCache()
    padding = backend.config.padding
    cache.set_config(CacheConfig(padding, mask_dtype="bool" if masks == "bool" else dtype))
    cache.init(backend, dtype, max_sequences=2, capacity=16, max_batch=16)

    def run(positions, sequences):
        held = step(cache, backend, dtype, positions, sequences, bad)
        return clean(backend, dtype, attention, sequences, held)

    assert run([0, 1, 0, 1], [0, 0, 1, 1])  # one pass, interleaved cells afterwards
    assert run([2, 2], [0, 1])
    assert run([3], [1])
    cache.remove(0, 0)
    assert run([4], [1])


def test_window(backend):
    cache = CausalCache(window=2)
    cache.init(backend, "float32", max_sequences=2, capacity=16, max_batch=16)
    step(cache, backend, "float32", [0], [0], (np.nan, np.nan))
    for position in range(1, 3):  # the token with NaN leaves the window of its own sequence
        held = step(cache, backend, "float32", [position], [0], (1, 1))
    keys, values, mask = held
    out = docs(backend, backend.from_host(np.ones((HEADS, 1, DIM), np.float32)), keys, values, mask)
    assert np.allclose(out, 1)


def test_own_sequence_shows_it(backend):
    cache = CausalCache()
    cache.init(backend, "float32", max_sequences=2, capacity=16, max_batch=16)
    step(cache, backend, "float32", [0], [0], (1, np.nan))
    keys, values, mask = step(cache, backend, "float32", [1], [0], (1, 1))
    out = docs(backend, backend.from_host(np.ones((HEADS, 1, DIM), np.float32)), keys, values, mask)
    assert (out > 1e30).all()


@pytest.mark.parametrize("layout", ["htd", "hdt"])
def test_encoder_neighbours(backend, layout):
    cache = EncoderCache()
    cache.set_config(CacheConfig(value_layout=layout))
    cache.init(backend, "float32", max_sequences=2)
    cache.start_forward(Batch([0, 0], [0, 1], multimodal=(0, 1)))
    keys, values = rows(backend, "float32", [0, 0, 1, 1], (np.nan, np.nan))
    if layout == "hdt":
        values = backend.from_host(backend.to_host(values).transpose(0, 2, 1))
    cache.put(keys, values, frames=[2, 2])
    keys, values, mask = cache.get()
    if layout == "hdt":
        values = backend.from_host(backend.to_host(values).transpose(0, 2, 1))
    assert clean(backend, "float32", "docs", [0, 1], (keys, values, mask))


def test_restored_rows(backend):
    cache = CausalCache()
    cache.init(backend, "float32", max_sequences=2, capacity=16, max_batch=16)
    step(cache, backend, "float32", [0], [0], (np.nan, 1))
    snapshot = cache.snapshot(0)
    layers = snapshot.parts[0].rows.to_host()
    layers[0][1].data[:] = np.nan  # as a file may hold it
    other = CausalCache()
    other.init(backend, "float32", max_sequences=2, capacity=16, max_batch=16)
    other.restore(0, snapshot)
    held = step(other, backend, "float32", [1, 0], [0, 1], (1, 1))
    assert clean(backend, "float32", "docs", [0, 1], held)


def test_programs(backend):
    cache = CausalCache()
    cache.init(backend, "float32", max_sequences=2, capacity=16, max_batch=16)
    cache.allocate([0], HEADS, DIM)
    plan, state = cache.plan(Batch([0, 0], [0, 1])), cache.program_state

    def run(state, plan, keys, values):
        state = functional.put(state, plan, 0, keys, values)
        return state, functional.get(state, plan, 0)

    keys, values = rows(backend, "float32", [0, 1], (np.nan, np.inf))
    state, held = backend.compile(run, donate=[0])(state, plan, keys, values)
    cache.program_state = state
    assert clean(backend, "float32", "docs", [0, 1], held)


@pytest.mark.parametrize("mask_dtype", DTYPES)
def test_float_mask_of_nothing_is_finite(mask_dtype):
    cache = CausalCache()
    cache.set_config(CacheConfig(mask_dtype=mask_dtype))
    cache.init("numpy", "float32", capacity=4, max_batch=2)
    cache.start_forward(Batch([0, 1], [0, 0]), reserve=True)
    ones = np.ones((1, 2, 4), np.float32)
    cache.put(ones, ones)
    *_, mask = cache.get()
    assert np.isfinite(mask.astype(np.float32)).all()
    assert (mask.astype(np.float32) <= -(2.0**15)).all()
