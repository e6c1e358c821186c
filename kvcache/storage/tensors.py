"""Safetensors files: written piece by piece, and read from the bytes of one opening."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import safetensors

from kvcache.backends import HOST_DTYPES, HostArray

_CODES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "bool": "BOOL",
}
"""Names of the dtypes in safetensors files."""
_NAMES = {code: name for name, code in _CODES.items()} | {"F64": "float64", "I64": "int64"}
_ALIGNMENT = 8


class RawTensor(NamedTuple):
    """A tensor as it lies in a file. code: of its dtype, see `_CODES`."""

    code: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def dtype(self) -> str:
        """Name of the dtype, or the code of one that kvcache does not know."""
        return _NAMES.get(self.code, self.code)

    def to_array(self, dtype: str) -> HostArray:
        """Return the tensor as an array of `dtype`, whose bytes are those of the file.

        Raises: ValueError if the file says that it is of another dtype.
        """
        if self.dtype != dtype:
            raise ValueError(f"it is {self.dtype}, not {dtype}")
        return np.frombuffer(self.data, HOST_DTYPES[dtype]).reshape(self.shape)


def encode_tensors(
    tensors: Mapping[str, HostArray], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview[int]]:
    """Yield the pieces of a safetensors file: its header, then each tensor, uncopied."""
    # The largest elements first, so that every tensor is aligned to its own, as the format wants.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    stop = 0
    for name in order:
        start, stop = stop, stop + tensors[name].nbytes
        entries[name] = {
            "dtype": _CODES[tensors[name].dtype.name],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, stop],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    yield len(header).to_bytes(8, "little") + header
    for name in order:
        yield tensor_bytes(tensors[name])


def tensor_bytes(tensor: HostArray) -> memoryview[int]:
    """Return the bytes of a tensor in C order, uncopied if it lies so in memory."""
    # As bytes, because the buffer protocol does not know the dtypes of ml_dtypes.
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


def decode_tensors(data: bytes) -> tuple[dict[str, str], dict[str, RawTensor]]:
    """Return metadata and tensors in the bytes of a safetensors file.

    Raises: ValueError unless they are a whole one.
    """
    try:
        # Not load of safetensors.numpy: it lacks the dtypes of ml_dtypes.
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    # safetensors gives no metadata of bytes. It has just parsed this header, so it is JSON of
    # little depth, with strings only in the metadata.
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
    return metadata, {
        name: RawTensor(entry["dtype"], tuple(entry["shape"]), entry["data"])
        for name, entry in entries
    }
