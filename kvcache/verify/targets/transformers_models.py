"""Tiny random models of transformers, and pretrained ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "pad_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_WINDOW = 8
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "mistral": lambda: transformers.MistralConfig(**_SIZES, sliding_window=_WINDOW),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_SIZES,
        sliding_window=_WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **_SIZES,
        intermediate_size_mlp=48,
        attention_chunk_size=_WINDOW,
        num_local_experts=2,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **_SIZES,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2": lambda: transformers.Lfm2Config(
        **{name: value for name, value in _SIZES.items() if name != "head_dim"},
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
}
"""Tiny random models by name."""


def load(name: str, seed: int = 0) -> PreTrainedModel:
    """Return a tiny random model of a name in ``CONFIGS``, or a pretrained one.

    name: of a model in the library's cache or of a directory, if it is no tiny one. Nothing is
        downloaded.
    """
    if name not in CONFIGS:
        place = Path(name)
        pretrained: Any = transformers.AutoModelForCausalLM.from_pretrained(
            place if place.is_dir() else name, local_files_only=True
        )
        return _ready(pretrained)
    random: Any = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    _set_weights(random, seed)
    return _ready(random)


def _ready(model: Any) -> PreTrainedModel:
    """Return `model`, without what is for training only."""
    ready: PreTrainedModel = model.eval()
    return ready


@torch.no_grad()
def _set_weights(model: torch.nn.Module, seed: int) -> None:
    """Make weights so large that every layer and every token matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            scale = 1.0 if "embed" in name else 1.6 / math.sqrt(weight.shape[-1])
            weight.normal_(0, scale, generator=generator)
        # Slow decay, or nothing behind the last tokens would matter.
        if name.endswith("A_log"):
            weight.uniform_(0.01, 0.2, generator=generator).log_()
        if name.endswith("dt_bias"):
            weight.uniform_(0, 0.5, generator=generator)
