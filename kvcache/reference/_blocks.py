"""The stages that every decoder has, as pure functions of arrays."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from kvcache.backends import Array, Backend

from ._math import heads_beside, rms_norm


class DecoderSizes(Protocol):
    """The part of a configuration that the common stages need."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def heads(self) -> int:
        """Query heads."""

    @property
    def kv_heads(self) -> int:
        """Key heads, each shared by as many query heads."""

    @property
    def norm_eps(self) -> float:
        """Number that keeps a norm from dividing by 0."""


class DecoderBlocks:
    """Stages of a decoder of these `sizes`, over the array API, in float32."""

    def __init__(self, backend: Backend, sizes: DecoderSizes) -> None:
        self.xp = backend.xp
        self._sizes = sizes
        self._visible = backend.from_host(np.float32(0))
        self._hidden = backend.from_host(np.float32(-np.inf))

    def embed(self, embedding: Array, ids: Array) -> Array:
        """Return embeddings of token ids, int [B, L]: [B, L, hidden]."""
        xp = self.xp
        # take() of the array API knows indices of one dimension only.
        columns = xp.take(embedding, xp.reshape(ids, (-1,)), axis=1)
        return xp.reshape(xp.permute_dims(columns, (1, 0)), (*ids.shape, self._sizes.hidden_size))

    def bias(self, mask: Array) -> Array:
        """Return the bias of attention scores: 0 where `mask`, bool [L, n], is True, else -inf.

        [group * L, n]: repeated for the heads that share a key head.
        """
        bias = self.xp.where(mask, self._visible, self._hidden)
        return self.xp.concat([bias] * (self._sizes.heads // self._sizes.kv_heads), axis=0)

    def beside(self, attended: Array) -> Array:
        """Return attention [B, heads, L, D] with the heads beside each other: [B, L, heads * D]."""
        return heads_beside(self.xp, attended)

    def logits(self, norm: Array, head: Array, x: Array) -> Array:
        """Return logits of the next token for `x` [B, L, hidden]: [B, L, vocab]."""
        return self.xp.matmul(rms_norm(self.xp, x, norm, self._sizes.norm_eps), head)
