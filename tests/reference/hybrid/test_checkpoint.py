"""Checkpoint directories: what is read, and what is refused by name."""

import json

import ml_dtypes
import numpy as np
import pytest

import kvcache
from kvcache.reference.errors import ModelFileError, UnsupportedModelError
from kvcache.reference.hybrid.checkpoint import Checkpoint

from .conftest import load, tiny_tensors, write_tensors

IDS = [[3, 1, 4, 1, 5]]


@pytest.fixture(scope="module")
def numpy_backend():
    return kvcache.get_backend("numpy")


def test_shards(write_checkpoint, tiny_path, numpy_backend):
    """A model in several files, with layers beside it that the decoder has no use for."""
    path = write_checkpoint()
    (path / "model.safetensors").unlink()
    tensors = tiny_tensors() | {"mtp.norm.weight": np.zeros(32, np.float32)}
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        write_tensors(path / file, {name: tensors[name] for name in held})
    places = {name: file for file, held in shards.items() for name in held}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    np.testing.assert_array_equal(
        load(path, numpy_backend)(IDS), load(tiny_path, numpy_backend)(IDS)
    )


def test_half_precision(write_checkpoint, numpy_backend):
    rounded = {
        name: array.astype(ml_dtypes.bfloat16).astype(np.float32)
        for name, array in tiny_tensors().items()
    }
    np.testing.assert_array_equal(
        load(write_checkpoint(bfloat16=True), numpy_backend)(IDS),
        load(write_checkpoint(tensors=rounded), numpy_backend)(IDS),
    )


def test_progress(tiny_path, numpy_backend):
    calls = []
    load(tiny_path, numpy_backend, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "llama"}, "whose model_type is 'qwen3_next'; got 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'silu'"),
        ({"attention_bias": True}, "attention_bias is False"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is None"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'default'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is None"),
        ({"layer_types": ["linear_attention"] * 3}, "for each of 4 layers"),
        ({"layer_types": ["linear_attention", "mamba"] * 2}, "layer_types must name"),
        ({"layer_types": [[]] * 4}, "layer_types must name"),
        ({"layer_types": "full"}, "layer_types must name"),
        ({"mlp_only_layers": 3}, "mlp_only_layers must be"),
        ({"num_attention_heads": 3}, "heads modulo kv heads is 0; got 1"),
        ({"linear_num_value_heads": 5}, "linear value heads modulo key heads is 0; got 1"),
        ({"partial_rotary_factor": 0.2}, "rotated dimensions modulo 2 is 0; got 1"),
        ({"partial_rotary_factor": 1.5}, "rotated dimensions within a head"),
        ({"partial_rotary_factor": 0.1}, "rotated dimensions"),
        ({"linear_conv_kernel_dim": 1}, "convolution over more than one token"),
        ({"num_experts_per_tok": 5}, "experts per token within the experts"),
        ({"hidden_size": 32.5}, "hidden_size must be a finite number above 0, an integer if it"),
        ({"hidden_size": True}, "hidden_size must be"),
        ({"hidden_size": "32"}, "hidden_size must be"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"num_hidden_layers": 10**12}, "number of layers within 4,096 is True; got False"),
        ({"rope_theta": float("inf")}, "rope_theta must be"),
        ({"rope_theta": float("nan")}, "rope_theta must be"),
        ({"rope_theta": 10**400}, "rope_theta must be"),
    ],
    ids=str,
)
def test_other_models(write_checkpoint, settings, message):
    with pytest.raises(UnsupportedModelError, match=message):
        Checkpoint(write_checkpoint(settings))


@pytest.mark.parametrize("key", ["hidden_size", "rope_theta", "full_attention_interval"])
def test_missing_settings(write_checkpoint, key):
    with pytest.raises(ModelFileError, match=f"a number called {key}; it is missing"):
        Checkpoint(write_checkpoint({key: ...}))


@pytest.mark.parametrize(
    ("name", "array", "error", "message"),
    [
        ("model.norm.weight", ..., ModelFileError, r"shape \(32,\); got none"),
        ("model.norm.weight", np.zeros(31, "f4"), ModelFileError, r"\(32,\); got \(31,\)"),
        ("model.norm.weight", np.zeros(32, "i4"), UnsupportedModelError, "is int32"),
        ("model.norm.bias", np.zeros(32, "f4"), UnsupportedModelError, "no place for .*norm.bias"),
    ],
    ids=str,
)
def test_other_tensors(write_checkpoint, numpy_backend, name, array, error, message):
    path = write_checkpoint(tensors={name: array})
    with pytest.raises(error, match=message):
        load(path, numpy_backend)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"[" * 100_000, b"\xff"], ids=repr)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json(write_checkpoint, numpy_backend, name, content):
    path = write_checkpoint()
    if content is None:
        (path / name).unlink(missing_ok=True)
        (path / name).mkdir()
    else:
        (path / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=f"cannot read .*{name}"):
        load(path, numpy_backend)


@pytest.mark.parametrize("places", [None, [], {"a": 3}, {"a": "../model.safetensors"}], ids=str)
def test_damaged_indices(write_checkpoint, numpy_backend, places):
    path = write_checkpoint()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ModelFileError, match="does not name files of the directory"):
        load(path, numpy_backend)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_truncated_tensors(write_checkpoint, numpy_backend, cut):
    path = write_checkpoint()
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ModelFileError, match=r"cannot read .*model\.safetensors"):
        load(path, numpy_backend)


def test_no_directory(tmp_path):
    with pytest.raises(ModelFileError, match="it is missing, damaged, or the directory"):
        Checkpoint(tmp_path / "absent")
