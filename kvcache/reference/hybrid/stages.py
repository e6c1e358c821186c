"""The computation of a hybrid decoder between its caches, compiled where that makes it faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcache.backends import Array, Backend

from .blocks import HybridBlocks
from .config import HybridConfig
from .delta import Tokens, Triangles, triangles
from .weights import DeltaNet

State: TypeAlias = tuple[Array, ...]
"""The last inputs of the convolution, [B, kernel - 1, channels], and the matrix."""


class Recurred(NamedTuple):
    """The result of a gated delta net for some tokens."""

    output: Array
    """[B, L, hidden]."""
    state: State
    """Behind the last token."""
    at_cuts: dict[int, State]
    """By number of tokens."""


class Stages:
    """The stages of :class:`HybridBlocks` on one backend, and a gated delta net made of them."""

    def __init__(self, backend: Backend, config: HybridConfig, chunk: int) -> None:
        self.backend, self.config, self.chunk = backend, config, chunk
        blocks = HybridBlocks(backend, config)
        self.embed = backend.compile(blocks.embed)
        self.project = backend.compile(blocks.project)
        self.bias = backend.compile(blocks.bias)
        self.attend = backend.compile(blocks.attend)
        self.beside = backend.compile(blocks.beside)
        self.finish_attention = backend.compile(blocks.finish_attention)
        self.mlp = backend.compile(blocks.mlp)
        self.logits = backend.compile(blocks.logits)
        self._project_delta = backend.compile(blocks.project_delta)
        self._delta_step = backend.compile(blocks.delta_step)
        self._delta_chunk = backend.compile(blocks.delta_chunk)
        self._finish_delta = backend.compile(blocks.finish_delta)
        self._triangles: dict[int, Triangles] = {}
        # In float64: a float32 angle is off by 1e-3 at position 10,000 already.
        half = config.rotary_dim // 2
        self._frequencies = config.rope_theta ** -(np.arange(half, dtype=np.float64) / half)

    def angles(self, positions: npt.NDArray[np.int64]) -> tuple[Array, Array]:
        """Return cosines and sines at positions [L]: float32 [L, rotary_dim / 2] each."""
        angles, put = np.outer(positions, self._frequencies), self.backend.from_host
        return put(np.cos(angles), "float32"), put(np.sin(angles), "float32")

    def recur(
        self, norm: Array, layer: DeltaNet, x: Array, state: State, cuts: Sequence[int] = ()
    ) -> Recurred:
        """Return what a gated delta net adds to `x` [B, L, hidden], and the states behind it.

        state: in front of the first token; empty for the beginning of a sequence.
        cuts: numbers of tokens, inside of L, behind which the state is wanted.
        """
        length, kept = x.shape[1], self.config.kernel - 1
        past, matrix = state or self.zeros(x.shape[0])
        inputs, tokens, gates = self._project_delta(norm, layer, x, past)
        outputs, begin = [], 0
        at_cuts: dict[int, State] = {}
        # A cut ends a piece and begins another; the grid of pieces behind it stays where it is.
        for end in sorted({*cuts, *range(self.chunk, length, self.chunk), length}):
            output, matrix = self._rule(matrix, tokens.between(begin, end))
            outputs.append(output)
            begin = end
            if end in cuts:
                at_cuts[end] = inputs[:, end : end + kept, :], matrix
        behind = inputs[:, length:, :], matrix
        return Recurred(self._finish_delta(layer, outputs, gates), behind, at_cuts)

    def _rule(self, matrix: Array, tokens: Tokens) -> tuple[Array, Array]:
        """Apply the delta rule to a piece: its outputs, and the matrix behind it."""
        length = tokens.keys.shape[3]
        if length == 1:
            return self._delta_step(matrix, tokens)
        if length not in self._triangles:
            self._triangles[length] = triangles(self.backend, length)
        return self._delta_chunk(self._triangles[length], matrix, tokens)

    def zeros(self, batch: int) -> State:
        """Return the state in front of the first token."""
        put = self.backend.from_host
        return tuple(put(np.zeros(shape, np.float32)) for shape in self.state_shapes(batch))

    def state_shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Return the shapes of a state."""
        c = self.config
        return [
            (batch, c.kernel - 1, c.channels),
            (batch, c.delta_value_heads, c.delta_key_dim, c.delta_value_dim),
        ]
