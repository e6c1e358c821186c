"""What the models share, against its definition, on every backend."""

import math

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

from kvcache.reference._math import gelu, layer_norm, softmax


@pytest.fixture
def run(backend):
    """Calls a function of host arrays on the backend, compiled."""

    def run(function, *arrays):
        put = [backend.from_host(np.asarray(array, np.float32)) for array in arrays]
        compiled = backend.compile(lambda *args: function(backend.xp, *args))
        return backend.to_host(compiled(*put))

    return run


def test_gelu(run):
    x = np.linspace(-9, 9, 2001, dtype=np.float32)
    expected = [v * (1 + math.erf(v / 2**0.5)) / 2 for v in x.tolist()]
    np.testing.assert_allclose(run(gelu, x), expected, atol=2e-6)
    assert run(gelu, [-1e4, 0.0, 1e4]).tolist() == [0, 0, 1e4]


def test_softmax(run):
    scores = [[1e4, 1e4, -np.inf], [0.0, math.log(3), -np.inf]]
    np.testing.assert_allclose(run(softmax, scores), [[0.5, 0.5, 0], [0.25, 0.75, 0]], atol=1e-6)


def test_layer_norm(run):
    x = np.array([[1.0, 3.0], [5.0, 5.0], [0.0, 0.02]])

    def norm(xp, *args):
        return layer_norm(xp, *args, eps=1e-4)

    half = 1 / math.sqrt(1 + 1e-4)
    expected = np.array([[-half, half], [0, 0], [-(0.5**0.5), 0.5**0.5]]) * [2, 3] + [0, 1]
    np.testing.assert_allclose(run(norm, x, [2, 3], [0, 1]), expected, atol=1e-5)
