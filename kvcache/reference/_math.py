"""Functions shared by several models, over the array API."""

from __future__ import annotations

import math

from kvcache.backends import Array
from kvcache.backends.arrays import Namespace

# Abramowitz and Stegun 7.1.26: erfc within 1.5e-7. The array API has no error function.
_ERFC_SCALE = 0.3275911
_ERFC = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def softmax(xp: Namespace, scores: Array) -> Array:
    """Normalise `scores` to weights of sum 1 over the last axis.

    A score may be -inf: weight 0, exactly. A row of nothing else gets the weights 0, not NaN.
    """
    # Without subtracting the maximum, exp overflows float32 from a score of 89 on. It is finite
    # even where nothing is visible, because -inf - -inf is NaN.
    largest = xp.max(scores, axis=-1, keepdims=True)
    weights = xp.exp(scores - xp.where(largest > -math.inf, largest, xp.zeros_like(largest)))
    # At least 1 otherwise, the weight of the maximum: the limit changes rows of zeros only.
    total = xp.sum(weights, axis=-1, keepdims=True)
    return weights / xp.where(total > 0, total, xp.ones_like(total))


def layer_norm(xp: Namespace, x: Array, scale: Array, shift: Array, eps: float) -> Array:
    """Bring `x` to mean 0 and variance 1 over the last axis, then scale and shift it."""
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    variance = xp.mean(centred * centred, axis=-1, keepdims=True)
    return centred / xp.sqrt(variance + eps) * scale + shift


def gelu(xp: Namespace, x: Array) -> Array:
    """Multiply `x` by the normal distribution function of `x`: the exact GELU, not the tanh one.

    Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    size = xp.abs(x)
    # x * Phi(x), written with |x| because the approximation of erfc holds for x >= 0 only.
    return 0.5 * (x + size * (1.0 - _erfc(xp, size * 0.5**0.5)))


def _erfc(xp: Namespace, x: Array) -> Array:
    """Approximate the complementary error function of `x` >= 0."""
    t = 1.0 / (1.0 + _ERFC_SCALE * x)
    polynomial = 0.0 * t
    for coefficient in _ERFC:
        polynomial = (polynomial + coefficient) * t
    return polynomial * xp.exp(-x * x)
