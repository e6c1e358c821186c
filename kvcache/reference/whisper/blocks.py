"""The computation of Whisper, as pure functions of arrays, over the array API."""

from __future__ import annotations

import math
from typing import TypeAlias

from kvcache.backends import Array
from kvcache.backends.arrays import Namespace
from kvcache.reference._math import gelu, layer_norm, softmax

from .weights import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    FeedForward,
    Linear,
    Norm,
    SelfAttention,
    Weights,
)

Encoded: TypeAlias = tuple[tuple[Array, Array], ...]
"""Keys and values for cross-attention in each decoder layer: [heads, frames, head_dim] each."""

_EPS = 1e-5


class WhisperBlocks:
    """Stages of a model between two accesses to the cache; `heads` and ``xp`` are constants."""

    def __init__(self, xp: Namespace, heads: int) -> None:
        self.xp = xp
        self.heads = heads

    # The encoder, as a whole.

    def encode(self, weights: Weights, mel: Array) -> Encoded:
        """Return keys and values for cross-attention over the sound in `mel`, [frames, bins]."""
        x = self._encoder_output(weights.encoder, mel)
        return tuple(self._keys_values(layer, x) for layer in weights.decoder.layers)

    def _encoder_output(self, encoder: Encoder, mel: Array) -> Array:
        """Return hidden states of the sound, [frames / 2, hidden]."""
        x = gelu(self.xp, _linear(self.xp, self._three_frames(mel, 1), encoder.conv1))
        x = gelu(self.xp, _linear(self.xp, self._three_frames(x, 2), encoder.conv2))
        x = x + encoder.positions
        for layer in encoder.layers:
            x = self._encoder_layer(layer, x)
        return self._norm(x, encoder.norm)

    def _three_frames(self, x: Array, step: int) -> Array:
        """Join every `step`-th frame of [T, C] with its neighbours: [T / step, 3 * C].

        A linear layer over the result is a convolution of width 3, which the array API lacks.
        """
        edge = self.xp.zeros_like(x[:1, :])
        before = self.xp.concat([edge, x[:-1, :]], axis=0)
        after = self.xp.concat([x[1:, :], edge], axis=0)
        return self.xp.concat([frames[::step, :] for frames in (before, x, after)], axis=1)

    def _encoder_layer(self, layer: EncoderLayer, x: Array) -> Array:
        q, k, v = self._queries_keys_values(layer.attention, x)
        x = x + _linear(self.xp, self._attend(q, k, v, None), layer.attention.out)
        return self._feed_forward(layer.mlp, x)

    def _keys_values(self, layer: DecoderLayer, x: Array) -> tuple[Array, Array]:
        k, v = self._heads(_linear(self.xp, x, layer.cross.key_value), 2)
        return k, v

    # The decoder, in the order of a pass.

    def embed(self, embedding: Array, by_position: Array, ids: Array, positions: Array) -> Array:
        """Embed tokens `ids` at `positions`, both int32 [tokens]: [tokens, hidden].

        embedding: [hidden, vocab]. by_position: learned embeddings, [positions, hidden].
        """
        columns = self.xp.take(embedding, ids, axis=1)
        return self.xp.permute_dims(columns, (1, 0)) + self.xp.take(by_position, positions, axis=0)

    def project(self, layer: DecoderLayer, x: Array) -> tuple[Array, Array, Array]:
        """Return queries, keys and values for self-attention: [heads, tokens, head_dim] each."""
        q, k, v = self._queries_keys_values(layer.attention, x)
        return q, k, v

    def self_attend(
        self, layer: DecoderLayer, x: Array, q: Array, k: Array, v: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """Return `x` after self-attention, and the queries for cross-attention.

        k, v: keys and values of all tokens in the cache, [heads, n, head_dim].
        mask: bool [tokens, n], True = attend; None for all.
        """
        x = x + _linear(self.xp, self._attend(q, k, v, mask), layer.attention.out)
        query = _linear(self.xp, self._norm(x, layer.cross.norm), layer.cross.query)
        return x, self._heads(query, 1)[0]

    def cross_attend(
        self, layer: DecoderLayer, x: Array, q: Array, k: Array, v: Array, mask: Array | None
    ) -> Array:
        """Return `x` after cross-attention and the rest of the block; arguments likewise."""
        x = x + _linear(self.xp, self._attend(q, k, v, mask), layer.cross.out)
        return self._feed_forward(layer.mlp, x)

    def choose(
        self, decoder: Decoder, x: Array, rows: Array, bias: Array, bias_rows: Array
    ) -> Array:
        """Return ids of the most likely tokens after `rows` of `x`, int32 [n].

        bias: added to the logits, [biases, vocab]; `bias_rows` chooses a row for each of `rows`.
        """
        last = self._norm(self.xp.take(x, rows, axis=0), decoder.norm)
        logits = self.xp.matmul(last, decoder.embedding) + self.xp.take(bias, bias_rows, axis=0)
        return self.xp.astype(self.xp.argmax(logits, axis=-1), self.xp.int32)

    # Parts of both halves.

    def _queries_keys_values(self, attention: SelfAttention, x: Array) -> tuple[Array, ...]:
        return self._heads(_linear(self.xp, self._norm(x, attention.norm), attention.qkv), 3)

    def _heads(self, x: Array, parts: int) -> tuple[Array, ...]:
        """Split [tokens, parts * hidden] into `parts` arrays [heads, tokens, head_dim]."""
        split = self.xp.reshape(x, (x.shape[0], parts * self.heads, -1))
        split = self.xp.permute_dims(split, (1, 0, 2))
        return tuple(split[i * self.heads : (i + 1) * self.heads, :, :] for i in range(parts))

    def _attend(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        """Attend with `q` [heads, tokens, head_dim] where `mask` is True: [tokens, hidden]."""
        xp = self.xp
        scores = xp.matmul(q * q.shape[-1] ** -0.5, xp.permute_dims(k, (0, 2, 1)))
        if mask is not None:
            scores = xp.where(mask, scores, xp.full_like(scores, -math.inf))
        attended = xp.permute_dims(xp.matmul(softmax(xp, scores), v), (1, 0, 2))
        return xp.reshape(attended, (attended.shape[0], -1))

    def _feed_forward(self, mlp: FeedForward, x: Array) -> Array:
        wide = gelu(self.xp, _linear(self.xp, self._norm(x, mlp.norm), mlp.up))
        return x + _linear(self.xp, wide, mlp.down)

    def _norm(self, x: Array, norm: Norm) -> Array:
        return layer_norm(self.xp, x, norm.scale, norm.shift, _EPS)


def _linear(xp: Namespace, x: Array, linear: Linear) -> Array:
    return xp.matmul(x, linear.weight) + linear.bias
