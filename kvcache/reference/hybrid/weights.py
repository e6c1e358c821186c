"""The weights of a hybrid decoder, made of the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvcache.backends import Array, HostArray
from kvcache.reference._progress import Progress, Put
from kvcache.reference.errors import UnsupportedModelError

from .checkpoint import Checkpoint


class Attention(NamedTuple):
    """Weights of an attention layer, float32. Linear ones are ``[in, out]``."""

    project: Array  # [hidden, (2 * heads + 2 * kv_heads) * head_dim]: queries, keys, values, gates
    query_norm: Array  # [head_dim]
    key_norm: Array  # [head_dim]
    out: Array  # [heads * head_dim, hidden]


class DeltaNet(NamedTuple):
    """Weights of a gated delta net, float32. Hv: value heads; C: channels of the convolution."""

    project: Array  # [hidden, C + Hv * value_dim + 2 * Hv]: channels, output gates, beta, decay
    convolution: Array  # [kernel, C]
    log_decay: Array  # [Hv], below 0: times softplus of a token's number, the log of its decay
    decay_bias: Array  # [Hv]
    norm: Array  # [value_dim]
    out: Array  # [Hv * value_dim, hidden]


class MLP(NamedTuple):
    """Weights of a gated MLP, float32."""

    gate_up: Array  # [hidden, 2 * intermediate]
    down: Array  # [intermediate, hidden]


class Experts(NamedTuple):
    """Weights of many gated MLPs, of which each token takes a few, and of one for all tokens."""

    router: Array  # [hidden, experts]
    gate_up: Array  # [experts, hidden, 2 * expert]
    down: Array  # [experts, expert, hidden]
    shared: MLP
    shared_gate: Array  # [hidden, 1]


class Layer(NamedTuple):
    """Weights of one block, float32."""

    mixer_norm: Array  # [hidden]
    mixer: Attention | DeltaNet
    mlp_norm: Array  # [hidden]
    mlp: MLP | Experts


class Weights(NamedTuple):
    """Weights of a whole decoder, float32."""

    embedding: Array  # [hidden, vocab]
    layers: tuple[Layer, ...]
    norm: Array  # [hidden]
    head: Array  # [hidden, vocab]; the embedding itself where both are tied


def load_weights(file: Checkpoint, put: Put, progress: Progress | None = None) -> Weights:
    """Take every tensor out of `file` and hand it to `put`, in the layout of the decoder.

    put: called with each host array; the result goes into the weights.
    progress: called with ``(layers done, layers in all)`` after each layer.

    Raises: ModelFileError if tensors are missing or misshapen; UnsupportedModelError for tensors
        that the decoder has no place for.
    """
    return _Loader(file, put).run(progress)


class _Loader:
    """One walk through a checkpoint."""

    def __init__(self, file: Checkpoint, put: Put) -> None:
        self.file = file
        self.config = file.config
        self.put = put

    def run(self, progress: Progress | None) -> Weights:
        c = self.config
        embedding = self._linear(self._take("model.embed_tokens.weight", c.vocab_size, None))
        head = embedding
        if not c.tied:
            head = self._linear(self._take("lm_head.weight", c.vocab_size, None))
        layers = []
        for i in range(c.layers):
            layers.append(self._layer(i))
            if progress:
                progress(i + 1, c.layers)
        norm = self._norm("model.norm.weight", c.hidden_size)
        self._refuse_rest()
        return Weights(embedding, tuple(layers), norm, head)

    def _layer(self, index: int) -> Layer:
        prefix, c = f"model.layers.{index}.", self.config
        return Layer(
            self._norm(prefix + "input_layernorm.weight", c.hidden_size),
            self._delta_net(prefix) if c.recurrent[index] else self._attention(prefix),
            self._norm(prefix + "post_attention_layernorm.weight", c.hidden_size),
            self._experts(prefix + "mlp.")
            if c.sparse[index]
            else self._mlp(prefix + "mlp.", c.intermediate_size),
        )

    def _attention(self, prefix: str) -> Attention:
        c = self.config
        prefix += "self_attn."
        rows = self._take(prefix + "q_proj.weight", 2 * c.heads * c.head_dim, None)
        # Each head has its queries in front of its gate.
        queries, gates = _split_heads(rows, c.heads, [c.head_dim, c.head_dim])
        keys = self._take(prefix + "k_proj.weight", c.kv_heads * c.head_dim, None)
        values = self._take(prefix + "v_proj.weight", c.kv_heads * c.head_dim, None)
        return Attention(
            self._linear(queries, keys, values, gates),
            self._norm(prefix + "q_norm.weight", c.head_dim),
            self._norm(prefix + "k_norm.weight", c.head_dim),
            self._linear(self._take(prefix + "o_proj.weight", None, c.heads * c.head_dim)),
        )

    def _delta_net(self, prefix: str) -> DeltaNet:
        c = self.config
        prefix += "linear_attn."
        gates = c.delta_value_heads * c.delta_value_dim
        wide = c.delta_group * c.delta_value_dim
        # Each key head has its rows in a block, with those of the value heads that it serves.
        rows = self._take(prefix + "in_proj_qkvz.weight", c.channels + gates, None)
        parts = _split_heads(
            rows, c.delta_key_heads, [c.delta_key_dim, c.delta_key_dim, wide, wide]
        )
        rows = self._take(prefix + "in_proj_ba.weight", 2 * c.delta_value_heads, None)
        scalars = _split_heads(rows, c.delta_key_heads, [c.delta_group, c.delta_group])
        kernel = self.file.take(prefix + "conv1d.weight", c.channels, 1, c.kernel)
        take, put = self.file.take, self.put
        return DeltaNet(
            self._linear(*parts, *scalars),
            self._linear(kernel[:, 0, :]),
            put(-np.exp(take(prefix + "A_log", c.delta_value_heads))),
            put(take(prefix + "dt_bias", c.delta_value_heads)),
            put(take(prefix + "norm.weight", c.delta_value_dim)),
            self._linear(self._take(prefix + "out_proj.weight", None, gates)),
        )

    def _mlp(self, prefix: str, size: int) -> MLP:
        return MLP(*map(self.put, self._gated(prefix, size)))

    def _gated(self, prefix: str, size: int) -> tuple[HostArray, HostArray]:
        """Read a gated MLP: [hidden, 2 * size], the gate in front, and [size, hidden]."""
        gate = self._take(prefix + "gate_proj.weight", size, None)
        up = self._take(prefix + "up_proj.weight", size, None)
        down = self._take(prefix + "down_proj.weight", None, size)
        return _transposed(gate, up), _transposed(down)

    def _experts(self, prefix: str) -> Experts:
        c = self.config
        pairs = [self._gated(f"{prefix}experts.{i}.", c.expert_size) for i in range(c.experts)]
        gate_up, down = map(np.stack, zip(*pairs, strict=True))
        return Experts(
            self._linear(self._take(prefix + "gate.weight", c.experts, None)),
            self.put(gate_up),
            self.put(down),
            self._mlp(prefix + "shared_expert.", c.shared_expert_size),
            self._linear(self._take(prefix + "shared_expert_gate.weight", 1, None)),
        )

    def _take(self, name: str, rows: int | None, columns: int | None) -> HostArray:
        """Take a linear tensor, [out, in]; None for the size of the hidden states."""
        hidden = self.config.hidden_size
        return self.file.take(name, rows or hidden, columns or hidden)

    def _linear(self, *parts: HostArray) -> Array:
        return self.put(_transposed(*parts))

    def _norm(self, name: str, size: int) -> Array:
        # The file holds the difference from 1.
        return self.put(1 + self.file.take(name, size))

    def _refuse_rest(self) -> None:
        # Layers that guess several tokens ahead (mtp) are no part of the decoder.
        rest = [name for name in self.file.tensors if not name.startswith("mtp.")]
        # Some writers save the embedding under both names.
        rest = [name for name in rest if not (self.config.tied and name == "lm_head.weight")]
        if rest:
            raise UnsupportedModelError(
                f"the reference hybrid has no place for some tensors of {self.file.path}: "
                f"{', '.join(rest[:3])}. Use a checkpoint of Qwen3-Next."
            )


def _transposed(*parts: HostArray) -> HostArray:
    """Return linear tensors [out, in] beside each other as one [in, out]."""
    return np.ascontiguousarray(np.concatenate(parts).T)


def _split_heads(rows: HostArray, heads: int, sizes: Sequence[int]) -> list[HostArray]:
    """Split rows of heads, [heads * sum(sizes), in], into each part for all heads together."""
    by_head = rows.reshape(heads, sum(sizes), -1)
    parts = np.split(by_head, np.cumsum(sizes)[:-1], axis=1)
    return [part.reshape(-1, rows.shape[-1]) for part in parts]
