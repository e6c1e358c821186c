"""Model files in the format of CTranslate2, written byte by byte; a tiny model in one."""

import json
import struct

import numpy as np
import pytest

import kvcache
from kvcache.reference.whisper.mel import SAMPLES

from .oracle import END, NEVER_FIRST, START, VOCAB, WORDS, Oracle, tiny_arrays


@pytest.fixture(scope="session")
def ctranslate2_bytes():
    """Makes a CTranslate2 file, version 6, of named arrays and aliases."""
    import ml_dtypes

    names = "float32 int8 int16 int32 float16".split()
    codes = {np.dtype(name): code for code, name in enumerate(names)}
    codes[np.dtype(ml_dtypes.bfloat16)] = len(names)

    def text(string):
        return struct.pack("<H", len(string) + 1) + string.encode() + b"\0"

    def array(array):
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        return shape + struct.pack("<BI", codes[array.dtype], array.nbytes) + array.tobytes()

    def make(arrays, aliases=(), kind="WhisperSpec"):
        data = [struct.pack("<I", 6), text(kind), struct.pack("<II", 3, len(arrays))]
        data += [text(name) + array(value) for name, value in arrays.items()]
        data += [struct.pack("<I", len(aliases))]
        data += [text(alias) + text(name) for alias, name in dict(aliases).items()]
        return b"".join(data)

    return make


@pytest.fixture(scope="session")
def write_folder(tmp_path_factory, ctranslate2_bytes):
    """Writes a tiny model's folder; arguments replace variables, None removes them."""
    import tokenizers

    def write(arrays=(), kind="WhisperSpec", start=START):
        folder = tmp_path_factory.mktemp("whisper")
        variables = {k: v for k, v in (tiny_arrays() | dict(arrays)).items() if v is not None}
        (folder / "model.bin").write_bytes(ctranslate2_bytes(variables, kind=kind))
        words = {f"w{i}": i for i in range(start - 1)}
        model = tokenizers.models.WordLevel(words, unk_token="w0")
        tokenizer = tokenizers.Tokenizer(model)
        names = ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>")
        tokenizer.add_special_tokens([*names])
        tokenizer.save(str(folder / "tokenizer.json"))
        never = sorted(set(range(VOCAB)) - WORDS - {END})
        rules = {"suppress_ids": never, "suppress_ids_begin": NEVER_FIRST}
        (folder / "config.json").write_text(json.dumps(rules))
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_folder(write_folder):
    return write_folder()


@pytest.fixture(scope="session")
def tiny_whisper(tiny_folder, backend):
    from kvcache.reference.whisper.model import load_whisper

    return load_whisper(tiny_folder, backend)


@pytest.fixture(scope="session")
def noises():
    """One window, three, none and one."""
    rng = np.random.default_rng(5)
    lengths = (SAMPLES // 3, 2 * SAMPLES + 16000, 0, SAMPLES)
    return [rng.normal(scale=10.0**-i, size=n).astype(np.float32) for i, n in enumerate(lengths)]


@pytest.fixture(scope="session")
def expected(noises):
    """Words of each window of each recording."""
    oracle = Oracle(tiny_arrays())
    cuts = [[noise[i : i + SAMPLES] for i in range(0, noise.size, SAMPLES)] for noise in noises]
    return [[oracle.text(window) for window in windows] for windows in cuts]


@pytest.fixture(scope="session")
def numpy_backend():
    return kvcache.get_backend("numpy")
