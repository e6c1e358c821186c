"""Snapshots as files: rows of every part and layer, bound to their tokens and model."""

from __future__ import annotations

import hashlib
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcache._checks import NO_LIMIT, as_int32s
from kvcache._types import Int32s
from kvcache.backends import HOST_DTYPES, HostArray
from kvcache.errors import ForeignFileError, SnapshotMismatchError
from kvcache.storage import schema
from kvcache.storage.arrays import NamedArray

from .files import Header, naming_damage, read_file, write_file
from .rows import LayerRows, TokenRows

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
"""A number of a layer, in the one way that it is written."""
_POSITION = schema.integer(0, NO_LIMIT)
_NONE = schema.one_of(None)
_SNAPSHOT = schema.record(
    {
        "kind": schema.one_of("snapshot"),
        "span": schema.tuple_of(_POSITION, _POSITION),
        "tokens": schema.text,
        "fingerprint": schema.text,
        "parts": schema.list_of(
            schema.record(
                {
                    "kind": schema.text,
                    "visibility": schema.tuple_of(
                        schema.either(_NONE, _POSITION),
                        schema.either(_NONE, schema.integer(1, NO_LIMIT)),
                        _POSITION,
                    ),
                    "dtype": schema.either(
                        schema.list_of(schema.one_of(*HOST_DTYPES)), schema.one_of(*HOST_DTYPES)
                    ),
                    "arrays": schema.mapping_of(schema.either(_NONE, schema.integer(-64, 63))),
                }
            )
        ),
    }
)


class Record(NamedTuple):
    """One part of a snapshot, as stored in a file.

    visibility: window, chunk, sinks. dtype: one for all arrays of a layer, or one for each.
    positions: int32, ascending, one for each row of `layers`.
    """

    kind: str
    visibility: tuple[int | None, int | None, int]
    dtype: str | tuple[str, ...]
    positions: Int32s
    layers: LayerRows


def rows_of(record: Record) -> TokenRows:
    """Return the rows in a file; of encoder output a row for each frame, whatever its age."""
    positions, layers = record.positions, record.layers
    arrays = [array.data for rows in layers.values() for array in rows]
    forms = {(data.shape[0], *data.shape[2:-1]) for data in arrays if data.ndim == 4}
    # Older files hold one output as one row, [frames, kv_heads, 1, head_dim]. Anything else is
    # refused by the cache that it is restored to.
    if record.kind != "encoder" or positions.size != 1 or len(forms) != 1:
        return TokenRows(positions, layers)
    [(frames, tokens)] = forms
    if tokens != 1 or any(data.ndim != 4 for data in arrays):
        return TokenRows(positions, layers)
    by_frame = {
        layer: tuple(
            array._replace(data=np.array(array.data[:, :, 0].swapaxes(0, 1))) for array in rows
        )
        for layer, rows in layers.items()
    }
    return TokenRows(np.repeat(positions, frames), by_frame)


def check_tokens(tokens: npt.ArrayLike | None, stop: int | None = None) -> None:
    """Raise ValueError unless `tokens` are ids, `stop` in number; None: any, or any number."""
    if tokens is None:
        return
    ids = as_int32s(tokens, "token ids")
    if ids.size and ids.min() < 0:
        raise ValueError(f"token ids are >= 0; got {ids.min()}. Leave out padding.")
    if stop is not None and ids.size != stop:
        raise ValueError(
            f"the tokens of a snapshot are all before its stop, {stop}; got {ids.size}. "
            "Give those before its start as well, and none behind it."
        )


def check_fingerprint(fingerprint: str) -> None:
    """Raise TypeError for anything but text."""
    if not isinstance(fingerprint, str):
        raise TypeError(f"a fingerprint is a str; got {reprlib.repr(fingerprint)}.")


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
        "tokens": _token_hash(tokens),
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
    if "caches" in header:
        raise ForeignFileError(
            f"{path} holds whole caches, no snapshot. Use kvcache.LayerCaches.load."
        )
    with naming_damage(path):
        _SNAPSHOT(header, "its header")
        start, stop = _checked_span(header["span"])
        records = [
            _record(number, part, tensors, range(start, stop))
            for number, part in enumerate(header["parts"])
        ]
        held = [name for number, record in enumerate(records) for name in _names(number, record)]
        schema.check_names(list(tensors), held, "its tensors")
    _check_owner(path, header, tokens, fingerprint)
    return (start, stop), records


def _checked_span(span: list[int]) -> tuple[int, int]:
    """Return start and stop of a snapshot. Raise SchemaError unless they are a range."""
    start, stop = span
    if start > stop:
        raise schema.SchemaError(f"its header.span must be a range; got [{start}, {stop})")
    return start, stop


def _record(number: int, part: Header, tensors: Mapping[str, HostArray], span: range) -> Record:
    """Return part `number` of a snapshot of `span`. Raise SchemaError unless it is consistent."""
    positions = tensors.get(f"{number}.positions")
    if positions is None or positions.dtype != np.int32 or positions.ndim != 1:
        raise schema.SchemaError(f"'{number}.positions' must be there, one axis of int32")
    steps = np.diff(positions.astype(np.int64))
    # Encoder output has a row for each frame, all at the position of their token.
    ascending = (steps >= (0 if part["kind"] == "encoder" else 1)).all()
    if positions.size and not (ascending and positions[0] in span and positions[-1] in span):
        raise schema.SchemaError(
            f"'{number}.positions' must ascend within the span of the snapshot"
        )
    layers = _layers(number, part["arrays"], tensors)
    for layer, arrays in layers.items():
        for array in arrays:
            _check_rows(f"'{number}.{layer}.{array.name}'", array, positions.size)
    dtype = part["dtype"] if isinstance(part["dtype"], str) else tuple(part["dtype"])
    return Record(part["kind"], tuple(part["visibility"]), dtype, positions, layers)


def _check_rows(name: str, array: NamedArray, tokens: int) -> None:
    """Raise SchemaError unless an array has so many rows on its token axis, if it has one."""
    axis, shape = array.token_axis, array.data.shape
    if axis is not None and not (-len(shape) <= axis < len(shape) and shape[axis] == tokens):
        raise schema.SchemaError(
            f"{name} must have {tokens} tokens on axis {axis}; its shape is {shape}"
        )


def _names(number: int, record: Record) -> list[str]:
    """Return the names of the tensors of part `number`."""
    arrays = [
        f"{number}.{layer}.{array.name}" for layer, rows in record.layers.items() for array in rows
    ]
    return [f"{number}.positions", *arrays]


def _layers(
    number: int, axes: Mapping[str, int | None], tensors: Mapping[str, HostArray]
) -> LayerRows:
    """Return the arrays of part `number` by layer, in the order of `axes`."""
    # Names are "part.layer.array"; "part.positions" has two components only.
    names = [name.split(".", 2) for name in tensors if name.startswith(f"{number}.")]
    # Others than plain numbers are left out, and so found by the caller to be in no layer.
    numbers = [parts[1] for parts in names if len(parts) == 3 and _NUMBER.fullmatch(parts[1])]
    return {
        layer: tuple(
            NamedArray(name, tensors[f"{number}.{layer}.{name}"], axis)
            for name, axis in axes.items()
            if f"{number}.{layer}.{name}" in tensors
        )
        for layer in dict.fromkeys(map(int, numbers))
    }


def _token_hash(tokens: npt.ArrayLike | None) -> str:
    """Return a hash of token ids, checked by :func:`check_tokens`; "" for None."""
    if tokens is None:
        return ""
    ids = as_int32s(tokens, "token ids")
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
