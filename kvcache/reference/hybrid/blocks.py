"""The computation of a hybrid decoder, as pure functions: a framework may compile them."""

from __future__ import annotations

from typing import NamedTuple

from kvcache.backends import Array, Backend
from kvcache.reference._blocks import DecoderBlocks
from kvcache.reference._math import attend, rms_norm, rotate, sigmoid, silu, softmax, swiglu

from .config import HybridConfig
from .delta import Tokens, Triangles, delta_chunk, delta_step
from .weights import MLP, Attention, DeltaNet, Experts

_EPS = 1e-6  # of the length of queries and keys, whatever that of the other norms is


class Projected(NamedTuple):
    """The inputs of an attention layer."""

    queries: Array  # [B, heads, L, head_dim]
    keys: Array  # [B, kv_heads, L, head_dim]
    values: Array  # [B, kv_heads, L, head_dim]
    gates: Array  # [B, L, heads * head_dim]


class HybridBlocks(DecoderBlocks):
    """Stages of a decoder of the sizes in `config`, over the array API, in float32."""

    def __init__(self, backend: Backend, config: HybridConfig) -> None:
        super().__init__(backend, config)
        self.config = config

    # Attention.

    def project(self, norm: Array, layer: Attention, x: Array, cos: Array, sin: Array) -> Projected:
        """Return queries, keys, values and output gates of `x` [B, L, hidden].

        Queries and keys are normalised, then rotated by the angles [L, rotary_dim / 2].
        """
        xp, c = self.xp, self.config
        rows = xp.matmul(rms_norm(xp, x, norm, c.norm_eps), layer.project)
        stop = (c.heads + 2 * c.kv_heads) * c.head_dim
        heads = xp.reshape(rows[:, :, :stop], (*x.shape[:2], -1, c.head_dim))
        heads = xp.permute_dims(heads, (0, 2, 1, 3))
        q, k = heads[:, : c.heads, :, :], heads[:, c.heads : c.heads + c.kv_heads, :, :]
        q = rotate(xp, rms_norm(xp, q, layer.query_norm, c.norm_eps), cos, sin)
        k = rotate(xp, rms_norm(xp, k, layer.key_norm, c.norm_eps), cos, sin)
        return Projected(q, k, heads[:, c.heads + c.kv_heads :, :, :], rows[:, :, stop:])

    def attend(self, layer: Attention, given: Projected, bias: Array | None) -> Array:
        """Return the output of an attention layer: [B, L, hidden].

        given: with keys and values of all tokens that the cache holds.
        """
        attended = attend(self.xp, given.queries, given.keys, given.values, bias)
        return self.finish_attention(layer, attended, given.gates)

    def finish_attention(self, layer: Attention, attended: Array, gates: Array) -> Array:
        """Return the output of an attention layer, [B, L, hidden], from its products.

        attended, gates: [B, L, heads * head_dim].
        """
        return self.xp.matmul(attended * sigmoid(self.xp, gates), layer.out)

    # Gated delta nets.

    def project_delta(
        self, norm: Array, layer: DeltaNet, x: Array, past: Array
    ) -> tuple[Array, Tokens, Array]:
        """Return the inputs of the convolution, those of the delta rule, and the output gates.

        past: inputs of the convolution at the ``kernel - 1`` tokens before `x`, [B, kernel - 1,
            channels]; the first result begins with them.
        """
        xp, c = self.xp, self.config
        rows = xp.matmul(rms_norm(xp, x, norm, c.norm_eps), layer.project)
        inputs = xp.concat([past, rows[:, :, : c.channels]], axis=1)
        mixed = inputs[:, : x.shape[1], :] * layer.convolution[0, :]
        for i in range(1, c.kernel):
            mixed = mixed + inputs[:, i : i + x.shape[1], :] * layer.convolution[i, :]
        mixed = silu(xp, mixed)
        keys = c.delta_key_heads * c.delta_key_dim
        scalars = c.channels + c.delta_value_heads * c.delta_value_dim
        decay = rows[:, :, scalars + c.delta_value_heads :] + layer.decay_bias
        beta = rows[:, :, scalars : scalars + c.delta_value_heads]
        tokens = Tokens(
            self._unit_length(self._by_head(mixed[:, :, :keys], 1)) * c.delta_key_dim**-0.5,
            self._unit_length(self._by_head(mixed[:, :, keys : 2 * keys], 1)),
            self._by_head(mixed[:, :, 2 * keys :], c.delta_group),
            self._by_head(layer.log_decay * self._softplus(decay), c.delta_group),
            self._by_head(sigmoid(xp, beta), c.delta_group),
        )
        return inputs, tokens, rows[:, :, c.channels : scalars]

    def delta_step(self, state: Array, token: Tokens) -> tuple[Array, Array]:
        """Apply the delta rule to one token: its output, and the state behind it.

        The state is [B, value heads, key_dim, value_dim] before and after.
        """
        output, new = delta_step(self.xp, self._grouped(state), token)
        return output, self.xp.reshape(new, state.shape)

    def delta_chunk(self, ones: Triangles, state: Array, tokens: Tokens) -> tuple[Array, Array]:
        """Apply the delta rule to many tokens at once, as :meth:`delta_step` to each in turn."""
        outputs, new = delta_chunk(self.xp, ones, self._grouped(state), tokens)
        return outputs, self.xp.reshape(new, state.shape)

    def finish_delta(self, layer: DeltaNet, outputs: list[Array], gates: Array) -> Array:
        """Return the output of a gated delta net, [B, L, hidden], from those of its rule.

        outputs: of the tokens in pieces, in order, as the rule returns them.
        gates: [B, L, value heads * value_dim].
        """
        xp, c = self.xp, self.config
        heads = xp.permute_dims(xp.concat(outputs, axis=3), (0, 3, 1, 2, 4))
        normed = xp.reshape(rms_norm(xp, heads, layer.norm, c.norm_eps), gates.shape)
        return xp.matmul(normed * silu(xp, gates), layer.out)

    def _by_head(self, x: Array, group: int) -> Array:
        """Split the last axis of `x` [B, L, key heads * group * D]: [B, key heads, group, L, D]."""
        xp = self.xp
        split = xp.reshape(x, (*x.shape[:2], self.config.delta_key_heads, group, -1))
        return xp.permute_dims(split, (0, 2, 3, 1, 4))

    def _grouped(self, state: Array) -> Array:
        """Split the heads of a state into key heads, and value heads for each of them."""
        c = self.config
        heads = (state.shape[0], c.delta_key_heads, c.delta_group)
        return self.xp.reshape(state, (*heads, *state.shape[2:]))

    def _unit_length(self, x: Array) -> Array:
        return x / self.xp.sqrt(self.xp.sum(x * x, axis=-1, keepdims=True) + _EPS)

    def _softplus(self, x: Array) -> Array:
        """Return log(1 + exp(x)), where exp cannot overflow."""
        size = self.xp.abs(x)
        return 0.5 * (x + size) + self.xp.log1p(self.xp.exp(-size))

    # MLPs.

    def mlp(self, norm: Array, layer: MLP | Experts, x: Array) -> Array:
        """Return what the second half of a block adds to `x`: [B, L, hidden]."""
        hidden = rms_norm(self.xp, x, norm, self.config.norm_eps)
        if isinstance(layer, MLP):
            return self._gated_mlp(layer, hidden)
        return self._experts(layer, hidden)

    def _gated_mlp(self, layer: MLP, hidden: Array) -> Array:
        xp = self.xp
        return xp.matmul(swiglu(xp, xp.matmul(hidden, layer.gate_up)), layer.down)

    def _experts(self, layer: Experts, hidden: Array) -> Array:
        """Return the weighted outputs of the experts of each token, and of the shared one.

        Every expert is computed for every token, with the weight 0 for the others: the shapes are
        then those of the weights, which a compiled program needs. Good for a few experts.
        """
        xp = self.xp
        weights = self._expert_weights(xp.matmul(hidden, layer.router))
        flat = xp.reshape(hidden, (1, -1, hidden.shape[-1]))
        outputs = xp.matmul(swiglu(xp, xp.matmul(flat, layer.gate_up)), layer.down)
        weights = xp.permute_dims(xp.reshape(weights, (1, -1, self.config.experts)), (2, 1, 0))
        chosen = xp.reshape(xp.sum(outputs * weights, axis=0), hidden.shape)
        shared = self._gated_mlp(layer.shared, hidden)
        return chosen + sigmoid(xp, xp.matmul(hidden, layer.shared_gate)) * shared

    def _expert_weights(self, scores: Array) -> Array:
        """Return the weights of the experts for `scores` [..., experts]; 0 for those not taken."""
        xp, c = self.xp, self.config
        weights = softmax(xp, scores)
        # The place of each expert in descending order of weights.
        rank = xp.argsort(xp.argsort(-weights, axis=-1), axis=-1)
        weights = xp.where(rank < c.experts_per_token, weights, xp.zeros_like(weights))
        if c.normalised:
            weights = weights / xp.sum(weights, axis=-1, keepdims=True)
        return weights
