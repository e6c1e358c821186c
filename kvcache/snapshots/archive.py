"""Snapshots as files: rows of every part and layer, bound to their tokens and model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy.typing as npt

from kvcache._checks import as_int32s
from kvcache._types import Int32s
from kvcache.backends import HostArray
from kvcache.errors import ForeignFileError, SnapshotMismatchError
from kvcache.storage.arrays import NamedArray

from .files import Header, read_file, write_file
from .rows import LayerRows


class Record(NamedTuple):
    """One part of a snapshot, as stored in a file.

    visibility: window, chunk, sinks. positions: int32, ascending, one for each row of `layers`.
    """

    kind: str
    visibility: tuple[int | None, int | None, int]
    dtype: str
    positions: Int32s
    layers: LayerRows


def write_archive(
    path: str | os.PathLike[str],
    span: tuple[int, int],
    records: Sequence[Record],
    tokens: npt.ArrayLike | None,
    fingerprint: str,
) -> None:
    """Write the parts of a snapshot to `path`, whole or not at all.

    span: start and stop of the snapshot. tokens: ids up to its stop; only a hash of them is kept.
    """
    tensors: dict[str, HostArray] = {}
    parts = []
    for number, record in enumerate(records):
        axes: dict[str, int | None] = {}
        tensors[f"{number}.positions"] = record.positions
        for layer, arrays in record.layers.items():
            axes |= {array.name: array.token_axis for array in arrays}
            tensors |= {f"{number}.{layer}.{array.name}": array.data for array in arrays}
        parts.append(
            {
                "kind": record.kind,
                "visibility": list(record.visibility),
                "dtype": record.dtype,
                "arrays": axes,
            }
        )
    header = {
        "kind": "snapshot",
        "span": list(span),
        "parts": parts,
        "tokens": _token_hash(tokens, span[1]),
        "fingerprint": fingerprint,
    }
    write_file(path, tensors, header)


def read_archive(
    path: str | os.PathLike[str], tokens: npt.ArrayLike | None, fingerprint: str | None
) -> tuple[tuple[int, int], list[Record]]:
    """Return span and parts of the snapshot in `path`.

    tokens, fingerprint: those it must have been written with; None accepts any.

    Raises: SnapshotMismatchError if it belongs to other tokens or another model, CacheFileError,
        FileNotFoundError.
    """
    header, tensors = read_file(path)
    if header.get("kind") != "snapshot":
        raise ForeignFileError(
            f"{path} holds whole caches, no snapshot. Use kvcache.LayerCaches.load."
        )
    _check_owner(path, header, tokens, fingerprint)
    records = [
        Record(
            part["kind"],
            tuple(part["visibility"]),
            part["dtype"],
            tensors[f"{number}.positions"],
            _layers(number, part["arrays"], tensors),
        )
        for number, part in enumerate(header["parts"])
    ]
    start, stop = header["span"]
    return (start, stop), records


def _layers(
    number: int, axes: Mapping[str, int | None], tensors: Mapping[str, HostArray]
) -> LayerRows:
    """Return the arrays of part `number` by layer, in the order of `axes`."""
    # Names are "part.layer.array"; "part.positions" has two components only.
    names = [name.split(".") for name in tensors if name.startswith(f"{number}.")]
    layers = dict.fromkeys(int(parts[1]) for parts in names if len(parts) == 3)
    return {
        layer: tuple(
            NamedArray(name, tensors[f"{number}.{layer}.{name}"], axis)
            for name, axis in axes.items()
            if f"{number}.{layer}.{name}" in tensors
        )
        for layer in layers
    }


def _token_hash(tokens: npt.ArrayLike | None, stop: int | None = None) -> str:
    """Return a hash of token ids; "" for None.

    Raises: ValueError for anything but ids >= 0, and for others than `stop` of them.
    """
    if tokens is None:
        return ""
    ids = as_int32s(tokens, "token ids")
    if ids.size and ids.min() < 0:
        raise ValueError(f"token ids are >= 0; got {ids.min()}.")
    if stop is not None and ids.size != stop:
        raise ValueError(
            f"tokens name all {stop} positions up to the end of the snapshot; got {ids.size}."
        )
    # As little-endian int32, so that lists, arrays of any integer dtype and machines agree.
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()


def _check_owner(
    path: str | os.PathLike[str],
    header: Header,
    tokens: npt.ArrayLike | None,
    fingerprint: str | None,
) -> None:
    """Raise SnapshotMismatchError unless the file belongs to these tokens and this model."""
    wrong = []
    if tokens is not None and header["tokens"] != _token_hash(tokens):
        wrong.append("tokens")
    if fingerprint is not None and header["fingerprint"] != fingerprint:
        wrong.append(f"model {header['fingerprint']!r}, not {fingerprint!r}")
    if wrong:
        raise SnapshotMismatchError(f"{path} belongs to other {' and '.join(wrong)}. Compute anew.")
