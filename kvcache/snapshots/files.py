"""The file format of caches: safetensors, with a versioned header and a checksum per tensor.

The header is JSON under the metadata key ``kvcache``. Any safetensors reader can read the
tensors; this module also verifies them and describes the caches that they belong to.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors
import safetensors.numpy

from kvcache._interrupts import uninterrupted
from kvcache.backends import HOST_DTYPES, HostArray
from kvcache.errors import DamagedFileError, ForeignFileError, NewerFileError

VERSION = 2
_KEY = "kvcache"
_SEAL = "kvcache.sha256"

Header: TypeAlias = dict[str, Any]
"""The JSON header of a file, verified by a checksum of its own."""


def write_file(
    path: str | os.PathLike[str], tensors: Mapping[str, HostArray], header: Mapping[str, object]
) -> None:
    """Write `tensors` and `header`, JSON values, to `path`, whole or not at all.

    Raises: OSError.
    """
    # safetensors writes the memory of an array, so its elements must lie in order.
    compact = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    described = {name: _description(tensor) for name, tensor in compact.items()}
    text = json.dumps({"version": VERSION, "tensors": described, **header})
    metadata = {_KEY: text, _SEAL: _digest(text.encode())}
    target = Path(path)
    # In the same folder, because renaming is atomic only within one file system.
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as for any new file; safetensors would make it private
        safetensors.numpy.save_file(compact, partial, metadata)
        with uninterrupted():
            partial.chmod(mode)
            # On disk before the rename: else a crash could leave the name with an incomplete file.
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(target)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)  # there only after an error


def read_file(path: str | os.PathLike[str]) -> tuple[Header, dict[str, HostArray]]:
    """Return header and tensors of a file written by :func:`write_file`, all verified.

    Raises:
        ForeignFileError: not safetensors, or not of kvcache.
        NewerFileError: of a later format version.
        DamagedFileError: truncated or altered.
    """
    header = _read_header(path)
    try:
        # Not load_file of safetensors.numpy: it lacks the dtypes of ml_dtypes.
        tensors = dict(safetensors.deserialize(Path(path).read_bytes()))
    except safetensors.SafetensorError as error:
        raise DamagedFileError(f"{path} is damaged: {error}.") from error
    if tensors.keys() != header["tensors"].keys():
        raise DamagedFileError(
            f"{path} is damaged: its header lists {sorted(header['tensors'])}, "
            f"it holds {sorted(tensors)}."
        )
    return header, {
        name: _verified(path, name, raw, header["tensors"][name]) for name, raw in tensors.items()
    }


def _read_header(path: str | os.PathLike[str]) -> Header:
    """Return the verified header of a file, in the form of the current version.

    Raises: ForeignFileError, NewerFileError, DamagedFileError.
    """
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        # A truncated file of ours is no safetensors file either, but deserves the better error.
        kind = DamagedFileError if _looks_like_ours(path) else ForeignFileError
        raise kind(f"{path} is not a whole safetensors file: {error}.") from error
    if _KEY not in metadata:
        raise ForeignFileError(
            f"a cache file has {_KEY!r} in its metadata; {path} has {sorted(metadata)}. "
            "Load files that kvcache saved."
        )
    text = metadata[_KEY]
    # The checksum comes before the version, which a damaged header could state wrongly.
    if _digest(text.encode()) != metadata.get(_SEAL):
        raise DamagedFileError(f"{path} is damaged: its header does not match its checksum.")
    header: Header = json.loads(text)
    if header["version"] > VERSION:
        raise NewerFileError(
            f"this kvcache reads format versions up to {VERSION}; {path} has "
            f"{header['version']}. Upgrade kvcache."
        )
    return _upgraded(header) if header["version"] == 1 else header


def _upgraded(header: Header) -> Header:
    """Convert a header of version 1 to version 2, with names for the arrays of a layer.

    Version 1 had keys and values only, and called visibility "sight".
    """
    arrays = {"keys": -2, "values": -2}
    for record in header.get("caches", ()):
        record["arrays"] = arrays
    for part in header.get("parts", ()):
        part |= {"arrays": arrays, "visibility": part["sight"]}
    return header


def _looks_like_ours(path: str | os.PathLike[str]) -> bool:
    """Return whether an unreadable file has the header key of kvcache near its beginning."""
    with open(path, "rb") as file:
        return f'"{_KEY}"'.encode() in file.read(4096)


def _verified(path: str | os.PathLike[str], name: str, raw: Header, described: Header) -> HostArray:
    """Return a tensor from its raw bytes. Raise DamagedFileError if it is not as described."""
    if list(raw["shape"]) != described["shape"] or _digest(raw["data"]) != described["sha256"]:
        raise DamagedFileError(f"{path} is damaged: {name!r} does not match its checksum.")
    return np.frombuffer(raw["data"], HOST_DTYPES[described["dtype"]]).reshape(raw["shape"])


def _description(tensor: HostArray) -> Header:
    # As bytes, because hashlib does not accept the dtypes of ml_dtypes.
    digest = _digest(tensor.reshape(-1).view(np.uint8).data)
    return {"dtype": tensor.dtype.name, "shape": list(tensor.shape), "sha256": digest}


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
