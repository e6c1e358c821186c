"""Checkpoint directories, written as transformers does, of models without experts."""

from __future__ import annotations

# First, because importing it says how to install tokenizers where it is missing.
import kvcache.reference.tokenizer  # noqa: F401

# isort: split

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from kvcache.backends import Array, Backend, HostArray
from kvcache.reference.errors import UnsupportedModelError
from kvcache.storage.tensors import encode_tensors

from .config import HybridConfig, Settings
from .weights import Attention, DeltaNet, Experts, Layer, Weights

__all__ = ["byte_tokenizer", "save_checkpoint", "tensors_of"]


def save_checkpoint(
    path: Path,
    settings: Settings,
    weights: Weights,
    backend: Backend,
    tokenizer: tokenizers.Tokenizer,
    *,
    template: str,
    end: str,
) -> None:
    """Write a model to a directory, which is made if there is none; files there are replaced.

    settings: content of ``config.json``. weights: arrays of `backend`.
    template: of chats, in Jinja. end: the special token that ends an answer.
    """
    path.mkdir(parents=True, exist_ok=True)
    end_id = tokenizer.token_to_id(end)
    files = {
        "config.json": {**settings, "eos_token_id": end_id},
        "generation_config.json": {"eos_token_id": end_id},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "chat_template": template,
        },
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (path / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    tensors = tensors_of(HybridConfig.from_settings(settings), weights, backend)
    # transformers wants the note on the format.
    pieces = encode_tensors(tensors, {"format": "pt"})
    (path / "model.safetensors").write_bytes(b"".join(pieces))


def byte_tokenizer(special: Sequence[str]) -> tokenizers.Tokenizer:
    """Return a tokenizer of bytes: ids 0 to 255, and then the `special` tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def tensors_of(config: HybridConfig, weights: Weights, backend: Backend) -> dict[str, HostArray]:
    """Return the tensors of a checkpoint, float32: the inverse of :func:`load_weights`.

    weights: arrays of `backend`.

    Raises: UnsupportedModelError for a model with experts.
    """
    tensors = _Writer(config, backend).run(weights)
    return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}


class _Writer:
    """One walk through the weights of a model."""

    def __init__(self, config: HybridConfig, backend: Backend) -> None:
        self.config, self.backend = config, backend

    def run(self, weights: Weights) -> dict[str, HostArray]:
        tensors = {
            "model.embed_tokens.weight": self._linear(weights.embedding),
            "model.norm.weight": self._norm(weights.norm),
        }
        if not self.config.tied:
            tensors["lm_head.weight"] = self._linear(weights.head)
        for i, layer in enumerate(weights.layers):
            tensors |= self._layer(layer, f"model.layers.{i}.")
        return tensors

    def _layer(self, layer: Layer, prefix: str) -> dict[str, HostArray]:
        if isinstance(layer.mlp, Experts):
            raise UnsupportedModelError(
                "a checkpoint is written of models with one MLP per layer; this one has experts."
            )
        mixer = (
            self._delta_net(layer.mixer, f"{prefix}linear_attn.")
            if isinstance(layer.mixer, DeltaNet)
            else self._attention(layer.mixer, f"{prefix}self_attn.")
        )
        gate, up = np.split(self._linear(layer.mlp.gate_up), 2)
        return mixer | {
            f"{prefix}input_layernorm.weight": self._norm(layer.mixer_norm),
            f"{prefix}post_attention_layernorm.weight": self._norm(layer.mlp_norm),
            f"{prefix}mlp.gate_proj.weight": gate,
            f"{prefix}mlp.up_proj.weight": up,
            f"{prefix}mlp.down_proj.weight": self._linear(layer.mlp.down),
        }

    def _attention(self, layer: Attention, prefix: str) -> dict[str, HostArray]:
        c = self.config
        sizes = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
        queries, keys, values, gates = np.split(self._linear(layer.project), np.cumsum(sizes))
        return {
            f"{prefix}q_proj.weight": _join_heads([queries, gates], c.heads),
            f"{prefix}k_proj.weight": keys,
            f"{prefix}v_proj.weight": values,
            f"{prefix}o_proj.weight": self._linear(layer.out),
            f"{prefix}q_norm.weight": self._norm(layer.query_norm),
            f"{prefix}k_norm.weight": self._norm(layer.key_norm),
        }

    def _delta_net(self, layer: DeltaNet, prefix: str) -> dict[str, HostArray]:
        c, read = self.config, self.backend.to_host
        keys, values = c.delta_key_heads * c.delta_key_dim, c.delta_value_heads * c.delta_value_dim
        sizes = [keys, keys, values, values, c.delta_value_heads]
        parts = np.split(self._linear(layer.project), np.cumsum(sizes))
        return {
            f"{prefix}in_proj_qkvz.weight": _join_heads(parts[:4], c.delta_key_heads),
            f"{prefix}in_proj_ba.weight": _join_heads(parts[4:], c.delta_key_heads),
            f"{prefix}conv1d.weight": self._linear(layer.convolution)[:, None, :],
            f"{prefix}A_log": np.log(-read(layer.log_decay)),
            f"{prefix}dt_bias": read(layer.decay_bias),
            f"{prefix}norm.weight": read(layer.norm),
            f"{prefix}out_proj.weight": self._linear(layer.out),
        }

    def _linear(self, array: Array) -> HostArray:
        return self.backend.to_host(array).T

    def _norm(self, array: Array) -> HostArray:
        # The file holds the difference from 1.
        return self.backend.to_host(array) - 1


def _join_heads(parts: Sequence[HostArray], heads: int) -> HostArray:
    """Put the rows of each head beside each other, those of the first part in front."""
    by_head = [part.reshape(heads, -1, part.shape[-1]) for part in parts]
    return np.concatenate(by_head, axis=1).reshape(-1, parts[0].shape[-1])
