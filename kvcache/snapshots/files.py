"""The file format of caches: safetensors, with a versioned header and a checksum per tensor.

The header is JSON under the metadata key ``kvcache``. Any safetensors reader can read the
tensors; this module also verifies them and describes the caches that they belong to.

Checksums find damage. They say nothing of who wrote a file: anybody can compute them. So the header
is checked as if a stranger had written it, before anything is made of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

from kvcache.backends import HOST_DTYPES, HostArray
from kvcache.errors import DamagedFileError, ForeignFileError, NewerFileError
from kvcache.storage import schema
from kvcache.storage.reading import read_regular
from kvcache.storage.tensors import RawTensor, decode_tensors, encode_tensors, tensor_bytes
from kvcache.storage.writing import replace_file

VERSION = 2
_KEY = "kvcache"
_SEAL = "kvcache.sha256"
_LARGEST = 2**63 - 1

Header: TypeAlias = dict[str, Any]
"""The JSON header of a file, verified by a checksum of its own and by a schema."""

_VERSIONED = schema.record({"version": schema.integer(1, _LARGEST)})
_FILE = schema.record(
    {
        "tensors": schema.mapping_of(
            schema.record(
                {
                    "dtype": schema.one_of(*HOST_DTYPES),
                    "shape": schema.list_of(schema.integer(0, _LARGEST)),
                    "sha256": schema.text,
                }
            )
        )
    }
)


def write_file(
    path: str | os.PathLike[str], tensors: Mapping[str, HostArray], header: Mapping[str, object]
) -> None:
    """Write `tensors` and `header`, JSON values, to `path`, whole or not at all.

    Raises: as :func:`~kvcache.storage.writing.replace_file`.
    """
    described = {name: _description(tensor) for name, tensor in tensors.items()}
    encoded = json.dumps({"version": VERSION, "tensors": described, **header})
    metadata = {_KEY: encoded, _SEAL: _digest(encoded.encode())}
    replace_file(path, encode_tensors(tensors, metadata))


def read_file(path: str | os.PathLike[str]) -> tuple[Header, dict[str, HostArray]]:
    """Return header and tensors of a file written by :func:`write_file`, all verified.

    Version and tensors of the header are checked; the caller checks the rest.

    Raises:
        FileNotFoundError
        FileAccessError: no regular file, or one that this process may not read.
        ForeignFileError: not safetensors, or not of kvcache.
        NewerFileError: of a later format version.
        DamagedFileError: truncated or altered, or with a header that kvcache does not write.
    """
    data = read_regular(path)  # once: a writer may replace the file meanwhile
    try:
        metadata, tensors = decode_tensors(data)
    except ValueError as error:
        # A truncated file of ours is no safetensors file either, but deserves the better error.
        kind = DamagedFileError if f'"{_KEY}"'.encode() in data[:4096] else ForeignFileError
        raise kind(f"{path} is not a whole safetensors file: {error}.") from error
    with naming_damage(path):
        header = _header(path, metadata)
        if tensors.keys() != header["tensors"].keys():
            lists, holds = (reprlib.repr(sorted(names)) for names in (header["tensors"], tensors))
            raise schema.SchemaError(f"its header lists {lists}, it holds {holds}")
        return header, {
            name: _verified(name, raw, header["tensors"][name]) for name, raw in tensors.items()
        }


@contextmanager
def naming_damage(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise DamagedFileError, which names `path`, for a SchemaError of the block."""
    try:
        yield
    except schema.SchemaError as error:
        raise DamagedFileError(f"{path} is damaged: {error}.") from error


def _header(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> Header:
    """Return the verified header of a file, in the form of the current version.

    Raises: ForeignFileError, NewerFileError, SchemaError.
    """
    if _KEY not in metadata:
        raise ForeignFileError(
            f"a cache file has {_KEY!r} in its metadata; {path} has {sorted(metadata)}. "
            "Load files that kvcache saved."
        )
    # The checksum comes before the version, which a damaged header could state wrongly.
    if _digest(metadata[_KEY].encode(errors="replace")) != metadata.get(_SEAL):
        raise schema.SchemaError("its header does not match its checksum")
    header = schema.parse_json(metadata[_KEY])
    _VERSIONED(header, "its header")
    versioned = cast(Header, header)
    if versioned["version"] > VERSION:
        raise NewerFileError(
            f"this kvcache reads format versions up to {VERSION}; {path} has "
            f"{versioned['version']}. Upgrade kvcache."
        )
    if versioned["version"] == 1:
        _upgrade(versioned)
    _FILE(versioned, "its header")
    return versioned


def _upgrade(header: Header) -> None:
    """Convert a header of version 1, in place, to version 2, with names for the arrays of a layer.

    Version 1 had keys and values only, and called visibility "sight".
    """
    arrays = {"keys": -2, "values": -2}
    for described in _objects(header.get("caches")):
        described["arrays"] = arrays
    for part in _objects(header.get("parts")):
        part |= {"arrays": arrays, "visibility": part.get("sight")}


def _objects(value: object) -> list[Header]:
    """Return the objects in a list; nothing for another value, which the schema refuses."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _verified(name: str, raw: RawTensor, described: Header) -> HostArray:
    """Return a tensor as an array. Raise SchemaError if it is not as described."""
    if list(raw.shape) != described["shape"] or _digest(raw.data) != described["sha256"]:
        raise schema.SchemaError(f"{name!r} does not match its checksum")
    try:
        return raw.to_array(described["dtype"])
    except ValueError as error:
        raise schema.SchemaError(f"{name!r} is not as its header says: {error}") from error


def _description(tensor: HostArray) -> Header:
    digest = _digest(tensor_bytes(tensor))
    return {"dtype": tensor.dtype.name, "shape": list(tensor.shape), "sha256": digest}


def _digest(data: bytes | memoryview[int]) -> str:
    return hashlib.sha256(data).hexdigest()
