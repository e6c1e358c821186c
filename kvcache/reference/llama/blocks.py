"""The computation of a llama decoder, as pure functions of arrays: a framework may compile them."""

from __future__ import annotations

from kvcache.backends import Array, Backend
from kvcache.reference._blocks import DecoderBlocks
from kvcache.reference._math import attend, rms_norm, rotate, swiglu

from .gguf import LlamaConfig
from .weights import Layer


class LlamaBlocks(DecoderBlocks):
    """Stages of a decoder of the sizes in `config`, over the array API, in float32."""

    def __init__(self, backend: Backend, config: LlamaConfig) -> None:
        super().__init__(backend, config)
        self.config = config

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

    def attend(self, q: Array, k: Array, v: Array, bias: Array | None) -> Array:
        """Attend with `q` [B, heads, L, D] to `k`, `v` [B, kv_heads, n, D]: [B, L, heads * D]."""
        return attend(self.xp, q, k, v, bias)

    def finish(self, layer: Layer, x: Array, attended: Array) -> Array:
        """Return `x` after the rest of a block: attention output, gated MLP, two residual sums."""
        xp = self.xp
        x = x + xp.matmul(attended, layer.attention_out)
        hidden = rms_norm(xp, x, layer.mlp_norm, self.config.norm_eps)
        return x + xp.matmul(swiglu(xp, xp.matmul(hidden, layer.gate_up)), layer.down)
