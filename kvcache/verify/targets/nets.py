"""Tiny reference models with random weights, over whatever caches a target has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from kvcache import LayerCaches, WrapperCache
from kvcache.backends import Array, Backend, HostArray
from kvcache.pool.base import Cache
from kvcache.pool.batch import Batch
from kvcache.reference.decoder import PassPart
from kvcache.reference.hybrid.config import HybridConfig
from kvcache.reference.hybrid.model import Hybrid
from kvcache.reference.hybrid.pooled import HybridPass
from kvcache.reference.hybrid.weights import MLP, Attention, DeltaNet
from kvcache.reference.hybrid.weights import Layer as HybridLayer
from kvcache.reference.hybrid.weights import Weights as HybridWeights
from kvcache.reference.llama.blocks import LlamaBlocks
from kvcache.reference.llama.gguf import LlamaConfig
from kvcache.reference.llama.weights import Layer, Weights
from kvcache.snapshots.visibility import Visibility

VOCAB = 64
_HIDDEN, _WIDE, _HEADS, _KV_HEADS, _DIM = 32, 48, 4, 2, 8
Through: TypeAlias = Callable[[int, Array, Array], tuple[Array, Array, Array | None]]
"""Stores keys and values of a layer; returns those that the queries may see, and the mask."""


class InterruptedPassError(Exception):
    """A pass was interrupted on purpose."""


class Net(ABC):
    """A model whose passes can be watched and interrupted between its layers.

    recorded: hidden states behind each layer of the last pass, if it is a list. interrupt: the
    layer behind which to raise InterruptedPassError; None for never.
    """

    layers: int

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.recorded: list[HostArray] | None = None
        self.interrupt: int | None = None
        self._layer = 0

    @abstractmethod
    def over_layers(self, ids: HostArray, caches: LayerCaches[Any]) -> HostArray:
        """Compute `ids` [B, L] over per-layer caches; return logits [B, L, vocab]."""

    @abstractmethod
    def over_pool(self, parts: Sequence[tuple[int, int, list[int]]], cache: Cache) -> HostArray:
        """Compute sequences, starts and ids over `cache`; return logits of all, [tokens, vocab]."""

    @abstractmethod
    def alone(self, ids: Sequence[int]) -> HostArray:
        """Return logits behind each of `ids`, computed without a cache: [L, vocab]."""

    def begin(self) -> None:
        """Begin a pass."""
        self._layer = 0

    def watch(self, x: Array) -> None:
        """Take note of the hidden states [B, L, hidden] behind the next layer."""
        if self.recorded is not None:
            self.recorded.append(self.backend.to_host(x)[0])
        self._layer += 1
        if self._layer - 1 == self.interrupt:
            raise InterruptedPassError(f"interrupted behind layer {self.interrupt}")


class LlamaNet(Net):
    """A llama decoder of two layers, whose rule of attention may differ by layer.

    On NumPy it computes in float64 while caches hold float32. How a product adds up, which
    depends on its shape, then does not show in logits of float32.
    """

    layers = 2

    def __init__(self, backend: Backend, rules: Sequence[Visibility], seed: int = 0) -> None:
        super().__init__(backend)
        self.rules = list(rules)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=_HIDDEN,
            intermediate_size=_WIDE,
            layers=self.layers,
            heads=_HEADS,
            kv_heads=_KV_HEADS,
            head_dim=_DIM,
            rope_theta=100.0,
            norm_eps=1e-5,
            context_length=256,
        )
        self._blocks = LlamaBlocks(backend, config)
        self._on_host = isinstance(backend.alloc((1,), "float32"), np.ndarray)
        self._weights = _llama_weights(seed, self._put)

    def _put(self, array: HostArray) -> Array:
        # Not through the backend where that is NumPy: none takes float64.
        if self._on_host:
            return array.astype(np.float64)
        return self.backend.from_host(array, "float32")

    def over_layers(self, ids: HostArray, caches: LayerCaches[Any]) -> HostArray:
        start, length = caches.offset, ids.shape[1]
        positions = np.broadcast_to(np.arange(start, start + length), ids.shape)
        if (padding := caches[0].padding) is not None:
            positions = np.maximum(positions - np.asarray(padding)[:, None], 0)

        def through(layer: int, k: Array, v: Array) -> tuple[Array, Array, Array | None]:
            keys, values = caches[layer].update(k, v)
            return keys, values, caches[layer].mask(length)

        return self._run(ids, positions, through)

    def over_pool(self, parts: Sequence[tuple[int, int, list[int]]], cache: Cache) -> HostArray:
        ids = [token for *_, tokens in parts for token in tokens]
        positions = [start + i for _, start, tokens in parts for i in range(len(tokens))]
        sequences = [sequence for sequence, _, tokens in parts for _ in tokens]
        cache.start_forward(Batch(positions, sequences))

        def through(layer: int, k: Array, v: Array) -> tuple[Array, Array, Array | None]:
            if isinstance(cache, WrapperCache):
                cache.set_layer_type(layer)
            cache.set_layer(layer)
            cache.put(k[0, :, :, :], v[0, :, :, :])
            keys, values, mask = cache.get()
            if values is None:
                raise TypeError("a layer of this model has values.")
            return keys[None, :, :, :], values[None, :, :, :], mask

        logits: HostArray = self._run(np.asarray([ids]), np.asarray([positions]), through)[0]
        return logits

    def alone(self, ids: Sequence[int]) -> HostArray:
        columns = np.arange(len(ids))
        masks = [rule.sees(columns[:, None], columns[None, :]) for rule in self.rules]

        def through(layer: int, k: Array, v: Array) -> tuple[Array, Array, Array | None]:
            return k, v, self.backend.from_host(np.asarray(masks[layer]))

        logits: HostArray = self._run(np.asarray([ids]), columns[None], through)[0]
        return logits

    def _run(self, ids: HostArray, positions: HostArray, through: Through) -> HostArray:
        self.begin()
        arguments = self.arguments(ids, positions)
        return self.backend.to_host(self.logits(*arguments, through))

    def arguments(self, ids: HostArray, positions: HostArray) -> tuple[Array, Array, Array]:
        """Return ids and positions [B, L] as :meth:`logits` takes them: ids, cosines and sines."""
        # In float64: a float32 angle is off by 1e-3 at position 10,000 already.
        angles = positions[:, None, :, None] * self._weights.inverse_frequencies
        cos, sin = self._put(np.cos(angles)), self._put(np.sin(angles))
        return self.backend.from_host(ids.astype(np.int32)), cos, sin

    def logits(self, ids: Array, cos: Array, sin: Array, through: Through) -> Array:
        """Return logits [B, L, vocab], by functions that a framework can compile."""
        blocks, xp, weights = self._blocks, self.backend.xp, self._weights
        x = blocks.embed(weights.embedding, ids)
        for number, layer in enumerate(weights.layers):
            q, k, v = blocks.project(layer, x, cos, sin)
            keys, values, mask = through(number, self._narrow(k), self._narrow(v))
            bias = None if mask is None else self._bias(mask)
            x = blocks.finish(
                layer, x, blocks.attend(q, self._widen(keys), self._widen(values), bias)
            )
            self.watch(x)
        return self._narrow(xp.asarray(blocks.logits(weights.norm, weights.head, x)))

    def _bias(self, mask: Array) -> Array:
        xp = self.backend.xp
        zero = xp.zeros_like(mask, dtype=self.backend.dtype("float32"))
        bias = xp.where(mask, zero, zero - float("inf"))
        return xp.concat([bias] * (_HEADS // _KV_HEADS), axis=-2)

    def _narrow(self, array: Array) -> Array:
        return array.astype(np.float32) if isinstance(array, np.ndarray) else array

    def _widen(self, array: Array) -> Array:
        return array.astype(np.float64) if isinstance(array, np.ndarray) else array


class HybridNet(Net):
    """A hybrid decoder: two layers of gated delta nets, two of attention."""

    layers = 4
    recurrent = (True, False, True, False)

    def __init__(self, backend: Backend, seed: int = 0) -> None:
        super().__init__(backend)
        config = HybridConfig(
            vocab_size=VOCAB,
            hidden_size=_HIDDEN,
            recurrent=self.recurrent,
            sparse=(False,) * self.layers,
            heads=_HEADS,
            kv_heads=_KV_HEADS,
            head_dim=_DIM,
            rotary_dim=_DIM // 2,
            rope_theta=100.0,
            norm_eps=1e-6,
            delta_key_heads=2,
            delta_value_heads=4,
            delta_key_dim=8,
            delta_value_dim=8,
            kernel=4,
            intermediate_size=_WIDE,
            experts=0,
            experts_per_token=1,
            expert_size=1,
            shared_expert_size=1,
            normalised=True,
            tied=False,
        )
        self.model = Hybrid(config, _hybrid_weights(config, seed, backend.from_host), backend)
        self._mlp = self.model.stages.mlp
        self.model.stages.mlp = self._watched_mlp

    def _watched_mlp(self, norm: Array, layer: Any, x: Array) -> Array:
        out = self._mlp(norm, layer, x)
        self.watch(x + out)
        return out

    def over_layers(self, ids: HostArray, caches: LayerCaches[Any]) -> HostArray:
        self.begin()
        return self.backend.to_host(self.model(ids, caches, last_only=False))

    def over_pool(self, parts: Sequence[tuple[int, int, list[int]]], cache: Cache) -> HostArray:
        self.begin()
        if not isinstance(cache, WrapperCache):
            raise TypeError(f"a hybrid has a WrapperCache; got {cache!r}.")
        run = HybridPass(self.model.stages, self.model.weights, cache, "float32")
        return self.backend.to_host(
            run.logits([PassPart(*part, last=True) for part in parts], last_only=False)
        )

    def alone(self, ids: Sequence[int]) -> HostArray:
        self.begin()
        logits: HostArray = self.backend.to_host(self.model([list(ids)], last_only=False))[0]
        return logits


def _matrices(seed: int) -> Callable[..., HostArray]:
    """Return a function that draws a matrix ``[in, out]`` of this shape and scale."""
    rng = np.random.default_rng(seed)

    def matrix(*shape: int, scale: float = 1.0) -> HostArray:
        return rng.normal(scale=scale * shape[0] ** -0.5, size=shape).astype(np.float32)

    return matrix


def _llama_weights(seed: int, put: Callable[[HostArray], Array]) -> Weights:
    matrix, rows, kv_rows = _matrices(seed), _HEADS * _DIM, _KV_HEADS * _DIM

    def norm() -> Array:
        return put(1 + matrix(_HIDDEN, scale=0.3))

    def layer() -> Layer:
        # Large queries and keys, so that it matters which tokens are seen.
        turned = matrix(_HIDDEN, rows + kv_rows, scale=3.0)
        qkv = np.concatenate([turned, matrix(_HIDDEN, kv_rows)], axis=1)
        parts = matrix(rows, _HIDDEN), matrix(_HIDDEN, 2 * _WIDE), matrix(_WIDE, _HIDDEN)
        out, gate_up, down = map(put, parts)
        return Layer(norm(), put(qkv), out, norm(), gate_up, down)

    embedding = put(matrix(_HIDDEN, VOCAB, scale=_HIDDEN**0.5))
    layers = tuple(layer() for _ in range(LlamaNet.layers))
    frequencies = 100.0 ** -(np.arange(_DIM // 2, dtype=np.float64) / (_DIM // 2))
    return Weights(embedding, layers, norm(), put(matrix(_HIDDEN, VOCAB)), frequencies)


def _hybrid_weights(
    config: HybridConfig, seed: int, put: Callable[[HostArray], Array]
) -> HybridWeights:
    matrix, rng = _matrices(seed), np.random.default_rng(seed)
    rows, kv_rows, heads = _HEADS * _DIM, _KV_HEADS * _DIM, config.delta_value_heads
    values = heads * config.delta_value_dim

    def delta_net() -> DeltaNet:
        # Slow decay, or nothing behind the last tokens would matter.
        decay = -rng.uniform(0.01, 0.2, heads).astype(np.float32)
        return DeltaNet(
            put(matrix(_HIDDEN, config.channels + values + 2 * heads)),
            put(matrix(config.kernel, config.channels)),
            put(decay),
            put(rng.uniform(0, 0.5, heads).astype(np.float32)),
            put(1 + matrix(config.delta_value_dim, scale=0.3)),
            put(matrix(values, _HIDDEN, scale=2.0)),
        )

    def attention() -> Attention:
        return Attention(
            put(matrix(_HIDDEN, 2 * rows + 2 * kv_rows)),
            put(1 + matrix(_DIM, scale=0.3)),
            put(1 + matrix(_DIM, scale=0.3)),
            put(matrix(rows, _HIDDEN, scale=2.0)),
        )

    layers = tuple(
        HybridLayer(
            put(1 + matrix(_HIDDEN, scale=0.3)),
            delta_net() if recurrent else attention(),
            put(1 + matrix(_HIDDEN, scale=0.3)),
            MLP(put(matrix(_HIDDEN, 2 * _WIDE)), put(matrix(_WIDE, _HIDDEN))),
        )
        for recurrent in config.recurrent
    )
    embedding = put(matrix(_HIDDEN, VOCAB, scale=_HIDDEN**0.5))
    norm = put(1 + matrix(_HIDDEN, scale=0.3))
    return HybridWeights(embedding, layers, norm, put(matrix(_HIDDEN, VOCAB, scale=2.0)))
