"""The llama decoder, written once over the array API.

All computation on the device goes through ``backend.xp``. Whatever depends on positions (angles
of rotation, masks without a cache) is computed on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvcache import CausalCache, KVCache, LayerCaches, RoPEShift
from kvcache.backends import Array, Backend, HostArray
from kvcache.errors import ShapeError
from kvcache.reference._progress import Progress
from kvcache.reference._tokens import checked_ids
from kvcache.reference.decoder import (
    AttentionCache,
    LayerKind,
    attention_caches,
    updated_in_float32,
)

from .blocks import LlamaBlocks
from .gguf import GGUFFile, LlamaConfig
from .pooled import PooledPass
from .weights import Weights, load_weights

__all__ = ["LayerCache", "Llama"]

# Without a cache the sequence is padded to a multiple of this: its shapes then repeat, and a
# framework that compiles for each shape does so once per block instead of once per token.
BLOCK = 32


class LayerCache(AttentionCache, Protocol):
    """The part of a per-layer cache used by the decoder; :class:`kvcache.KVCache` has it."""

    @property
    def offset(self) -> int:
        """Tokens seen so far: the absolute position of the next one."""

    def mask(self, tokens: int, window: int | None = None, /) -> Array | None:
        """Return the columns visible to the last `tokens`: bool [tokens, n]; None for all."""


class Llama:
    """A llama decoder on one backend, computing in float32 whatever the caches hold."""

    def __init__(self, config: LlamaConfig, weights: Weights, backend: Backend) -> None:
        """Take `weights`, arrays of `backend` as of :func:`load_weights`, without a copy."""
        self.config = config
        self.weights = weights
        self.backend = backend
        self.blocks = blocks = LlamaBlocks(backend, config)
        self._embed = backend.compile(blocks.embed)
        self._project = backend.compile(blocks.project)
        self._bias = backend.compile(blocks.bias)
        self._attend = backend.compile(blocks.attend)
        self._finish = backend.compile(blocks.finish)
        self._logits = backend.compile(blocks.logits)

    @classmethod
    def from_gguf(cls, file: GGUFFile, backend: Backend, progress: Progress | None = None) -> Llama:
        """Load the model in `file` onto `backend`.

        progress: called with ``(bytes done, bytes in all)`` of the file after each tensor.

        Raises: UnsupportedModelError, ModelFileError.
        """
        return cls(file.config, load_weights(file, backend.from_host, progress), backend)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def make_caches(
        self,
        kind: LayerKind = "kv",
        *,
        max_size: int = 4096,
        keep: int = 0,
        dtype: str = "float32",
    ) -> LayerCaches[KVCache]:
        """Make the empty cache of each layer; see :meth:`Decoder.make_caches`."""
        make = attention_caches(self.backend, kind, max_size, keep, dtype)
        return LayerCaches(make() for _ in range(self.config.layers))

    def make_pass(
        self,
        max_sequences: int,
        capacity: int,
        max_batch: int,
        *,
        dtype: str = "float32",
        window: int | None = None,
        context_shift: bool = False,
    ) -> PooledPass:
        """Make a cache of many sequences and a pass over it; see :meth:`Decoder.make_pass`."""
        shift = RoPEShift(self.weights.inverse_frequencies) if context_shift else None
        cache = CausalCache(window=window, shift=shift)
        cache.init(
            self.backend,
            dtype,
            max_sequences=max_sequences,
            capacity=capacity,
            max_batch=max_batch,
        )
        return PooledPass(self, cache, dtype)

    def __call__(
        self,
        tokens: npt.ArrayLike,
        caches: Sequence[LayerCache] | None = None,
        *,
        window: int | None = None,
        last_only: bool = True,
    ) -> Array:
        """Return logits after `tokens`: float32 [B, vocab] for the last one of each sequence.

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
        ids = checked_ids(tokens, self.config.vocab_size)
        length = ids.shape[1]
        if caches is None:
            caches = [_NoCache(self.backend)] * self.config.layers
            # The padding stands behind the tokens, so that under a causal mask none sees it.
            ids = np.pad(ids, ((0, 0), (0, -length % BLOCK)))
        x = self._run(ids, caches, window)
        # Only these rows go through the head, whose matrix is the largest of the model.
        wanted = np.arange(length - 1 if last_only else 0, length, dtype=np.int32)
        last = self.backend.xp.take(x, self.backend.from_host(wanted), axis=1)
        logits = self._logits(self.weights.norm, self.weights.head, last)
        return logits[:, 0, :] if last_only else logits

    def _run(self, ids: HostArray, caches: Sequence[LayerCache], window: int | None) -> Array:
        """Return hidden states of `ids`, int32 [B, L], after the last block: [B, L, hidden]."""
        length = ids.shape[1]
        start = caches[0].offset
        cos, sin = self.angles(np.arange(start, start + length))
        x = self._embed(self.weights.embedding, self.backend.from_host(ids))
        bias = None
        for i, (layer, cache) in enumerate(zip(self.weights.layers, caches, strict=True)):
            q, k, v = self._project(layer, x, cos, sin)
            k, v = self._through(cache, k, v)
            # After the update, because the mask has a column for each token held now. The caches
            # hold the same tokens, so that one mask serves all layers.
            if i == 0:
                mask = cache.mask(length, window)
                bias = None if mask is None else self._bias(mask)
            x = self._finish(layer, x, self._attend(q, k, v, bias))
        return x

    def _check_caches(self, caches: Sequence[LayerCache]) -> None:
        # Positions and the mask are computed once, for all layers.
        offsets = {cache.offset for cache in caches}
        if len(caches) != self.config.layers or len(offsets) != 1:
            raise ShapeError(
                f"there must be one cache per layer, {self.config.layers}, all at one offset; "
                f"got {len(caches)} at {sorted(offsets)}. Make them with make_caches."
            )

    def angles(self, positions: npt.ArrayLike) -> tuple[Array, Array]:
        """Return cosines and sines at absolute positions [L]: float32 [L, head_dim / 2] each."""
        # In float64: a float32 angle is off by 1e-3 at position 10,000 already.
        angles = np.outer(np.asarray(positions), self.weights.inverse_frequencies)
        put = self.backend.from_host
        return put(np.cos(angles), "float32"), put(np.sin(angles), "float32")

    def _through(self, cache: LayerCache, k: Array, v: Array) -> tuple[Array, Array]:
        """Update `cache`, casting to its dtype and back to float32."""
        return updated_in_float32(self.backend, cache, k, v)


class _NoCache:
    """A stand-in for the cache of a layer. It keeps nothing and sees the tokens of one call."""

    offset = 0
    dtype = None

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def update(self, keys: Array, values: Array) -> tuple[Array, Array]:
        return keys, values

    def mask(self, tokens: int, window: int | None = None) -> Array:
        behind = np.subtract.outer(np.arange(tokens), np.arange(tokens))
        return self.backend.from_host((behind >= 0) & (behind < (window or tokens)))
