"""Reading CTranslate2 files: written here by hand, byte by byte, and every way to damage them."""

import struct

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

from kvcache.reference.errors import ModelFileError
from kvcache.reference.whisper.ctranslate2 import CTranslate2File

ARRAYS = {
    "a/floats": np.array([[1.5, -2.0, 0.25]], np.float32),
    "a/bytes": np.array([-128, 127], np.int8),
    "a/shorts": np.array(-3, np.int16),
    "a/ints": np.array([[7], [1 << 30]], np.int32),
    "a/halves": np.array([0.5, -65504], np.float16),
    "a/brains": np.array([1.5, 3.0], ml_dtypes.bfloat16),
    "a/nothing": np.zeros((2, 0), np.float32),
}


@pytest.fixture
def write(tmp_path):
    def write(data):
        path = tmp_path / "model.bin"
        path.write_bytes(data)
        return path

    return write


def test_round_trip(write, ctranslate2_bytes):
    path = write(ctranslate2_bytes(ARRAYS, {"b/alias": "a/ints"}, kind="SomeSpec"))
    file = CTranslate2File(path)
    assert (file.path, file.kind) == (path, "SomeSpec")
    assert list(file.variables) == [*ARRAYS, "b/alias"]
    for name, array in ARRAYS.items():
        variable = file.variables[name]
        assert (variable.dtype, variable.shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(variable, array)
    assert file.variables["b/alias"] is file.variables["a/ints"]


def test_every_truncation_is_noticed(write, ctranslate2_bytes):
    data = ctranslate2_bytes(ARRAYS, {"b/alias": "a/ints"})
    for length in range(len(data)):
        with pytest.raises(ModelFileError, match=r"bytes too few\): it is missing, damaged, or"):
            CTranslate2File(write(data[:length]))


def test_missing(tmp_path):
    with pytest.raises(ModelFileError, match=r"No such file.*Check the path, or download it again"):
        CTranslate2File(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data + b"\0", r"1 bytes too many"),
        (lambda data: b"GGUF" + data[4:], r"version 1179993927.*CTranslate2 file of version 6"),
        (lambda data: data.replace(b"a/ints\0", b"a/inks\0", 1), r"b/alias stands for a/ints"),
        (
            lambda data: data.replace(b"a/shorts\0\0\2", b"a/shorts\0\0\6"),
            r"dtype 6 and shape \(\)",
        ),
        (lambda data: data.replace(b"a/shorts\0\0\2", b"a/shorts\0\0\3"), r"for 2 bytes"),
        (
            lambda data: data.replace(b"a/bytes", b"a/\xff\xfe\xfd\xfc\xfb"),
            r"can't decode byte 0xff",
        ),
    ],
    ids=["longer", "version", "alias", "dtype", "size", "name"],
)
def test_damage_is_noticed(write, ctranslate2_bytes, change, says):
    data = ctranslate2_bytes(ARRAYS, {"b/alias": "a/ints"})
    assert change(data) != data
    with pytest.raises(ModelFileError, match=says):
        CTranslate2File(write(change(data)))


def test_numbers_are_little_endian(write):
    data = struct.pack("<I", 6) + b"\2\0x\0" + struct.pack("<II", 1, 1)
    data += b"\2\0y\0" + b"\1" + struct.pack("<I", 1) + b"\2" + struct.pack("<I", 2) + b"\1\2"
    (only,) = CTranslate2File(write(data + bytes(4))).variables.values()
    assert only.tolist() == [0x0201]
