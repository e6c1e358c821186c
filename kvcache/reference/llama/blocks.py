"""What a llama decoder computes, as pure functions of arrays: a framework may compile them."""

from __future__ import annotations

import numpy as np

from kvcache.backends import Array, Backend
from kvcache.backends.arrays import Namespace
from kvcache.reference._math import softmax

from .gguf import LlamaConfig
from .weights import Layer


class Blocks:
    """The stages of a decoder of this shape, over the array API, in float32."""

    def __init__(self, backend: Backend, config: LlamaConfig) -> None:
        self.xp = backend.xp
        self.config = config
        self._visible = backend.from_host(np.float32(0))
        self._hidden = backend.from_host(np.float32(-np.inf))

    def embed(self, embedding: Array, ids: Array) -> Array:
        """Embeddings of token ids [B, L]: [B, L, hidden]."""
        xp = self.xp
        columns = xp.take(embedding, xp.reshape(ids, (-1,)), axis=1)
        return xp.reshape(xp.permute_dims(columns, (1, 0)), (*ids.shape, self.config.hidden_size))

    def project(self, layer: Layer, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values of `x`: [B, heads or kv_heads, L, head_dim], rotated."""
        xp, c = self.xp, self.config
        qkv = xp.matmul(_rms_norm(xp, x, layer.attention_norm, c.norm_eps), layer.qkv)
        qkv = xp.reshape(qkv, (*x.shape[:2], c.heads + 2 * c.kv_heads, c.head_dim))
        qkv = xp.permute_dims(qkv, (0, 2, 1, 3))
        rotated = _rotate(xp, qkv[:, : c.heads + c.kv_heads, :, :], cos, sin)
        k, v = rotated[:, c.heads :, :, :], qkv[:, c.heads + c.kv_heads :, :, :]
        return rotated[:, : c.heads, :, :], k, v

    def bias(self, mask: Array) -> Array:
        """What to add to the scores: 0 where `mask` is True, -inf elsewhere.

        [group * L, n]: repeated for the heads that share a key head, as :meth:`attend` asks.
        """
        xp = self.xp
        bias = xp.where(mask, self._visible, self._hidden)
        return xp.concat([bias] * (self.config.heads // self.config.kv_heads), axis=0)

    def attend(self, q: Array, k: Array, v: Array, bias: Array | None) -> Array:
        """Attention of `q` [B, heads, L, D] over `k`, `v` [B, kv_heads, n, D]: [B, L, heads * D].

        Heads that share a key head stand below each other in one product, so that keys and
        values are never repeated.
        """
        xp = self.xp
        batch, heads, length, dim = q.shape
        grouped = (batch, k.shape[1], heads // k.shape[1] * length, dim)
        scores = xp.matmul(xp.reshape(q * dim**-0.5, grouped), xp.permute_dims(k, (0, 1, 3, 2)))
        if bias is not None:
            scores = scores + bias
        out = xp.reshape(xp.matmul(softmax(xp, scores), v), q.shape)
        return xp.reshape(xp.permute_dims(out, (0, 2, 1, 3)), (batch, length, heads * dim))

    def finish(self, layer: Layer, x: Array, attended: Array) -> Array:
        """The rest of a block after its attention: two sums and the gated feed-forward."""
        xp = self.xp
        x = x + xp.matmul(attended, layer.attention_out)
        hidden = _rms_norm(xp, x, layer.mlp_norm, self.config.norm_eps)
        return x + xp.matmul(_swiglu(xp, xp.matmul(hidden, layer.gate_up)), layer.down)

    def logits(self, norm: Array, head: Array, x: Array) -> Array:
        """What `x` [B, L, hidden] says of the next token: [B, L, vocab]."""
        return self.xp.matmul(_rms_norm(self.xp, x, norm, self.config.norm_eps), head)


def _rms_norm(xp: Namespace, x: Array, weight: Array, eps: float) -> Array:
    return x * weight / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps)


def _rotate(xp: Namespace, x: Array, cos: Array, sin: Array) -> Array:
    """Rotate dimension i of `x` [..., L, D] with dimension i + D / 2 by the angles [L, D / 2]."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return xp.concat([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _swiglu(xp: Namespace, x: Array) -> Array:
    """``silu(gate) * up`` of `x` [..., 2 * D] = gate and up: [..., D]."""
    half = x.shape[-1] // 2
    gate, up = x[..., :half], x[..., half:]
    # The sigmoid by way of tanh, which cannot overflow as exp(-gate) can.
    return gate * (0.5 + 0.5 * xp.tanh(0.5 * gate)) * up
