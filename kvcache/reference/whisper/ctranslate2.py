"""Model files of CTranslate2: a header, then named variables one after the other.

Numbers are little-endian. A text has its length in bytes in front (2 bytes) and a zero at its end.
::

    version (4 bytes)  name of the kind of model (text)  its revision (4)
    count (4)    variables:  name (text)  rank (1)  sizes (4 each)  dtype (1)  bytes (4)  data
    count (4)    aliases:    name (text)  name of a variable (text)
"""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np

from kvcache.backends import HostArray
from kvcache.reference.errors import ModelFileError
from kvcache.storage.reading import read_regular

VERSION = 6
_DTYPES = tuple(
    np.dtype(kind).newbyteorder("<")
    for kind in (np.float32, np.int8, np.int16, np.int32, np.float16, ml_dtypes.bfloat16)
)


class CTranslate2File:
    """An open file.

    path: the file.
    kind: of model, for example ``"WhisperSpec"``.
    variables: every array by name; aliases name the array that they stand for.

    Raises: ModelFileError if it is missing, damaged, truncated, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = _Reader(read_regular(path))
            self.kind, self.variables = reader.file()
        except (OSError, ValueError) as error:
            raise ModelFileError(
                f"cannot read the model {path} ({error}): it is missing, damaged, or no "
                f"CTranslate2 file of version {VERSION}. Check the path, or download it again."
            ) from error


class _Reader:
    """A position in the bytes of a file. Reading raises ValueError where they make no sense."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._at = 0

    def file(self) -> tuple[str, dict[str, HostArray]]:
        """Read everything: the kind of model, and its variables and aliases by name."""
        if (version := self._number(4)) != VERSION:
            raise ValueError(f"version {version}")
        kind, _revision = self._text(), self._number(4)
        variables = {self._text(): self._array() for _ in range(self._number(4))}
        for _ in range(self._number(4)):
            alias, name = self._text(), self._text()
            if name not in variables:
                raise ValueError(f"{alias} stands for {name}, which is not there")
            variables[alias] = variables[name]
        # A whole file ends here; more bytes mean that a count or size in it is damaged.
        if rest := len(self._data) - self._at:
            raise ValueError(f"{rest} bytes too many")
        return kind, variables

    def _bytes(self, count: int) -> memoryview:
        self._at += count
        if self._at > len(self._data):
            raise ValueError(f"{self._at - len(self._data)} bytes too few")
        return self._data[self._at - count : self._at]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._bytes(size), "little")

    def _text(self) -> str:
        return bytes(self._bytes(self._number(2))).removesuffix(b"\0").decode()

    def _array(self) -> HostArray:
        shape = tuple(self._number(4) for _ in range(self._number(1)))
        kind, size = self._number(1), self._number(4)
        if kind >= len(_DTYPES) or math.prod(shape) * _DTYPES[kind].itemsize != size:
            raise ValueError(f"dtype {kind} and shape {shape} for {size} bytes")
        # A view of the file's bytes: models are large, and every weight is copied on its way out.
        return np.frombuffer(self._bytes(size), _DTYPES[kind]).reshape(shape)
