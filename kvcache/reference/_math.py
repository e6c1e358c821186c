"""What several models compute, over the array API."""

from __future__ import annotations

from kvcache.backends import Array
from kvcache.backends.arrays import Namespace

# Abramowitz and Stegun 7.1.26: erfc within 1.5e-7. The array API has no error function.
_ERFC_SCALE = 0.3275911
_ERFC = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def softmax(xp: Namespace, scores: Array) -> Array:
    """Weights that sum to one over the last axis."""
    weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    return weights / xp.sum(weights, axis=-1, keepdims=True)


def layer_norm(xp: Namespace, x: Array, scale: Array, shift: Array, eps: float) -> Array:
    """`x` with mean 0 and variance 1 over the last axis, then scaled and shifted."""
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    variance = xp.mean(centred * centred, axis=-1, keepdims=True)
    return centred / xp.sqrt(variance + eps) * scale + shift


def gelu(xp: Namespace, x: Array) -> Array:
    """The exact one: `x` times the probability that a normal variable lies below it."""
    size = xp.abs(x)
    return 0.5 * (x + size * (1.0 - _erfc(xp, size * 0.5**0.5)))


def _erfc(xp: Namespace, x: Array) -> Array:
    """The complementary error function of `x` >= 0."""
    t = 1.0 / (1.0 + _ERFC_SCALE * x)
    polynomial = 0.0 * t
    for coefficient in _ERFC:
        polynomial = (polynomial + coefficient) * t
    return polynomial * xp.exp(-x * x)
