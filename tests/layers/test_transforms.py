"""Caches inside of transforms: right, or refused by name."""

import numpy as np
import pytest

from kvcache import Batch, CausalCache, KVCache, RotatingKVCache, TracedArrayError, backend_of

REFUSED = r"got \S+ that is being traced\. Call the pure functions of kvcache\.functional"
KINDS = [KVCache, lambda **options: RotatingKVCache(8, **options)]


def jax_transforms():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    one = jax.numpy.ones((1, 2, 1, 4))
    total = lambda f: lambda k: f(k).sum()  # noqa: E731
    return one, {
        "jit": lambda f: jax.jit(f)(one),
        "grad": lambda f: jax.grad(total(f))(one),
        "vmap": lambda f: jax.vmap(f)(one[None]),
        "jit of grad": lambda f: jax.jit(jax.grad(total(f)))(one),
    }


@pytest.mark.one_backend(name="jax")
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("transform", ["jit", "grad", "vmap", "jit of grad"])
def test_jax(make, transform):
    one, transforms = jax_transforms()
    for held in (0, 1, 3):
        cache = make()
        for _ in range(held):
            cache.update(one, one)
        with pytest.raises(TracedArrayError, match=REFUSED):
            transforms[transform](lambda k, cache=cache: cache.update(k, k)[0])
        with pytest.raises(TracedArrayError, match=REFUSED):
            transforms[transform](lambda k, cache=cache: cache.update(one, k)[0])
        assert cache.offset == held
        assert cache.backend is None or held
        cache.update(one, one)
        assert np.isfinite(np.asarray(cache.state[0])).all()


@pytest.mark.one_backend(name="jax")
def test_jax_pools_and_backend_of():
    one, transforms = jax_transforms()
    pool = CausalCache()
    pool.init("jax", "float32", max_sequences=1, capacity=8, max_batch=4)
    pool.start_forward(Batch([0], [0]))
    pool.set_layer(0)
    with pytest.raises(TracedArrayError, match=REFUSED):
        transforms["jit"](lambda k: pool.put(k[0], k[0]) or k)
    pool.put(one[0], one[0])
    with pytest.raises(TracedArrayError, match=REFUSED):
        transforms["jit"](lambda k: backend_of(k).spec and k)


def mlx():
    return pytest.importorskip("mlx.core", reason="mlx is not installed")


@pytest.mark.one_backend(name="mlx")
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("transform", ["compile", "vmap", "compile of grad"])
def test_mlx(make, transform):
    mx = mlx()
    one = mx.ones((1, 2, 1, 4))
    total = lambda f: lambda k: f(k).sum()  # noqa: E731
    transforms = {
        "compile": lambda f: mx.compile(f)(one),
        "vmap": lambda f: mx.vmap(f)(one[None]),
        "compile of grad": lambda f: mx.compile(mx.grad(total(f)))(one),
    }
    for held in (0, 3):
        cache = make()
        if held:
            cache.update(mx.ones((1, 2, held, 4)), mx.ones((1, 2, held, 4)))
        with pytest.raises(TracedArrayError, match=REFUSED):
            transforms[transform](lambda k, cache=cache: cache.update(k + 1, k)[0])
        assert cache.offset == held
        cache.update(one, one)
        assert np.isfinite(np.array(cache.state[0])).all()


@pytest.mark.one_backend(name="mlx")
def test_mlx_gradients_flow_through_all_updates():
    mx = mlx()
    one = mx.ones((1, 2, 1, 4))

    def total(k):
        cache = KVCache()
        cache.update(k * 3, k)
        return cache.update(k, k)[0].sum()

    assert np.array(mx.grad(total)(one)).tolist() == np.full((1, 2, 1, 4), 4.0).tolist()


@pytest.mark.one_backend(name="mlx")
def test_mlx_arrays_are_not_computed_by_the_question():
    """An update stays lazy."""
    mx = mlx()
    backend = backend_of(mx.ones(1))
    for shape in ((1, 2, 1, 4), (1, 2, 3, 4)):
        assert not backend.is_traced(mx.ones(shape))
    mx.disable_compile()
    try:
        assert not backend.is_traced(mx.ones((1, 2, 1, 4)))
    finally:
        mx.enable_compile()
