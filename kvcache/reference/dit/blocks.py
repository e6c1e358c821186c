"""Sizes, weights and computation of the diffusion transformer, over the array API."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeAlias

from kvcache.backends import Array
from kvcache.backends.arrays import Namespace
from kvcache.reference._math import layer_norm, softmax

Streams: TypeAlias = tuple[Array, Array]
"""Input and output of a block: hidden [B, tokens, width], text [B, text_tokens, width]."""

Shapes: TypeAlias = dict[str, tuple[int, ...]]
"""Shapes of weights by name."""

STREAMS = ("hidden", "text")
"""Names of the two streams, in the order of :data:`Streams`."""
_EPS = 1e-6


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a model.

    channels, tokens: a sample is [tokens, channels].
    vocabulary, text_tokens: a prompt is `text_tokens` ids below `vocabulary`, where 0 everywhere is
        the empty prompt.
    """

    channels: int = 2
    tokens: int = 32
    vocabulary: int = 8
    text_tokens: int = 4
    width: int = 64
    heads: int = 4
    blocks: int = 6
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if type(size) is not int or size < 1:  # True is an int for isinstance
                raise ValueError(f"every size must be an int >= 1; got {field.name}={size!r}.")
        if self.vocabulary < 2:
            raise ValueError("vocabulary must be >= 2, the empty prompt and another; got 1.")
        if self.width % 2 or self.width % self.heads:
            raise ValueError(
                f"width must be even and a multiple of heads; got {self.width} for {self.heads} "
                f"heads. The next above is {self._next_width()}."
            )

    def _next_width(self) -> int:
        step = self.heads if self.heads % 2 == 0 else 2 * self.heads
        return math.ceil(self.width / step) * step


def weight_shapes(config: DiTConfig) -> Shapes:
    """Return the shape of every weight by name. Random weights are drawn in this order."""
    width = config.width
    shapes: Shapes = {
        "prompts": (config.vocabulary, width),
        "positions": (config.tokens, width),
        "text_positions": (config.text_tokens, width),
    }
    shapes |= _linear("condition.up", width, width) | _linear("condition.down", width, width)
    shapes |= _linear("input", config.channels, width)
    for block in range(config.blocks):
        for stream in STREAMS:
            shapes |= _half_block(f"blocks.{block}.{stream}", width, config.mlp_ratio)
    shapes |= _linear("final.modulation", width, 2 * width)
    return shapes | _linear("final.output", width, config.channels)


def _half_block(name: str, width: int, mlp_ratio: int) -> Shapes:
    return {
        **_linear(f"{name}.modulation", width, 6 * width),
        **_linear(f"{name}.qkv", width, 3 * width),
        **_linear(f"{name}.out", width, width),
        **_linear(f"{name}.up", width, mlp_ratio * width),
        **_linear(f"{name}.down", mlp_ratio * width, width),
    }


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}


class DiTBlocks:
    """Stages of a model, each a pure function of arrays; ``weights`` and ``xp`` are constants.

    weights: arrays by the names of :func:`weight_shapes`.
    """

    def __init__(self, xp: Namespace, heads: int, weights: Mapping[str, Array]) -> None:
        self.xp = xp
        self.heads = heads
        self.weights = weights

    def linear(self, name: str, x: Array) -> Array:
        """Return ``x @ weight + bias`` of the layer called `name`: [..., in] to [..., out]."""
        product = self.xp.matmul(x, self.weights[f"{name}.weight"])
        return product + self.weights[f"{name}.bias"]

    def words(self, prompt: Array) -> Array:
        """Embed the tokens of `prompt`, [B, text_tokens]: [B, text_tokens, width]."""
        # take() of the array API knows indices of one dimension only.
        flat = self.xp.take(self.weights["prompts"], self.xp.reshape(prompt, (-1,)), axis=0)
        return self.xp.reshape(flat, (*prompt.shape, -1))

    def condition(self, t: Array | float, speeds: Array, prompt: Array) -> Array:
        """Return the condition of every block, from the time and the pooled prompt: [B, width].

        t: [B] or one for all. speeds: radians per unit of time, [width / 2].
        prompt: integers [B, text_tokens].
        """
        xp = self.xp
        pooled = xp.mean(self.words(prompt), axis=1)
        # Zeros of the batch spread a time given as one number, without asking for its type.
        angles = (xp.zeros_like(pooled[:, 0]) + t)[:, None] * speeds
        waves = xp.concat([xp.sin(angles), xp.cos(angles)], axis=1)
        wide = silu(xp, self.linear("condition.up", waves + pooled))
        return silu(xp, self.linear("condition.down", wide))

    def modulations(self, name: str, condition: Array, parts: int) -> tuple[Array, ...]:
        """Return `parts` vectors, made by layer `name` of `condition`: [B, 1, width] each."""
        together = self.linear(name, condition)[:, None, :]
        width = together.shape[-1] // parts
        return tuple(together[:, :, i * width : (i + 1) * width] for i in range(parts))

    def modulated(self, x: Array, shift: Array, scale: Array) -> Array:
        """Norm `x` over its last axis, scale it by 1 + `scale` and shift it (adaLN)."""
        return layer_norm(self.xp, x, 1.0 + scale, shift, _EPS)

    def block(self, name: str, streams: Streams, condition: Array) -> Streams:
        """Return both streams after joint attention and the MLP of each."""
        names = [f"{name}.{stream}" for stream in STREAMS]
        vectors = [self.modulations(f"{half}.modulation", condition, 6) for half in names]
        qkv = [
            self.linear(f"{half}.qkv", self.modulated(x, shift, scale))
            for half, x, (shift, scale, *_) in zip(names, streams, vectors, strict=True)
        ]
        tokens = streams[0].shape[1]
        attended = self._attend(self.xp.concat(qkv, axis=1))
        halves = attended[:, :tokens, :], attended[:, tokens:, :]
        hidden, text = map(self._after_attention, names, streams, halves, vectors)
        return hidden, text

    def _attend(self, qkv: Array) -> Array:
        """Attend from every token of [B, N, 3 * width] to all N of both streams: [B, N, width]."""
        xp = self.xp
        split = xp.reshape(qkv, (*qkv.shape[:2], 3 * self.heads, -1))
        split = xp.permute_dims(split, (0, 2, 1, 3))
        q, k, v = (split[:, i * self.heads : (i + 1) * self.heads, :, :] for i in range(3))
        scores = xp.matmul(q * q.shape[-1] ** -0.5, xp.permute_dims(k, (0, 1, 3, 2)))
        attended = xp.permute_dims(xp.matmul(softmax(xp, scores), v), (0, 2, 1, 3))
        return xp.reshape(attended, (*qkv.shape[:2], -1))

    def _after_attention(
        self, name: str, x: Array, attended: Array, vectors: tuple[Array, ...]
    ) -> Array:
        """Add attention output and MLP to one stream, [B, N, width], gated by `vectors`."""
        _, _, gate, shift, scale, mlp_gate = vectors
        x = x + gate * self.linear(f"{name}.out", attended)
        wide = self.linear(f"{name}.up", self.modulated(x, shift, scale))
        return x + mlp_gate * self.linear(f"{name}.down", silu(self.xp, wide))


def silu(xp: Namespace, x: Array) -> Array:
    """Return `x` times its logistic function."""
    # By way of tanh, which cannot overflow as exp(-x) can.
    half = 0.5 * x
    return half + half * xp.tanh(half)
