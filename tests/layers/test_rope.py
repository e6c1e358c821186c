"""Keys that were moved are those that would have been computed there."""

import numpy as np
import pytest

from kvcache import Batch, CacheConfig, CausalCache, RoPEShift, ShapeError

FREQUENCIES = 100.0 ** -(np.arange(3) / 3)


def rotated(x, position, style):
    """The slow oracle: pairs as complex numbers. `x` [..., head_dim >= 6]."""
    out = np.array(x, np.float64)
    pairs = [(i, i + 3) if style == "half" else (2 * i, 2 * i + 1) for i in range(3)]
    for (i, j), frequency in zip(pairs, FREQUENCIES, strict=True):
        turned = (x[..., i] + 1j * x[..., j]) * np.exp(1j * position * frequency)
        out[..., i], out[..., j] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("dim", [6, 8])
def test_moves_each_token_by_its_offset(backend, style, dim):
    keys = np.random.default_rng(0).normal(size=(2, 4, dim)).astype(np.float32)
    offsets = np.array([-3, 0, 5, -1000], np.int32)
    moved = RoPEShift(FREQUENCIES, style)(7, backend.from_host(keys), backend.from_host(offsets))
    expected = [rotated(keys[:, i], o, style) for i, o in enumerate(offsets)]
    np.testing.assert_allclose(backend.to_host(moved), np.stack(expected, 1), atol=1e-5)


@pytest.mark.parametrize("layout", ["htd", "thd", "hdt"])
def test_removing_the_middle(backend, layout):
    """In a cache, in every layout of keys."""
    order = ["htd".index(axis) for axis in layout]
    cache = CausalCache(shift=RoPEShift(FREQUENCIES, layout=layout))
    cache.set_config(CacheConfig(key_layout=layout))
    cache.init(backend, capacity=16, max_batch=8)
    keys = np.random.default_rng(0).normal(size=(2, 8, 6)).astype(np.float32)
    at = np.stack([rotated(keys[:, p], p, "half") for p in range(8)], 1)
    cache.start_forward(Batch(range(8), [0] * 8))
    cache.put(backend.from_host(at.transpose(order), "float32"))
    cache.remove(0, 2, 5)
    cache.start_forward(Batch([5], [0]))
    last = rotated(keys[:, 3:4], 5, "half")  # one of the removed, come again
    cache.put(backend.from_host(last.transpose(order), "float32"))
    found, _, mask = cache.get()
    found = backend.to_host(found).transpose(np.argsort(order))
    kept = [0, 1, 5, 6, 7]
    expected = [rotated(keys[:, p], i, "half") for i, p in enumerate(kept)]
    expected = np.concatenate([np.stack(expected, 1), last], 1)
    assert backend.to_host(mask).sum() == 6
    seen = found[:, backend.to_host(mask)[0]]
    matched = [
        np.abs(seen - token[:, None]).max((0, 2)).argmin() for token in expected.swapaxes(0, 1)
    ]
    assert sorted(matched) == list(range(6))
    np.testing.assert_allclose(seen[:, matched], expected, atol=1e-5)


def test_dtype_stays(backend):
    if "bfloat16" not in backend.dtypes:
        pytest.skip(f"{backend.name} has no bfloat16")
    keys = backend.from_host(np.ones((1, 2, 6)), "bfloat16")
    moved = RoPEShift(FREQUENCIES)(0, keys, backend.from_host(np.array([1, 2], np.int32)))
    assert backend.dtype_name(moved) == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]],), ShapeError, "one inverse frequency for each pair of dimensions"),
        (([],), ShapeError, "one inverse frequency for each pair of dimensions"),
        (([1.0], "neox"), ValueError, "a style is one of .*; got 'neox'"),
        (([1.0], "half", "bhtd"), ValueError, "a layout is one of .*; got 'bhtd'"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        RoPEShift(*arguments)


def test_keys_too_narrow(backend):
    keys = backend.from_host(np.ones((1, 1, 4), np.float32))
    with pytest.raises(ShapeError, match="dimensions 0 to 5 rotate, but keys have a head_dim of 4"):
        RoPEShift(FREQUENCIES)(0, keys, backend.from_host(np.array([1], np.int32)))
