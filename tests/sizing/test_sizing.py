"""Sizes of caches: those of well-known models, counted by hand, and configs that are none."""

import json
import subprocess
import sys

import pytest

import kvcache
from kvcache.sizing import bytes_at, model_shape, read_config, sizes_of

from .models import CONFIGS, written

KIB = 1 << 10

# Bytes of a token: layers x numbers x 2. Bytes of a state: layers x (convolution x 2 + state x 4).
PER_TOKEN = {
    "SmolLM2-135M": 30 * 2 * 3 * 64 * 2,
    "Llama-3.1-8B": 128 * KIB,
    "Llama-3.3-70B": 320 * KIB,
    "Qwen3-8B": 144 * KIB,
    "Qwen3-30B-A3B": 96 * KIB,
    "gpt-oss-20b": 24 * KIB,
    "Gemma-3-27B": 10 * 8 * KIB,
    "DeepSeek-V3": 61 * 576 * 2,
    "Qwen3-Next-80B-A3B": 24 * KIB,
    "Kimi-Linear-48B-A3B": 7 * 576 * 2,
    "Falcon-H1-7B": 44 * KIB,
    "Nemotron-H-8B": 16 * KIB,
    "Granite-4.0-H-Small": 16 * KIB,
    "Granite-4.0-H-Tiny": 8 * KIB,
    "LFM2-1.2B": 12 * KIB,
    "Jamba-v0.1": 16 * KIB,
}
PER_STATE = {
    "Qwen3-Next-80B-A3B": 36 * (8192 * 3 * 2 + 32 * 128 * 128 * 4),
    "Kimi-Linear-48B-A3B": 20 * (12288 * 3 * 2 + 32 * 128 * 128 * 4),
    "Falcon-H1-7B": 44 * (3584 * 3 * 2 + 24 * 128 * 256 * 4),
    "Nemotron-H-8B": 24 * (10240 * 3 * 2 + 128 * 64 * 128 * 4),
    "Granite-4.0-H-Small": 36 * (8448 * 3 * 2 + 128 * 64 * 128 * 4),
    "Granite-4.0-H-Tiny": 36 * (3328 * 3 * 2 + 48 * 64 * 128 * 4),
    "LFM2-1.2B": 10 * 2048 * 2 * 2,
    "Jamba-v0.1": 28 * (8192 * 3 * 2 + 8192 * 16 * 4),
}
STATE_TOKENS = {
    "Qwen3-Next-80B-A3B": 3144,
    "Kimi-Linear-48B-A3B": 5384,
    "Falcon-H1-7B": 3093,
    "Nemotron-H-8B": 6234,
    "Granite-4.0-H-Small": 9327,
    "Granite-4.0-H-Tiny": 7000,
    "LFM2-1.2B": 7,
    "Jamba-v0.1": 980,
}


def shape_of(folder, name, **changes):
    return model_shape(read_config(written(folder, name, **changes)))


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_of_well_known_models(tmp_path, name):
    sizes = sizes_of(shape_of(tmp_path, name), "bfloat16", "float32")
    assert (sizes.per_token, sizes.per_state) == (PER_TOKEN[name], PER_STATE.get(name, 0))
    assert sizes.state_tokens == pytest.approx(STATE_TOKENS.get(name, 0), abs=0.7)


@pytest.mark.parametrize(
    ("name", "layers", "numbers", "window"),
    [("Gemma-3-27B", 52, 2 * 16 * 128, 1024), ("gpt-oss-20b", 12, 2 * 8 * 64, 128)],
)
def test_windows_hold_their_tokens_and_no_more(tmp_path, name, layers, numbers, window):
    shape = shape_of(tmp_path, name)
    sizes = sizes_of(shape, "bfloat16", "float32")
    of_token = layers * numbers * 2
    assert (sizes.per_window_token, sizes.window) == (of_token, window)
    assert sizes.full_windows == of_token * window
    for tokens in (0, 1, window, window + 1, 10 * window):
        total = tokens * sizes.per_token + min(tokens, window) * of_token
        assert bytes_at(shape, tokens, "bfloat16", "float32") == total


def test_a_sequence_has_one_state_whatever_its_length(tmp_path):
    shape = shape_of(tmp_path, "Qwen3-Next-80B-A3B")
    for tokens in (0, 1, 1000):
        total = 24 * KIB * tokens + PER_STATE["Qwen3-Next-80B-A3B"]
        assert bytes_at(shape, tokens, "bfloat16", "float32") == total


def test_dtypes_of_states_and_of_all_the_rest(tmp_path):
    shape = shape_of(tmp_path, "Jamba-v0.1")
    sizes = sizes_of(shape, "float32", "bfloat16")
    assert sizes.per_token == 32 * KIB
    assert sizes.per_state == 28 * (8192 * 3 * 4 + 8192 * 16 * 2)
    with pytest.raises(kvcache.DTypeError, match=r"a dtype is one of float32, .*; got 'int4'"):
        sizes_of(shape, "bfloat16", "int4")


@pytest.mark.parametrize(
    ("changes", "windowed"),
    [
        ({"sliding_window": 16}, 36),
        ({"sliding_window": 16, "use_sliding_window": False}, 0),
        ({"sliding_window": 16, "use_sliding_window": True}, 36),
        ({"sliding_window": None}, 0),
        ({"model_type": "gemma2", "sliding_window": 16}, 18),
        ({"layer_types": ["full_attention"] * 36, "sliding_window": 16}, 0),
    ],
)
def test_which_layers_have_a_window(tmp_path, changes, windowed):
    config = {"use_sliding_window": None, **changes}
    shape = shape_of(tmp_path, "Qwen3-8B", **config)
    by_window = {group.window: group.layers for group in shape.tokens}
    wanted = {None: 36 - windowed, 16: windowed}
    assert by_window == {window: layers for window, layers in wanted.items() if layers}


def test_chunks_are_held_like_windows(tmp_path):
    kinds = ["chunked_attention"] * 24 + ["full_attention"] * 12
    shape = shape_of(tmp_path, "Qwen3-8B", layer_types=kinds, attention_chunk_size=8192)
    assert {group.window: group.layers for group in shape.tokens} == {None: 12, 8192: 24}


@pytest.mark.parametrize(
    ("changes", "heads"),
    [
        ({"num_key_value_heads": None}, 32),
        ({"num_key_value_heads": None, "multi_query": True}, 1),
        ({"num_key_value_heads": None, "multi_query": True, "num_kv_heads": 32}, 1),
        (
            {
                "num_key_value_heads": None,
                "num_kv_heads": 8,
                "multi_query": True,
                "new_decoder_architecture": True,
            },
            8,
        ),
    ],
)
def test_heads_of_keys_and_values(tmp_path, changes, heads):
    [group] = shape_of(tmp_path, "Qwen3-8B", **changes).tokens
    assert (group.layers, group.numbers) == (36, 2 * heads * 128)


def test_a_decoder_within_several_parts(tmp_path):
    outer = {"model_type": "qwen_omni", "thinker_config": {"text_config": CONFIGS["Qwen3-8B"]}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(outer))
    assert model_shape(read_config(path)).family == "qwen3"


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("Qwen3-8B", {"model_type": "mamba", "state_size": 16}, "of mamba are not known.*state_s"),
        ("Qwen3-8B", {"model_type": "t5", "is_encoder_decoder": True}, "of t5, with an encoder"),
        ("Qwen3-8B", {"num_kv_shared_layers": 4}, "not known here: .* num_kv_shared_layers"),
        ("Qwen3-8B", {"layer_types": ["conv"] * 36}, "layers of qwen3 are conv; their sizes"),
    ],
)
def test_a_family_that_is_not_known_is_refused(tmp_path, name, changes, match):
    with pytest.raises(kvcache.NotSupportedError, match=match):
        shape_of(tmp_path, name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("Qwen3-8B", {"model_type": None}, "a config has a model_type; .* has None"),
        ("Qwen3-8B", {"num_hidden_layers": None}, "qwen3 has num_hidden_layers or n_layer or"),
        ("Qwen3-8B", {"num_hidden_layers": -1}, "num_hidden_layers is an integer from 0 to .* -1"),
        ("Qwen3-8B", {"num_hidden_layers": True}, "num_hidden_layers is an integer"),
        ("Qwen3-8B", {"num_hidden_layers": 1e3}, "num_hidden_layers is an integer"),
        ("Qwen3-8B", {"num_hidden_layers": 1 << 40}, "num_hidden_layers is an integer"),
        ("Qwen3-8B", {"num_attention_heads": 0}, "attention has heads; .* has none"),
        ("Qwen3-8B", {"layer_types": ["full_attention"]}, "a name for each of 36 layers; .* has 1"),
        ("Qwen3-8B", {"layer_types": "all"}, "layer_types is a list of names; .* has 'all'"),
        ("LFM2-1.2B", {"full_attn_idxs": [True]}, "full_attn_idxs is a list of numbers of layers"),
        ("LFM2-1.2B", {"full_attn_idxs": [0] * 17}, "some of all 16 layers; .* names 17 and -1"),
        ("Nemotron-H-8B", {"hybrid_override_pattern": 5}, "hybrid_override_pattern is a string"),
        ("Kimi-Linear-48B-A3B", {"linear_attn_config": []}, r"is an object; .* has \[\]"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path, name, changes, match):
    with pytest.raises(kvcache.ForeignFileError, match=match):
        shape_of(tmp_path, name, **changes)


@pytest.mark.parametrize(
    ("text", "match"),
    [("", "a config is JSON; .*config.json is not"), ("[1]", "a config is a JSON object")],
)
def test_a_file_that_is_no_config(tmp_path, text, match):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(kvcache.ForeignFileError, match=match):
        read_config(path)


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(kvcache.FileAccessError, match="is a directory"):
        read_config(tmp_path)


@pytest.mark.installation
def test_reading_a_config_imports_no_library_of_models(tmp_path):
    path = written(tmp_path, "Qwen3-8B")
    program = (
        "import sys; from kvcache.sizing import *; model_shape(read_config(sys.argv[1]));"
        "print({'transformers', 'torch', 'jax', 'mlx'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", program, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
