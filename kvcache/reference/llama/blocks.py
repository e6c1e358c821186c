"""The computation of a llama decoder, as pure functions of arrays: a framework may compile them."""

from __future__ import annotations

import numpy as np

from kvcache.backends import Array, Backend
from kvcache.reference._math import attend, rms_norm, rotate, swiglu

from .gguf import LlamaConfig
from .weights import Layer


class LlamaBlocks:
    """Stages of a decoder of the sizes in `config`, over the array API, in float32."""

    def __init__(self, backend: Backend, config: LlamaConfig) -> None:
        self.xp = backend.xp
        self.config = config
        self._visible = backend.from_host(np.float32(0))
        self._hidden = backend.from_host(np.float32(-np.inf))

    def embed(self, embedding: Array, ids: Array) -> Array:
        """Return embeddings of token ids, int [B, L]: [B, L, hidden]."""
        xp = self.xp
        # take() of the array API knows indices of one dimension only.
        columns = xp.take(embedding, xp.reshape(ids, (-1,)), axis=1)
        return xp.reshape(xp.permute_dims(columns, (1, 0)), (*ids.shape, self.config.hidden_size))

    def project(self, layer: Layer, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Return queries, keys and values of `x`: [B, heads or kv_heads, L, head_dim].

        Queries and keys are rotated by the angles [L, head_dim / 2] (RoPE: Su et al., 2021).
        """
        xp, c = self.xp, self.config
        qkv = xp.matmul(rms_norm(xp, x, layer.attention_norm, c.norm_eps), layer.qkv)
        qkv = xp.reshape(qkv, (*x.shape[:2], c.heads + 2 * c.kv_heads, c.head_dim))
        qkv = xp.permute_dims(qkv, (0, 2, 1, 3))
        rotated = rotate(xp, qkv[:, : c.heads + c.kv_heads, :, :], cos, sin)
        k, v = rotated[:, c.heads :, :, :], qkv[:, c.heads + c.kv_heads :, :, :]
        return rotated[:, : c.heads, :, :], k, v

    def bias(self, mask: Array) -> Array:
        """Return the bias of attention scores: 0 where `mask`, bool [L, n], is True, else -inf.

        [group * L, n]: repeated for the heads that share a key head, as :meth:`attend` asks.
        """
        xp = self.xp
        bias = xp.where(mask, self._visible, self._hidden)
        return xp.concat([bias] * (self.config.heads // self.config.kv_heads), axis=0)

    def attend(self, q: Array, k: Array, v: Array, bias: Array | None) -> Array:
        """Attend with `q` [B, heads, L, D] to `k`, `v` [B, kv_heads, n, D]: [B, L, heads * D]."""
        return attend(self.xp, q, k, v, bias)

    def finish(self, layer: Layer, x: Array, attended: Array) -> Array:
        """Return `x` after the rest of a block: attention output, gated MLP, two residual sums."""
        xp = self.xp
        x = x + xp.matmul(attended, layer.attention_out)
        hidden = rms_norm(xp, x, layer.mlp_norm, self.config.norm_eps)
        return x + xp.matmul(swiglu(xp, xp.matmul(hidden, layer.gate_up)), layer.down)

    def logits(self, norm: Array, head: Array, x: Array) -> Array:
        """Return logits of the next token for `x` [B, L, hidden]: [B, L, vocab]."""
        return self.xp.matmul(rms_norm(self.xp, x, norm, self.config.norm_eps), head)
