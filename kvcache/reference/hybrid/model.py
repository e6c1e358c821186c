"""The hybrid decoder, written once over the array API.

All computation on the device goes through ``backend.xp``. Whatever depends on positions (angles
of rotation, where pieces of the delta rule end) is computed on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvcache import KVCache, LayerCaches, StateCache
from kvcache.backends import Array, Backend, HostArray
from kvcache.errors import ShapeError
from kvcache.reference._progress import Progress
from kvcache.reference._tokens import checked_ids

from .blocks import HybridBlocks, Projected
from .checkpoint import Checkpoint
from .config import HybridConfig
from .delta import Tokens, Triangles, triangles
from .weights import Attention, DeltaNet, Weights, load_weights

__all__ = ["Hybrid", "HybridCache"]

HybridCache: TypeAlias = StateCache | KVCache
"""The cache of one layer: a :class:`~kvcache.StateCache` for a gated delta net."""

CHUNK = 64


class Hybrid:
    """A hybrid decoder on one backend, computing in float32 whatever the caches hold."""

    def __init__(
        self, config: HybridConfig, weights: Weights, backend: Backend, chunk: int = CHUNK
    ) -> None:
        """Take `weights`, arrays of `backend` as of :func:`load_weights`, without a copy.

        chunk: tokens that the delta rule computes at once, counted from the first one of a call;
            1 computes token by token.

        Raises: ValueError for a chunk below 1.
        """
        if chunk < 1:
            raise ValueError(f"chunk must be >= 1 token; got {chunk}.")
        self.config = config
        self.weights = weights
        self.backend = backend
        self.chunk = chunk
        blocks = HybridBlocks(backend, config)
        self._embed = backend.compile(blocks.embed)
        self._project = backend.compile(blocks.project)
        self._bias = backend.compile(blocks.bias)
        self._attend = backend.compile(blocks.attend)
        self._project_delta = backend.compile(blocks.project_delta)
        self._delta_step = backend.compile(blocks.delta_step)
        self._delta_chunk = backend.compile(blocks.delta_chunk)
        self._finish_delta = backend.compile(blocks.finish_delta)
        self._mlp = backend.compile(blocks.mlp)
        self._logits = backend.compile(blocks.logits)
        self._triangles: dict[int, Triangles] = {}
        # In float64: a float32 angle is off by 1e-3 at position 10,000 already.
        half = config.rotary_dim // 2
        self._frequencies = config.rope_theta ** -(np.arange(half, dtype=np.float64) / half)

    @classmethod
    def from_checkpoint(
        cls,
        file: Checkpoint,
        backend: Backend,
        progress: Progress | None = None,
        *,
        chunk: int = CHUNK,
    ) -> Hybrid:
        """Load the model in `file` onto `backend`.

        progress: called with ``(layers done, layers in all)`` after each layer.

        Raises: UnsupportedModelError, ModelFileError.
        """
        weights = load_weights(file, backend.from_host, progress)
        return cls(file.config, weights, backend, chunk)

    def make_caches(self, dtype: str = "float32") -> LayerCaches[HybridCache]:
        """Make the cache of each layer. dtype: of keys and values; states are float32.

        Raises: DTypeError for a dtype that the backend lacks.
        """
        self.backend.dtype(dtype)
        return LayerCaches(
            StateCache(self.backend) if recurrent else KVCache(self.backend, dtype=dtype)
            for recurrent in self.config.recurrent
        )

    def __call__(
        self,
        tokens: npt.ArrayLike,
        caches: Sequence[HybridCache] | None = None,
        *,
        last_only: bool = True,
    ) -> Array:
        """Return logits after `tokens`: float32 [B, vocab] for the last one of each sequence.

        tokens: host integers [B, L]. They continue what `caches` hold.
        caches: one per layer as of :meth:`make_caches`, updated by this call; attention layers may
            have a :class:`~kvcache.RotatingKVCache`. Wherever a recurrent one asks for a state
            inside of the call, it gets it. None computes from these tokens alone.
        last_only: False returns the logits after every token, [B, L, vocab].

        Raises: ShapeError, BoundsError; the caches are untouched then.
        """
        ids = checked_ids(tokens, self.config.vocab_size)
        caches = self.make_caches() if caches is None else caches
        self._check_caches(caches, len(ids))
        x = self._run(ids, caches)
        if last_only:
            # Only this row goes through the head, whose matrix is the largest of the model.
            last = self._logits(self.weights.norm, self.weights.head, x[:, -1:, :])
            return last[:, 0, :]
        return self._logits(self.weights.norm, self.weights.head, x)

    def _run(self, ids: HostArray, caches: Sequence[HybridCache]) -> Array:
        """Return hidden states of `ids`, int32 [B, L], after the last block: [B, L, hidden]."""
        x = self._embed(self.weights.embedding, self.backend.from_host(ids))
        cos, sin = self.angles(caches[0].offset + np.arange(ids.shape[1]))
        for layer, cache in zip(self.weights.layers, caches, strict=True):
            if isinstance(layer.mixer, DeltaNet) and isinstance(cache, StateCache):
                x = x + self._delta_net(layer.mixer_norm, layer.mixer, x, cache)
            elif isinstance(layer.mixer, Attention) and isinstance(cache, KVCache):
                given = self._project(layer.mixer_norm, layer.mixer, x, cos, sin)
                x = x + self._attention(layer.mixer, given, cache)
            x = x + self._mlp(layer.mlp_norm, layer.mlp, x)
        return x

    def _attention(self, layer: Attention, given: Projected, cache: KVCache) -> Array:
        """Return what an attention layer adds: [B, L, hidden]."""
        length = given.keys.shape[2]
        keys, values = self._through(cache, given.keys, given.values)
        # After the update, because the mask has a column for each token held now.
        mask = cache.mask(length)
        bias = None if mask is None else self._bias(mask)
        return self._attend(layer, given._replace(keys=keys, values=values), bias)

    def _delta_net(self, norm: Array, layer: DeltaNet, x: Array, cache: StateCache) -> Array:
        """Return what a gated delta net adds: [B, L, hidden]."""
        start, length = cache.offset, x.shape[1]
        past, matrix = cache.state or self._zeros(x.shape[0])
        inputs, tokens, gates = self._project_delta(norm, layer, x, past)
        cuts = [position - start for position in cache.cuts(length)]
        kept = self.config.kernel - 1
        outputs, begin = [], 0
        # A cut ends a piece and begins another; the grid of pieces behind it stays where it is.
        for end in sorted({*cuts, *range(self.chunk, length, self.chunk), length}):
            output, matrix = self._rule(matrix, tokens.between(begin, end))
            outputs.append(output)
            begin = end
            if end in cuts:
                cache.record(start + end, inputs[:, end : end + kept, :], matrix)
        cache.advance(length, inputs[:, length:, :], matrix)
        return self._finish_delta(layer, outputs, gates)

    def _rule(self, matrix: Array, tokens: Tokens) -> tuple[Array, Array]:
        """Apply the delta rule to a piece: its outputs, and the matrix behind it."""
        length = tokens.keys.shape[3]
        if length == 1:
            return self._delta_step(matrix, tokens)
        if length not in self._triangles:
            self._triangles[length] = triangles(self.backend, length)
        return self._delta_chunk(self._triangles[length], matrix, tokens)

    def _zeros(self, batch: int) -> tuple[Array, ...]:
        """Return the state in front of the first token."""
        put = self.backend.from_host
        return tuple(put(np.zeros(shape, np.float32)) for shape in self._state_shapes(batch))

    def _state_shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Return the shapes of a state: the last inputs of the convolution, and the matrix."""
        c = self.config
        return [
            (batch, c.kernel - 1, c.channels),
            (batch, c.delta_value_heads, c.delta_key_dim, c.delta_value_dim),
        ]

    def _check_caches(self, caches: Sequence[HybridCache], batch: int) -> None:
        kinds = [isinstance(cache, StateCache) for cache in caches]
        offsets = {cache.offset for cache in caches}
        if kinds != list(self.config.recurrent) or len(offsets) != 1:
            raise ShapeError(
                "there must be one cache per layer, a StateCache for each recurrent one, all at "
                f"one offset; got {[type(cache).__name__ for cache in caches]} at "
                f"{sorted(offsets)}. Make them with make_caches."
            )
        for cache in caches:
            shapes = [array.shape for array in cache.state] if isinstance(cache, StateCache) else []
            if shapes and shapes != self._state_shapes(batch):
                raise ShapeError(
                    f"the state of {batch} sequences has shapes {self._state_shapes(batch)}; "
                    f"got {shapes}. Go on with as many sequences, in caches of the same model."
                )

    def angles(self, positions: npt.NDArray[np.int64]) -> tuple[Array, Array]:
        """Return cosines and sines at positions [L]: float32 [L, rotary_dim / 2] each."""
        angles, put = np.outer(positions, self._frequencies), self.backend.from_host
        return put(np.cos(angles), "float32"), put(np.sin(angles), "float32")

    def _through(self, cache: KVCache, k: Array, v: Array) -> tuple[Array, Array]:
        """Update `cache`, casting to its dtype and back to float32."""
        if cache.dtype in (None, "float32"):
            return cache.update(k, v)
        cast = self.backend.xp.astype
        stored, computed = self.backend.dtype(cache.dtype), self.backend.dtype("float32")
        k, v = cache.update(cast(k, stored), cast(v, stored))
        return cast(k, computed), cast(v, computed)
