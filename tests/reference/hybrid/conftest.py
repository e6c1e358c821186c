"""A tiny random hybrid, written as a checkpoint by hand: no framework is needed for it."""

import json

import ml_dtypes
import numpy as np
import pytest

from kvcache.storage.tensors import encode_tensors

HIDDEN, VOCAB, WIDE = 32, 64, 48
HEADS, KV_HEADS, DIM = 4, 2, 16
KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, KERNEL = 2, 4, 8, 12, 4
EXPERTS, EXPERT, SHARED = 4, 16, 24
# As the published models have it, which both transformers and mlx-lm read.
SETTINGS = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "partial_rotary_factor": 0.25,
    "rope_theta": 100.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "linear_num_key_heads": KEY_HEADS,
    "linear_num_value_heads": VALUE_HEADS,
    "linear_key_head_dim": KEY_DIM,
    "linear_value_head_dim": VALUE_DIM,
    "linear_conv_kernel_dim": KERNEL,
    "intermediate_size": WIDE,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": EXPERT,
    "shared_expert_intermediate_size": SHARED,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [2],
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
}


def tiny_tensors(seed=0, dense=(2,), recurrent_layers=(0, 2)):
    """Random weights of four layers by their names in a checkpoint; those in `dense` without MoE.

    Decays are slow and outputs of recurrent layers large, so that the state matters.
    """
    rng = np.random.default_rng(seed)

    def matrix(*shape):
        return rng.normal(scale=shape[-1] ** -0.5, size=shape).astype(np.float32)

    def mlp(prefix, size):
        return {
            f"{prefix}gate_proj.weight": 2 * matrix(size, HIDDEN),
            f"{prefix}up_proj.weight": matrix(size, HIDDEN),
            f"{prefix}down_proj.weight": matrix(HIDDEN, size),
        }

    def recurrent(prefix):
        channels = 2 * KEY_HEADS * KEY_DIM + VALUE_HEADS * VALUE_DIM
        return {
            f"{prefix}in_proj_qkvz.weight": matrix(channels + VALUE_HEADS * VALUE_DIM, HIDDEN),
            f"{prefix}in_proj_ba.weight": matrix(2 * VALUE_HEADS, HIDDEN),
            f"{prefix}conv1d.weight": matrix(channels, 1, KERNEL),
            f"{prefix}A_log": np.log(rng.uniform(0.01, 0.21, VALUE_HEADS)).astype(np.float32),
            f"{prefix}dt_bias": rng.uniform(0, 0.5, VALUE_HEADS).astype(np.float32),
            f"{prefix}norm.weight": 1 + 0.3 * matrix(VALUE_DIM),
            f"{prefix}out_proj.weight": 2 * matrix(HIDDEN, VALUE_HEADS * VALUE_DIM),
        }

    def attention(prefix):
        return {
            f"{prefix}q_proj.weight": matrix(2 * HEADS * DIM, HIDDEN),
            f"{prefix}k_proj.weight": matrix(KV_HEADS * DIM, HIDDEN),
            f"{prefix}v_proj.weight": matrix(KV_HEADS * DIM, HIDDEN),
            f"{prefix}o_proj.weight": 2 * matrix(HIDDEN, HEADS * DIM),
            f"{prefix}q_norm.weight": matrix(DIM),
            f"{prefix}k_norm.weight": matrix(DIM),
        }

    def experts(prefix):
        parts = [mlp(f"{prefix}experts.{i}.", EXPERT) for i in range(EXPERTS)]
        return {
            **{name: array for part in parts for name, array in part.items()},
            **mlp(f"{prefix}shared_expert.", SHARED),
            f"{prefix}gate.weight": 3 * matrix(EXPERTS, HIDDEN),
            f"{prefix}shared_expert_gate.weight": matrix(1, HIDDEN),
        }

    tensors = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN)}
    for i in range(4):
        prefix = f"model.layers.{i}."
        tensors |= {
            f"{prefix}input_layernorm.weight": matrix(HIDDEN),
            f"{prefix}post_attention_layernorm.weight": matrix(HIDDEN),
            **(
                recurrent(f"{prefix}linear_attn.")
                if i in recurrent_layers
                else attention(f"{prefix}self_attn.")
            ),
            **(mlp(f"{prefix}mlp.", WIDE) if i in dense else experts(f"{prefix}mlp.")),
        }
    head = {"model.norm.weight": matrix(HIDDEN), "lm_head.weight": 2 * matrix(VOCAB, HIDDEN)}
    return tensors | head


def write_tensors(path, tensors):
    """Writes a safetensors file as transformers does: with a note on the format, which it wants."""
    path.write_bytes(b"".join(encode_tensors(tensors, {"format": "pt"})))


@pytest.fixture(scope="session")
def write_checkpoint(tmp_path_factory):
    """Writes a tiny checkpoint; arguments replace settings and tensors, `...` removes them."""

    def write(settings=(), tensors=(), dense=(2,), bfloat16=False, recurrent=(0, 2)):
        path = tmp_path_factory.mktemp("checkpoint")
        kinds = ["linear_attention" if i in recurrent else "full_attention" for i in range(4)]
        kinds = {} if recurrent == (0, 2) else {"layer_types": kinds}
        chosen = {k: v for k, v in (SETTINGS | kinds | dict(settings)).items() if v is not ...}
        (path / "config.json").write_text(json.dumps(chosen))
        arrays = tiny_tensors(dense=dense, recurrent_layers=recurrent) | dict(tensors)
        arrays = {name: array for name, array in arrays.items() if array is not ...}
        if bfloat16:
            arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
        write_tensors(path / "model.safetensors", arrays)
        return path

    return write


@pytest.fixture(scope="session")
def tiny_path(write_checkpoint):
    """The directory of the tiny hybrid."""
    return write_checkpoint()


@pytest.fixture(scope="session")
def tiny(tiny_path, backend):
    """The tiny hybrid on every backend."""
    return load(tiny_path, backend)


def load(path, backend, **options):
    """Loads a checkpoint onto a backend."""
    from kvcache.reference.hybrid.checkpoint import Checkpoint
    from kvcache.reference.hybrid.model import Hybrid

    return Hybrid.from_checkpoint(Checkpoint(path), backend, **options)


@pytest.fixture(scope="session")
def chat_path(write_checkpoint):
    """The directory of a tiny hybrid over bytes, which can be talked to: it answers at random."""
    pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")
    from kvcache.reference.hybrid.corpus import END, SPECIAL, TEMPLATE
    from kvcache.reference.hybrid.saving import byte_tokenizer

    rng = np.random.default_rng(4)
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    tensors = {name: rng.normal(size=(260, HIDDEN)).astype(np.float32) for name in names}
    path = write_checkpoint({"vocab_size": 260}, tensors)
    (path / "tokenizer.json").write_text(byte_tokenizer(SPECIAL).to_str())
    settings = {"eos_token": {"content": END}, "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path
