"""The llama decoder, written once over the array API.

Everything that a framework computes goes through ``backend.xp``; what depends on positions
(angles of rotation, masks without a cache) is computed on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvcache.backends.base import Array, Backend, HostArray
from kvcache.errors import BoundsError, ShapeError

from ._weights import Layer, Progress, Weights, load_weights
from .gguf import GGUFFile, LlamaConfig

__all__ = ["LayerCache", "Llama"]

# Without a cache the sequence is padded to a multiple of this: its shapes then repeat, and a
# framework that compiles for each shape does so once per block instead of once per token.
BLOCK = 32


class LayerCache(Protocol):
    """What the decoder asks of the cache of one layer."""

    @property
    def offset(self) -> int:
        """Tokens seen so far, which is the absolute position of the next one."""

    @property
    def dtype(self) -> str | None:
        """Name of the dtype it holds; None takes that of the first update."""

    def update(self, keys: Array, values: Array, /) -> tuple[Array, Array]:
        """Add [B, kv_heads, L, head_dim]; return all that is held, [B, kv_heads, n, head_dim]."""

    def mask(self, tokens: int, window: int | None = None, /) -> Array | None:
        """Which of the n columns the last `tokens` see: bool [tokens, n]; None for all of them."""


class Llama:
    """A llama decoder on one backend, computing in float32 whatever the caches hold."""

    def __init__(self, config: LlamaConfig, weights: Weights, backend: Backend) -> None:
        """`weights`: arrays of `backend`, as :func:`load_weights` makes them."""
        self.config = config
        self.weights = weights
        self.backend = backend
        self._visible = backend.from_host(np.float32(0))
        self._hidden = backend.from_host(np.float32(-np.inf))

    @classmethod
    def from_gguf(cls, file: GGUFFile, backend: Backend, progress: Progress | None = None) -> Llama:
        """Load the model in `file` onto `backend`.

        progress: called with ``(bytes done, bytes in all)`` of the file after each tensor.

        Raises: UnsupportedModelError, ModelFileError.
        """
        return cls(file.config, load_weights(file, backend.from_host, progress), backend)

    def __call__(
        self,
        tokens: npt.ArrayLike,
        caches: Sequence[LayerCache] | None = None,
        *,
        window: int | None = None,
        last_only: bool = True,
    ) -> Array:
        """Logits after `tokens`: float32 [B, vocab] for the last one of each sequence.

        tokens: host integers [B, L]. They continue what `caches` hold.
        caches: one per layer, updated by this call; None computes from these tokens alone.
        window: attend to so many tokens at most, the token itself included.
        last_only: False returns the logits after every token, [B, L, vocab].

        Raises: ShapeError, BoundsError, ValueError; the caches are untouched then.
        """
        if window is not None and window < 1:
            raise ValueError(f"window must be >= 1 token; got {window}.")
        if caches is not None:
            self._check_caches(caches)
        ids = self._checked(tokens)
        length = ids.shape[1]
        if caches is None:
            caches = [_NoCache(self.backend)] * self.config.layers
            ids = np.pad(ids, ((0, 0), (0, -length % BLOCK)))
        x = self._run(ids, caches, window)
        wanted = np.arange(length - 1 if last_only else 0, length, dtype=np.int32)
        logits = self._logits(self.backend.xp.take(x, self.backend.from_host(wanted), axis=1))
        return logits[:, 0, :] if last_only else logits

    def _run(self, ids: HostArray, caches: Sequence[LayerCache], window: int | None) -> Array:
        length = ids.shape[1]
        cos, sin = self._angles(caches[0].offset, length)
        x = self._embed(ids)
        bias = None
        for i, (layer, cache) in enumerate(zip(self.weights.layers, caches, strict=True)):
            q, k, v = self._project(layer, x, cos, sin)
            k, v = self._through(cache, k, v)
            if i == 0:
                bias = self._bias(cache.mask(length, window))
            x = self._finish(layer, x, self._attend(q, k, v, bias))
        return x

    def _checked(self, tokens: npt.ArrayLike) -> HostArray:
        ids = np.asarray(tokens)
        if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise ShapeError(
                "tokens must be integers of shape [batch, tokens], at least one each; "
                f"got {ids.dtype} {ids.shape}."
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise BoundsError(
                f"token ids must lie in [0, {self.config.vocab_size}); "
                f"got {ids.min()} to {ids.max()}. Use the tokenizer of the same file."
            )
        return ids.astype(np.int32)

    def _check_caches(self, caches: Sequence[LayerCache]) -> None:
        # Positions and the mask are computed once, for all layers.
        offsets = {cache.offset for cache in caches}
        if len(caches) != self.config.layers or len(offsets) != 1:
            raise ShapeError(
                f"there must be one cache per layer, {self.config.layers}, all at one offset; "
                f"got {len(caches)} at {sorted(offsets)}. Make them with make_caches."
            )

    def _angles(self, start: int, length: int) -> tuple[Array, Array]:
        """Cosines and sines of the absolute positions: float32 [L, head_dim / 2] each."""
        # In float64: a float32 angle is off by 1e-3 at position 10,000 already.
        positions = np.arange(start, start + length, dtype=np.float64)
        angles = np.outer(positions, self.weights.inverse_frequencies)
        put = self.backend.from_host
        return put(np.cos(angles), "float32"), put(np.sin(angles), "float32")

    def _embed(self, ids: HostArray) -> Array:
        xp = self.backend.xp
        columns = xp.take(self.weights.embedding, self.backend.from_host(ids.reshape(-1)), axis=1)
        return xp.reshape(xp.permute_dims(columns, (1, 0)), (*ids.shape, self.config.hidden_size))

    def _project(
        self, layer: Layer, x: Array, cos: Array, sin: Array
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values of `x`: [B, heads or kv_heads, L, head_dim], rotated."""
        xp, c = self.backend.xp, self.config
        qkv = xp.matmul(_rms_norm(xp, x, layer.attention_norm, c.norm_eps), layer.qkv)
        qkv = xp.reshape(qkv, (*x.shape[:2], c.heads + 2 * c.kv_heads, c.head_dim))
        qkv = xp.permute_dims(qkv, (0, 2, 1, 3))
        rotated = _rotate(xp, qkv[:, : c.heads + c.kv_heads, :, :], cos, sin)
        k, v = rotated[:, c.heads :, :, :], qkv[:, c.heads + c.kv_heads :, :, :]
        return rotated[:, : c.heads, :, :], k, v

    def _through(self, cache: LayerCache, k: Array, v: Array) -> tuple[Array, Array]:
        if cache.dtype in (None, "float32"):
            return cache.update(k, v)
        cast = self.backend.xp.astype
        stored, computed = self.backend.dtype(cache.dtype), self.backend.dtype("float32")
        k, v = cache.update(cast(k, stored), cast(v, stored))
        return cast(k, computed), cast(v, computed)

    def _bias(self, mask: Array | None) -> Array | None:
        """What to add to the scores: 0 where `mask` is True, -inf elsewhere.

        [group * L, n]: repeated for the heads that share a key head, as :meth:`_attend` asks.
        """
        if mask is None:
            return None
        xp = self.backend.xp
        bias = xp.where(mask, self._visible, self._hidden)
        return xp.concat([bias] * (self.config.heads // self.config.kv_heads), axis=0)

    def _attend(self, q: Array, k: Array, v: Array, bias: Array | None) -> Array:
        """Attention of `q` [B, heads, L, D] over `k`, `v` [B, kv_heads, n, D]: [B, L, heads * D].

        Heads that share a key head stand below each other in one product, so that keys and
        values are never repeated.
        """
        xp = self.backend.xp
        batch, heads, length, dim = q.shape
        grouped = (batch, k.shape[1], heads // k.shape[1] * length, dim)
        scores = xp.matmul(xp.reshape(q * dim**-0.5, grouped), xp.permute_dims(k, (0, 1, 3, 2)))
        if bias is not None:
            scores = scores + bias
        out = xp.reshape(xp.matmul(_softmax(xp, scores), v), q.shape)
        return xp.reshape(xp.permute_dims(out, (0, 2, 1, 3)), (batch, length, heads * dim))

    def _finish(self, layer: Layer, x: Array, attended: Array) -> Array:
        """The rest of a block after its attention: two sums and the gated feed-forward."""
        xp = self.backend.xp
        x = x + xp.matmul(attended, layer.attention_out)
        hidden = _rms_norm(xp, x, layer.mlp_norm, self.config.norm_eps)
        return x + xp.matmul(_swiglu(xp, xp.matmul(hidden, layer.gate_up)), layer.down)

    def _logits(self, x: Array) -> Array:
        xp = self.backend.xp
        return xp.matmul(
            _rms_norm(xp, x, self.weights.norm, self.config.norm_eps), self.weights.head
        )


class _NoCache:
    """Stands where a cache would: keeps nothing, sees what the call brings."""

    offset = 0
    dtype = None

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def update(self, keys: Array, values: Array) -> tuple[Array, Array]:
        return keys, values

    def mask(self, tokens: int, window: int | None = None) -> Array:
        behind = np.subtract.outer(np.arange(tokens), np.arange(tokens))
        return self.backend.from_host((behind >= 0) & (behind < (window or tokens)))


def _rms_norm(xp: Any, x: Array, weight: Array, eps: float) -> Array:
    return x * weight / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps)


def _rotate(xp: Any, x: Array, cos: Array, sin: Array) -> Array:
    """Rotate dimension i of `x` [..., L, D] with dimension i + D / 2 by the angles [L, D / 2]."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return xp.concat([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _softmax(xp: Any, scores: Array) -> Array:
    weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    return weights / xp.sum(weights, axis=-1, keepdims=True)


def _swiglu(xp: Any, x: Array) -> Array:
    """``silu(gate) * up`` of `x` [..., 2 * D] = gate and up: [..., D]."""
    half = x.shape[-1] // 2
    gate, up = x[..., :half], x[..., half:]
    # The sigmoid by way of tanh, which cannot overflow as exp(-gate) can.
    return gate * (0.5 + 0.5 * xp.tanh(0.5 * gate)) * up
