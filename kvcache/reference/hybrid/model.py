"""The hybrid decoder, written once over the array API.

All computation on the device goes through ``backend.xp``. Whatever depends on positions (angles
of rotation, where pieces of the delta rule end) is computed on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvcache import (
    CausalCache,
    KVCache,
    LayerCaches,
    RecurrentCache,
    StateCache,
    WrapperCache,
)
from kvcache.backends import Array, Backend, HostArray
from kvcache.errors import ShapeError
from kvcache.reference._progress import Progress
from kvcache.reference._tokens import checked_ids
from kvcache.reference.decoder import LayerKind, attention_caches, updated_in_float32
from kvcache.reference.errors import UnsupportedModelError

from .blocks import Projected
from .checkpoint import Checkpoint
from .config import HybridConfig
from .pooled import HybridPass
from .stages import Stages
from .weights import Attention, DeltaNet, Weights, load_weights

__all__ = ["Hybrid", "HybridCache"]

HybridCache: TypeAlias = StateCache | KVCache
"""The cache of one layer: a :class:`~kvcache.StateCache` for a gated delta net."""

CHUNK = 64
# Without caches the sequence is padded to a multiple of this: its shapes then repeat, and a
# framework that compiles for each shape does so once per block instead of once per token.
BLOCK = 32


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
        self.stages = Stages(backend, config, chunk)

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
    ) -> LayerCaches[HybridCache]:
        """Make the empty cache of each layer; see :meth:`Decoder.make_caches`.

        kind, max_size, keep, dtype: of the attention layers. The others have states, in float32.
        """
        make = attention_caches(self.backend, kind, max_size, keep, dtype)
        return LayerCaches(
            StateCache(self.backend) if recurrent else make() for recurrent in self.config.recurrent
        )

    def make_pass(
        self,
        max_sequences: int,
        capacity: int,
        max_batch: int,
        *,
        dtype: str = "float32",
        window: int | None = None,
        context_shift: bool = False,
    ) -> HybridPass:
        """Make a cache of many sequences and a pass over it; see :meth:`Decoder.make_pass`.

        dtype, window: of the attention layers. The others have states, in float32.
        """
        if context_shift:
            raise UnsupportedModelError(
                "tokens are removed from the middle only where every layer has keys and values; a "
                "state cannot forget them. Leave out the context shift: a sequence then ends at "
                "its capacity."
            )
        kinds = sorted(set(self.config.recurrent))
        cache = WrapperCache(
            *(RecurrentCache() if recurrent else CausalCache(window=window) for recurrent in kinds)
        )
        cache.init(
            self.backend,
            dtype,
            max_sequences=max_sequences,
            capacity=capacity,
            max_batch=max_batch,
        )
        return HybridPass(self.stages, self.weights, cache, dtype)

    def __call__(
        self,
        tokens: npt.ArrayLike,
        caches: Sequence[HybridCache] | None = None,
        *,
        last_only: bool = True,
    ) -> Array:
        """Return logits after `tokens`: float32 [B, vocab] for the last one of each sequence.

        tokens: host integers [B, L]. They continue what `caches` hold.
        caches: one per layer as of :meth:`make_caches`, updated by this call. Wherever a recurrent
            one asks for a state inside of the call, it gets it. None computes from these tokens
            alone.
        last_only: False returns the logits after every token, [B, L, vocab].

        Raises: ShapeError, BoundsError; the caches are untouched then.
        """
        ids = checked_ids(tokens, self.config.vocab_size)
        length = ids.shape[1]
        if caches is None:
            caches = self.make_caches()
            # The padding stands behind the tokens, so that none of them sees it.
            ids = np.pad(ids, ((0, 0), (0, -length % BLOCK)))
        self._check_caches(caches, len(ids))
        x = self._run(ids, caches)
        # Only these rows go through the head, whose matrix is the largest of the model.
        wanted = np.arange(length - 1 if last_only else 0, length, dtype=np.int32)
        x = self.backend.xp.take(x, self.backend.from_host(wanted), axis=1)
        logits = self.stages.logits(self.weights.norm, self.weights.head, x)
        return logits[:, 0, :] if last_only else logits

    def _run(self, ids: HostArray, caches: Sequence[HybridCache]) -> Array:
        """Return hidden states of `ids`, int32 [B, L], after the last block: [B, L, hidden]."""
        stages = self.stages
        x = stages.embed(self.weights.embedding, self.backend.from_host(ids))
        cos, sin = stages.angles(caches[0].offset + np.arange(ids.shape[1]))
        for layer, cache in zip(self.weights.layers, caches, strict=True):
            if isinstance(layer.mixer, DeltaNet) and isinstance(cache, StateCache):
                x = x + self._recur(layer.mixer_norm, layer.mixer, x, cache)
            elif isinstance(layer.mixer, Attention) and isinstance(cache, KVCache):
                given = stages.project(layer.mixer_norm, layer.mixer, x, cos, sin)
                x = x + self._attention(layer.mixer, given, cache)
            x = x + stages.mlp(layer.mlp_norm, layer.mlp, x)
        return x

    def _attention(self, layer: Attention, given: Projected, cache: KVCache) -> Array:
        """Return what an attention layer adds: [B, L, hidden]."""
        length = given.keys.shape[2]
        keys, values = self._through(cache, given.keys, given.values)
        # After the update, because the mask has a column for each token held now.
        mask = cache.mask(length)
        bias = None if mask is None else self.stages.bias(mask)
        return self.stages.attend(layer, given._replace(keys=keys, values=values), bias)

    def _recur(self, norm: Array, layer: DeltaNet, x: Array, cache: StateCache) -> Array:
        """Return what a gated delta net adds: [B, L, hidden]."""
        start, length = cache.offset, x.shape[1]
        cuts = [position - start for position in cache.cuts(length)]
        output, state, at_cuts = self.stages.recur(norm, layer, x, cache.state, cuts)
        for cut, state_there in at_cuts.items():
            cache.record(start + cut, *state_there)
        cache.advance(length, *state)
        return output

    def _check_caches(self, caches: Sequence[HybridCache], batch: int) -> None:
        kinds = [isinstance(cache, StateCache) for cache in caches]
        offsets = {cache.offset for cache in caches}
        if kinds != list(self.config.recurrent) or len(offsets) != 1:
            raise ShapeError(
                "there must be one cache per layer, a StateCache for each recurrent one, all at "
                f"one offset; got {[type(cache).__name__ for cache in caches]} at "
                f"{sorted(offsets)}. Make them with make_caches."
            )
        expected = self.stages.state_shapes(batch)
        for cache in caches:
            shapes = [array.shape for array in cache.state] if isinstance(cache, StateCache) else []
            if shapes and shapes != expected:
                raise ShapeError(
                    f"the state of {batch} sequences has shapes {expected}; "
                    f"got {shapes}. Go on with as many sequences, in caches of the same model."
                )

    def _through(self, cache: KVCache, k: Array, v: Array) -> tuple[Array, Array]:
        """Update `cache`, casting to its dtypes and back to float32."""
        return updated_in_float32(self.backend, cache, k, v)
