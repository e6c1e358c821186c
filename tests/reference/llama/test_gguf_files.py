"""Model files of strangers: named errors or the same content, in bounded memory."""

import os
import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

from kvcache.errors import KVCacheError
from kvcache.reference.errors import ModelFileError, UnsupportedModelError
from kvcache.reference.llama.gguf import open_gguf
from kvcache.reference.llama.tokenizer import GGUFTokenizer
from kvcache.reference.llama.weights import load_weights

from ...forging import damages, flipped, peak_of

SPARE = 1 << 20


@pytest.fixture(scope="module")
def whole(write_gguf):
    return write_gguf({"x.strings": ["a", "b"], "x.numbers": [1.5, 2.5]}).read_bytes()


@pytest.fixture(scope="module")
def header(whole):
    """Bytes of the file before its data."""
    return whole.index(b"output_norm.weight") + 64


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf") / "model.gguf"


def open_and_load(path, content):
    path.write_bytes(content)
    result, peak = peak_of(lambda: load_weights(open_gguf(path), np.asarray))
    assert peak < 16 * len(content) + SPARE
    assert not isinstance(result, Exception) or isinstance(result, KVCacheError), repr(result)


@given(st.data())
def test_damaged_headers(whole, header, path, data):
    open_and_load(path, data.draw(damages(whole[:header])) + whole[header:])


@given(st.data())
def test_flipped_bits_in_headers(whole, header, path, data):
    place = st.tuples(
        st.integers(0, header - 1), st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 255])
    )
    changes = data.draw(st.lists(place, min_size=1, max_size=2))
    open_and_load(path, flipped(whole, changes))


def head(tensors=0, keys=0):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def text(string, length=None):
    return struct.pack("<Q", len(string) if length is None else length) + string


def tensor(name, sizes, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


ARRAY = text(b"k") + struct.pack("<I", 9)
FORGED = {
    "keys without end": head(keys=2**60),
    "tensors without end": head(tensors=2**60),
    "a text of any length": head(keys=1) + text(b"k", 2**62),
    "numbers without end": head(keys=1) + ARRAY + struct.pack("<IQ", 0, 2**60),
    "texts without end": head(keys=1) + ARRAY + struct.pack("<IQ", 8, 2**60),
    "arrays in arrays": head(keys=1) + ARRAY + struct.pack("<IQ", 9, 1) * 50_000,
    "a key twice": head(keys=2) + (text(b"k") + struct.pack("<IB", 0, 1)) * 2,
    "an unknown type": head(keys=1) + text(b"k") + struct.pack("<I", 77),
    "axes without end": head(1) + text(b"t") + struct.pack("<I", 2**31),
    "no axes": head(1) + tensor(b"t", []) + bytes(64),
    "a size that overflows": head(1) + tensor(b"t", [2**32, 2**32]) + bytes(64),
    "a part of a block": head(1) + tensor(b"t", [31], 8) + bytes(256),
    "an offset beyond the end": head(1) + tensor(b"t", [4], offset=2**62) + bytes(64),
    "an empty axis": head(1) + tensor(b"t", [2**62, 0]) + bytes(64),
    "tensors that overlap": head(64)
    + b"".join(tensor(b"t%d" % number, [2000]) for number in range(64))
    + bytes(8192),
    "alignment 0": head(keys=1) + text(b"general.alignment") + struct.pack("<II", 4, 0),
    "alignment of a text": head(keys=1)
    + text(b"general.alignment")
    + struct.pack("<I", 8)
    + text(b""),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_counts_and_lengths(path, name):
    path.write_bytes(FORGED[name])
    result, peak = peak_of(lambda: open_gguf(path))
    assert isinstance(result, ModelFileError), repr(result)
    assert "damaged, or no GGUF file" in str(result)
    assert peak < 10 * len(FORGED[name]) + SPARE


def test_numbers_take_a_few_times_the_bytes_of_the_file(path):
    path.write_bytes(head(keys=1) + ARRAY + struct.pack("<IQ", 0, 2**20) + bytes(2**20))
    result, peak = peak_of(lambda: open_gguf(path))
    assert isinstance(result, UnsupportedModelError), "it has no architecture"
    assert peak < 12 * 2**20


@pytest.mark.parametrize("value", [2.5, float("inf"), float("nan"), -1.0])
@pytest.mark.parametrize("key", ["block_count", "embedding_length", "attention.key_length"])
def test_sizes_are_integers(write_gguf, key, value):
    with pytest.raises(UnsupportedModelError, match=f"{key} must be one number above 0"):
        open_gguf(write_gguf({f"llama.{key}": value}))


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name, match in (("fifo", "a FIFO"), ("", "a directory")):
        with pytest.raises(ModelFileError, match=match):
            open_gguf(tmp_path / name)


# Tokenizers.

KEYS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.token_type": [1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 2,
}


def test_a_small_vocabulary():
    assert GGUFTokenizer(KEYS).encode("ab") == [2]


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("tokens", [1, 2, 3], "no texts"),
        ("tokens", "abc", "no texts"),
        ("merges", ["a x"], "makes no sense"),
        ("merges", ["nothing"], "makes no sense"),
        ("merges", [None], "no texts"),
        ("eos_token_id", 3, "numbered from 0 to 2; the model file has 3 for eos"),
        ("eos_token_id", -1, "has -1 for eos"),
    ],
)
def test_vocabularies_that_make_no_sense(key, value, match):
    with pytest.raises(ModelFileError, match=match):
        GGUFTokenizer(KEYS | {f"tokenizer.ggml.{key}": value})


@given(
    st.sampled_from(list(KEYS)),
    st.one_of(
        st.none(),
        st.integers(-5, 5),
        st.text(max_size=3),
        st.lists(st.text(max_size=3), max_size=4),
    ),
)
def test_any_vocabulary(key, value):
    with suppress(ModelFileError, UnsupportedModelError):
        GGUFTokenizer(KEYS | {key: value}).encode("ab")
