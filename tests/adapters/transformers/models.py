"""Tiny random models whose greedy output varies, and whose recurrent states matter."""

import math
from functools import cache

import pytest
import torch
import transformers as tf

VOCAB, WINDOW = 384, 12
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
HEADS = {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SSD = {
    "mamba_d_ssm": 128,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 8,
}


def _configs():
    yield "llama", tf.LlamaConfig(**COMMON)
    yield "mistral", tf.MistralConfig(**COMMON, sliding_window=WINDOW)
    yield (
        "gemma3",
        tf.Gemma3TextConfig(
            **COMMON,
            **HEADS,
            sliding_window=WINDOW,
            layer_types=["sliding_attention"] * 3 + ["full_attention"],
        ),
    )
    yield "qwen3", tf.Qwen3Config(**COMMON, **HEADS)
    yield (
        "gpt_oss",
        tf.GptOssConfig(
            **COMMON,
            **HEADS,
            sliding_window=WINDOW,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    )
    yield (
        "qwen3_next",
        tf.Qwen3NextConfig(
            **COMMON,
            **HEADS,
            **EXPERTS,
            shared_expert_intermediate_size=32,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            layer_types=["linear_attention", "full_attention"] * 2,
        ),
    )
    yield "falcon_h1", tf.FalconH1Config(**COMMON, **SSD)
    yield (
        "jamba",
        tf.JambaConfig(
            **COMMON,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
            mamba_d_state=16,
            mamba_dt_rank=8,
            use_mamba_kernels=False,
        ),
    )
    bamba = {name: value for name, value in SSD.items() if name != "mamba_d_ssm"}
    yield "bamba", tf.BambaConfig(**COMMON, **bamba, attn_layer_indices=[1, 3])
    yield (
        "lfm2",
        tf.Lfm2Config(
            **COMMON, layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False
        ),
    )
    yield (
        "gemma3n",
        tf.Gemma3nTextConfig(
            **COMMON,
            **HEADS,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=16,
            laurel_rank=8,
            activation_sparsity_pattern=[0.0] * 4,
            altup_num_inputs=2,
        ),
    )
    yield (
        "llama4",
        tf.Llama4TextConfig(
            **COMMON,
            **HEADS,
            intermediate_size_mlp=64,
            attention_chunk_size=WINDOW,
            num_local_experts=2,
            layer_types=["chunked_attention"] * 3 + ["full_attention"],
            no_rope_layers=[1, 1, 1, 0],
        ),
    )
    yield (
        "mamba2",
        tf.Mamba2Config(
            vocab_size=VOCAB,
            hidden_size=64,
            num_hidden_layers=3,
            num_heads=8,
            head_dim=16,
            state_size=16,
            n_groups=1,
            conv_kernel=4,
            chunk_size=8,
            eos_token_id=None,
            pad_token_id=0,
            bos_token_id=0,
        ),
    )


CONFIGS = dict(_configs())


def first(values, number=1):
    """Return parameters of a test, all but the first of which are left to the matrix."""
    marked = [pytest.param(value, marks=pytest.mark.matrix) for value in values[number:]]
    return [*values[:number], *marked]


MODELS = [name for name in CONFIGS if name != "mamba2"]
EAGER_ONLY = {"gpt_oss", "mamba2"}
STATEFUL = {"qwen3_next", "falcon_h1", "jamba", "bamba"}
"""Models for which the library refuses drafts, because their states cannot go back."""


def _speech_and_text():
    sizes = {"vocab_size": VOCAB, "d_model": 64, "tie_word_embeddings": False, "eos_token_id": None}
    tokens = {"bos_token_id": 0, "pad_token_id": 0, "decoder_start_token_id": 1}
    layers = {"encoder_layers": 2, "decoder_layers": 4}
    layers |= {f"{end}_{name}": n for end in ("encoder", "decoder") for name, n in HALVES}
    for name, depths in {"t5": (3, 3), "deep t5": (2, 4), "shallow t5": (4, 2)}.items():
        yield (
            name,
            tf.T5Config(
                **sizes,
                **tokens,
                d_kv=16,
                d_ff=64,
                num_heads=4,
                num_layers=depths[0],
                num_decoder_layers=depths[1],
            ),
        )
    yield "bart", tf.BartConfig(**sizes, **tokens, **layers, forced_eos_token_id=None)
    yield (
        "whisper",
        tf.WhisperConfig(**sizes, **tokens, **layers, max_source_positions=50, num_mel_bins=8),
    )


HALVES = (("attention_heads", 4), ("ffn_dim", 64))
ENCODER_DECODERS = dict(_speech_and_text())


@cache
def encoder_decoder(name):
    config = ENCODER_DECODERS[name]
    kind = {"t5": tf.T5ForConditionalGeneration, "whisper": tf.WhisperForConditionalGeneration}
    kind = kind.get(config.model_type, tf.BartForConditionalGeneration)
    built = kind(config).eval()
    _set_weights(built, torch.Generator().manual_seed(1))
    built.generation_config.eos_token_id = None
    return built


@cache
def model(name, attention="eager", similar=False):
    """Return a model with weights so large that greedy output does not settle.

    similar: whether to return an assistant for it, which agrees with it now and then.
    """
    built = tf.AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention)
    _set_weights(built, torch.Generator().manual_seed(1))
    if similar:
        _add_noise(built, torch.Generator().manual_seed(2))
    built.generation_config.eos_token_id = None
    built.generation_config.pad_token_id = 0
    built.name_in_tests = name
    return built.eval()


@torch.no_grad()
def _set_weights(built, generator):
    for name, weight in built.named_parameters():
        if weight.ndim > 1:
            scale = 1 if "embed" in name else 1.6 / math.sqrt(weight.shape[-1])
            weight.normal_(0, scale, generator=generator)
        # Slow decay, or nothing behind the last tokens would matter.
        if name.endswith("A_log"):
            weight.uniform_(0.01, 0.2, generator=generator).log_()
        if name.endswith("dt_bias"):
            weight.uniform_(0, 0.5, generator=generator)


@torch.no_grad()
def _add_noise(built, generator):
    for weight in built.parameters():
        if weight.ndim > 1:
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise * weight.std() * 0.02)
