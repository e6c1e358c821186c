"""Tiny random models of mlx-lm, and models from directories."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten, tree_unflatten

_WINDOW = 8
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SIZES),
    "qwen3": ("qwen3", _SIZES | {"max_position_embeddings": 4096, "rope_theta": 1e4}),
    "gemma3": (
        "gemma3_text",
        _SIZES
        | {"sliding_window": _WINDOW, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    ),
    "qwen3_next": (
        "qwen3_next",
        _SIZES
        | {
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "shared_expert_intermediate_size": 16,
            "mlp_only_layers": [],
            "moe_intermediate_size": 16,
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 4096,
            "full_attention_interval": 2,
        },
    ),
}
"""Tiny random models by name."""


def load(name: str, seed: int = 0) -> Module:
    """Return a tiny random model of a name in ``MODELS``, or the one in a directory."""
    if name not in MODELS:
        from mlx_lm.utils import load_model

        model: Module = load_model(Path(name))[0]
        return model
    module, options = MODELS[name]
    library = importlib.import_module(f"mlx_lm.models.{module}")
    made: Any = library.Model(library.ModelArgs.from_dict(options | {"model_type": module}))
    mx.random.seed(seed)
    named: Any = tree_flatten(made.parameters())
    made.update(tree_unflatten([(path, _weight(path, array)) for path, array in named]))
    mx.eval(made.parameters())
    built: Module = made
    return built


def _weight(path: str, array: mx.array) -> mx.array:
    """Return random weights, so large that every layer and every token matters."""
    if path.endswith("A_log"):  # slow decay: the state behind the prompt matters
        return mx.log(mx.random.uniform(0.01, 0.2, array.shape))
    if path.endswith("dt_bias"):
        return mx.random.uniform(0.0, 0.5, array.shape)
    noise = mx.random.normal(array.shape)
    return array + 0.2 * noise if array.ndim < 2 else noise * float(2.0 / array.shape[-1] ** 0.5)
