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


def rms_norm(xp: Namespace, x: Array, scale: Array, eps: float) -> Array:
    """Bring `x` to a mean square of 1 over the last axis, then scale it."""
    return x * scale / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps)


def rotate(xp: Namespace, x: Array, cos: Array, sin: Array) -> Array:
    """Rotate dimension i of `x` [..., L, D] with dimension i + R / 2 by the angles [L, R / 2].

    Dimensions from R on stay as they are (RoPE: Su et al., 2021).
    """
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [a * cos - b * sin, b * cos + a * sin]
    return xp.concat([*turned, rest] if rest.shape[-1] else turned, axis=-1)


def sigmoid(xp: Namespace, x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), by way of tanh, which cannot overflow as exp can."""
    return 0.5 + 0.5 * xp.tanh(0.5 * x)


def silu(xp: Namespace, x: Array) -> Array:
    """Return ``x * sigmoid(x)``."""
    return x * sigmoid(xp, x)


def swiglu(xp: Namespace, x: Array) -> Array:
    """Return ``silu(gate) * up`` of `x` [..., 2 * D], the gate in front: [..., D]."""
    half = x.shape[-1] // 2
    return silu(xp, x[..., :half]) * x[..., half:]


def attend(xp: Namespace, q: Array, k: Array, v: Array, bias: Array | None) -> Array:
    """Attend with `q` [B, heads, L, D] to `k`, `v` [B, kv_heads, n, D]: [B, L, heads * D].

    Grouped-query attention (Ainslie et al., 2023): heads that share a key head stand below each
    other in one product, so that keys and values are never repeated.

    bias: of the scores, [heads / kv_heads * L, n]: repeated for the heads that share a key head;
        None for none.
    """
    _, heads, length, dim = q.shape
    grouped = (q.shape[0], k.shape[1], heads // k.shape[1] * length, dim)
    # Scaling the queries touches L * D numbers, scaling the scores L * n.
    scores = xp.matmul(xp.reshape(q * dim**-0.5, grouped), xp.permute_dims(k, (0, 1, 3, 2)))
    if bias is not None:
        scores = scores + bias
    return heads_beside(xp, xp.reshape(xp.matmul(softmax(xp, scores), v), q.shape))


def heads_beside(xp: Namespace, x: Array) -> Array:
    """Return `x` [B, heads, L, D] with the heads of a token side by side: [B, L, heads * D]."""
    batch, heads, length, dim = x.shape
    return xp.reshape(xp.permute_dims(x, (0, 2, 1, 3)), (batch, length, heads * dim))


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
