"""The GGUF format: a header of counts, keys with values, and descriptions of tensors; then data.

Numbers are little-endian. A text has its length in bytes in front (8 bytes). ::

    "GGUF"  version (4 bytes)  count of tensors (8)  count of keys (8)
    keys:     name (text)  type (4)  value; of an array: type of its items (4)  count (8)  items
    tensors:  name (text)  rank (4)  sizes (8 each)  type (4)  offset in the data (8)
    padding to a multiple of the alignment, data

Read here, not by the package gguf: it believes every count, and makes an object of every number.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quant_shape_to_byte_shape

from kvcache.backends import HostArray

VERSIONS = (2, 3)
_SCALARS = {
    number: np.dtype(kind).newbyteorder("<")
    for number, kind in {
        0: np.uint8,
        1: np.int8,
        2: np.uint16,
        3: np.int16,
        4: np.uint32,
        5: np.int32,
        6: np.float32,
        7: np.bool_,
        10: np.uint64,
        11: np.int64,
        12: np.float64,
    }.items()
}
_TEXT, _ARRAY = 8, 9
_PLAIN = {
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F64: np.float64,
    GGMLQuantizationType.I8: np.int8,
    GGMLQuantizationType.I16: np.int16,
    GGMLQuantizationType.I32: np.int32,
    GGMLQuantizationType.I64: np.int64,
}
"""Types whose data are arrays of numbers; those of others are bytes, to be dequantised."""
_ALIGNMENT, _MOST_AXES = 32, 4


class Tensor(NamedTuple):
    """A tensor in an open file: its data are read from the disk when they are looked at."""

    tensor_type: GGMLQuantizationType
    n_bytes: int
    data: HostArray


def read_gguf(file: BinaryIO) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Return the keys of a GGUF file with their values, and its tensors in the order of the file.

    Counts and lengths are bounded by the size of the file before anything is made of them.

    Raises: ValueError where the file makes no sense.
    """
    return _Reader(np.memmap(file, mode="r")).contents()


class _Reader:
    """A position in the bytes of a file. Reading raises ValueError where they make no sense."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self._data = data
        self._at = 0

    def contents(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        """Read everything; see :func:`read_gguf`."""
        if self._bytes(4).tobytes() != b"GGUF":
            raise ValueError("GGUF magic invalid")
        if (version := self._number(4)) not in VERSIONS:
            raise ValueError(f"version {version}")
        tensors, keys = self._number(8), self._number(8)
        metadata: dict[str, object] = {}
        for _ in range(keys):
            name = _new(self._text(), metadata)
            metadata[name] = self._value(self._number(4))
        described: dict[str, tuple[list[int], GGMLQuantizationType, int]] = {}
        for _ in range(tensors):
            name = _new(self._text(), described)
            described[name] = self._description()
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"an alignment is a power of two, not {alignment!r}")
        start = -(-self._at // alignment) * alignment
        read = {name: self._tensor(start, *parts) for name, parts in described.items()}
        # Tensors that overlap could be many times as large as the file together.
        if sum(tensor.n_bytes for tensor in read.values()) > len(self._data):
            raise ValueError("tensors of more bytes than the file has")
        return metadata, read

    def _bytes(self, count: int) -> npt.NDArray[np.uint8]:
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise ValueError(f"{self._at - len(self._data)} bytes too few")
        return self._data[start : self._at]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._bytes(size).tobytes(), "little")

    def _text(self) -> str:
        return self._bytes(self._number(8)).tobytes().decode()

    def _value(self, kind: int) -> object:
        """Read a value of the type numbered `kind`."""
        if kind == _TEXT:
            return self._text()
        if kind == _ARRAY:
            return self._array(self._number(4), self._number(8))
        return self._numbers(kind, 1)[0]

    def _array(self, kind: int, count: int) -> list[object]:
        if kind == _TEXT:
            return [self._text() for _ in range(count)]
        if kind == _ARRAY:  # no key of a model of language has them
            raise ValueError("an array of arrays")
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> list[object]:
        if kind not in _SCALARS:
            raise ValueError(f"type {kind} of a value")
        data = self._bytes(count * _SCALARS[kind].itemsize)
        numbers: list[object] = data.view(_SCALARS[kind]).tolist()
        return numbers

    def _description(self) -> tuple[list[int], GGMLQuantizationType, int]:
        """Read shape, the last axis first, type and offset of a tensor."""
        if not 0 < (axes := self._number(4)) <= _MOST_AXES:
            raise ValueError(f"a tensor of {axes} axes")
        shape = [self._number(8) for _ in range(axes)]
        return shape, GGMLQuantizationType(self._number(4)), self._number(8)

    def _tensor(
        self, start: int, sizes: list[int], kind: GGMLQuantizationType, offset: int
    ) -> Tensor:
        """Return a tensor whose data lie `offset` bytes after `start`, uncopied."""
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        if not all(sizes) or sizes[0] % per_block:
            raise ValueError(f"shape {sizes} of {kind.name}, with {per_block} numbers to a block")
        # In integers of Python, which do not overflow.
        size = math.prod(sizes) * block_bytes // per_block
        self._at = start + offset
        data, shape = self._bytes(size), tuple(reversed(sizes))
        if kind in _PLAIN:
            return Tensor(kind, size, data.view(_PLAIN[kind]).reshape(shape))
        return Tensor(kind, size, data.reshape(quant_shape_to_byte_shape(shape, kind)))


def _new(name: str, known: Collection[str]) -> str:
    """Return `name`. Raise ValueError if it is known."""
    if name in known:
        raise ValueError(f"{name!r} twice")
    return name
