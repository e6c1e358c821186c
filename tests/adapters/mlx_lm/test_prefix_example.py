"""The example of prefix reuse, on models as they are on disk."""

import importlib.util
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from . import words  # noqa: E402

SCRIPT = Path(__file__).parents[3] / "examples" / "mlx_lm_prefix.py"
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Of a file in GGUF, as mlx-lm has them."""


@pytest.fixture
def ask(capsys):
    """Run the example; return how many tokens of each prompt it reused, and of how many."""
    spec = importlib.util.spec_from_file_location("mlx_lm_prefix", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments):
        script.main([*map(str, arguments)])
        printed = capsys.readouterr().out
        lines = re.findall(r"^ *(\d+) of +(\d+) tokens reused:", printed, re.MULTILINE)
        return [(int(matched), int(tokens)) for matched, tokens in lines]

    return run


def save_gguf(path, folder):
    """Write the llama in a GGUF file as mlx-lm reads models."""
    from transformers import AutoTokenizer

    arrays, metadata = mx.load(str(path), return_metadata=True)
    weights = {}
    for name, array in arrays.items():
        *block, part, kind = name.split(".")
        layer = f"model.layers.{block[1]}." if block else ""
        weights[f"{layer}{NAMES[part]}.{kind}"] = array
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    sizes = {
        "hidden_size": "llama.embedding_length",
        "num_hidden_layers": "llama.block_count",
        "intermediate_size": "llama.feed_forward_length",
        "num_attention_heads": "llama.attention.head_count",
        "num_key_value_heads": "llama.attention.head_count_kv",
        "vocab_size": "llama.vocab_size",
        "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
        "rope_theta": "llama.rope.freq_base",
    }
    config = {
        "model_type": "llama",
        "rope_traditional": True,  # pairs of neighbours are rotated in these files
        "quantization": {"group_size": 32, "bits": 4},
        **{size: metadata[key].item() for size, key in sizes.items()},
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(folder)


def check_turns(turns):
    """Each goes on from the answer before it, in whatever tokens that is written again."""
    assert turns[0][0] == 0
    for (_, before), (matched, tokens) in pairwise(turns):
        assert before <= matched < tokens


def test_a_tiny_model(ask, tmp_path):
    words.save("qwen3_next", tmp_path)
    *turns, branch, again = ask(tmp_path, "--max-tokens", 8)
    check_turns(turns)
    # Its tokenizer takes all words for the same unknown one, and so all questions.
    assert branch == again == (26, 27)


@pytest.mark.matrix
@pytest.mark.model
def test_smollm2(ask, tmp_path):
    gguf = pytest.importorskip("kvcache.reference.llama.gguf", reason="needs gguf")
    save_gguf(gguf.default_model_path(), tmp_path)
    *turns, branch, again = ask(tmp_path)
    check_turns(turns)
    assert branch == again == (28, 36)
