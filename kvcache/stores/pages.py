"""Pages: rows of some positions of one sequence, in all layers and caches, as bytes.

A layer is a tuple of named arrays, with or without a token axis. So keys and values, latent keys,
recurrent states of several dtypes, and windows that hold only some positions are all pages.

The value of a page::

    16 bytes    magic, version, form (0 plain, 1 sealed), length of the layout
    n bytes     the layout: JSON
    4 bytes     for each part, the number of its positions
    4 bytes     for each position, the position
    ...         the arrays as they are in memory, each from a multiple of 64 bytes on

The layout says everything but the number of tokens: kinds, names, axes, dtypes and sizes. A page
that was sealed has nonce, ciphertext of everything behind the first 16 bytes, and tag instead.

A page comes from a store that others may write to. So no count in it is believed: the sizes of all
arrays must add up to the bytes that came, exactly, before any array is made.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from kvcache._checks import NO_LIMIT
from kvcache._types import Int32s
from kvcache.backends import HOST_DTYPES
from kvcache.errors import PageError
from kvcache.snapshots.archive import Record
from kvcache.snapshots.rows import LayerRows
from kvcache.storage import schema
from kvcache.storage.arrays import ArrayForm, NamedArray, array_forms
from kvcache.storage.tensors import tensor_bytes

from .outcomes import Buffer, Hit, Item, Key, Label
from .sealing import Seal

_MAGIC, _VERSION = b"KVCPAGE\0", 1
_HEADER = struct.Struct("<8sHHI")
_PLAIN, _SEALED = 0, 1
_ALIGNMENT = 64
_MAX_LAYOUT_NBYTES = 1 << 20
_MAX_AXES = 16
_MAX_ARRAYS = 1 << 16
_COUNT_NBYTES = 4

_NONE = schema.one_of(None)
_SIZE = schema.integer(0, NO_LIMIT)
_DTYPE = schema.one_of(*HOST_DTYPES)
_LAYOUT = schema.list_of(
    schema.record(
        {
            "kind": schema.text,
            "visibility": schema.tuple_of(
                schema.either(_NONE, _SIZE),
                schema.either(_NONE, schema.integer(1, NO_LIMIT)),
                _SIZE,
            ),
            "dtype": schema.either(schema.list_of(_DTYPE), _DTYPE),
            "layers": schema.list_of(
                schema.record(
                    {
                        "numbers": schema.list_of(_SIZE),
                        "arrays": schema.list_of(
                            schema.record(
                                {
                                    "name": schema.text,
                                    "axis": schema.either(
                                        _NONE, schema.integer(-_MAX_AXES, _MAX_AXES - 1)
                                    ),
                                    "dtype": _DTYPE,
                                    "sizes": schema.list_of(_SIZE),
                                }
                            )
                        ),
                    }
                )
            ),
        }
    )
)

Described: TypeAlias = dict[str, Any]
Layout: TypeAlias = list[Described]
"""JSON that :data:`_LAYOUT` has checked."""


@dataclass(frozen=True)
class Page:
    """Positions ``[start, stop)`` of one sequence, as far as each of its caches holds them.

    parts: of each cache its kind, visibility, dtypes, positions (int32, ascending, in the range)
    and arrays by layer, with a row for each of these positions. A decoded page has read-only views
    of the value it was decoded from.
    """

    start: int
    stop: int
    parts: tuple[Record, ...]

    @cached_property
    def layout(self) -> bytes:
        """Everything about the arrays but the number of tokens, as canonical JSON."""
        parts = [_described(part) for part in self.parts]
        return json.dumps(parts, separators=(",", ":"), sort_keys=True).encode()

    @cached_property
    def layout_digest(self) -> bytes:
        """SHA-256 of the layout."""
        return hashlib.sha256(self.layout).digest()

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(
            array.data.nbytes
            for part in self.parts
            for arrays in part.layers.values()
            for array in arrays
        )


def encode_page(page: Page, key: Key, parent: Key, seal: Seal | None = None) -> Item:
    """Return a page as an item for a store, whose buffers are views of its arrays.

    parent: key of the page before. seal: encrypts it, into buffers of its own.
    """
    label = Label(page.layout_digest, parent, page.start, page.stop)
    form = _PLAIN if seal is None else _SEALED
    header = _HEADER.pack(_MAGIC, _VERSION, form, len(page.layout))
    body = list(_body(page))
    if seal is not None:
        body = seal.encrypt(body, key, _bound(header, label))
    return Item(key, [header, *body], label)


def decode_page(
    hit: Hit,
    key: Key,
    *,
    seal: Seal | None = None,
    layout: bytes | None = None,
) -> Page:
    """Return the page in a value that a store gave for `key`.

    seal: the one it must be sealed with; None for a page that must not be sealed. layout: the
        digest that its layout must have; None for any.

    Raises: PageError for everything else.
    """
    value, label = hit.value, hit.label
    try:
        form, layout_nbytes = _read_header(value)
        body = value[_HEADER.size :]
        if (form == _SEALED) != (seal is not None):
            wanted, came = ("plain", "sealed") if seal is None else ("sealed", "plain")
            raise PageError(f"pages are {wanted} here; got one that is {came}")
        if seal is not None:
            body = seal.decrypt(body, key, _bound(bytes(value[: _HEADER.size]), label))
        return _decoded(body, layout_nbytes, label, layout)
    except schema.SchemaError as error:
        raise PageError(f"the page {key.hex()} is damaged: {error}") from error


def _read_header(value: memoryview) -> tuple[int, int]:
    """Return form and length of the layout."""
    if value.nbytes < _HEADER.size:
        raise PageError(f"a page has {_HEADER.size} bytes or more; got {value.nbytes}")
    magic, version, form, layout_nbytes = _HEADER.unpack_from(value)
    if magic != _MAGIC or version != _VERSION or form not in (_PLAIN, _SEALED):
        raise PageError(
            f"pages of version {_VERSION} are read; got {magic!r}, version {version}, form {form}"
        )
    return form, layout_nbytes


def is_page(value: memoryview, *, sealed: bool) -> bool:
    """Return whether a value says of itself that it is a page of this version, sealed or not."""
    beginning = _MAGIC + struct.pack("<HH", _VERSION, _SEALED if sealed else _PLAIN)
    return bytes(value[: len(beginning)]) == beginning


def _bound(header: bytes, label: Label) -> bytes:
    """Return the bytes that a seal authenticates without hiding them."""
    place = struct.pack("<II", label.start, label.stop)
    return header + label.layout + label.parent + place


# The layout.


def _described(part: Record) -> dict[str, object]:
    """Return the layout of a part; layers that are alike are described once."""
    return {
        "kind": part.kind,
        "visibility": list(part.visibility),
        "dtype": part.dtype if isinstance(part.dtype, str) else list(part.dtype),
        "layers": [
            {
                "numbers": numbers,
                "arrays": [
                    {
                        "name": form.name,
                        "axis": form.token_axis,
                        "dtype": form.dtype.name,
                        "sizes": list(form.sizes),
                    }
                    for form in forms
                ],
            }
            for forms, numbers in _groups_of(part).items()
        ],
    }


def _groups_of(part: Record) -> dict[tuple[ArrayForm, ...], list[int]]:
    """Return the numbers of layers by the form of their arrays, in the order of their bytes."""
    groups: dict[tuple[ArrayForm, ...], list[int]] = {}
    for number in sorted(part.layers):
        groups.setdefault(array_forms(part.layers[number]), []).append(number)
    return groups


class _Planned(NamedTuple):
    """An array of a page, before it is made."""

    part: int
    layer: int
    name: str
    axis: int | None
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _planned(layout: Layout, counts: Sequence[int]) -> Iterator[_Planned]:
    """Yield the arrays that a layout describes, in the order of their bytes.

    Raises: SchemaError for a layer that is there twice, an array of too many axes, or more arrays
        than any model has: a short layout can describe billions of them.
    """
    groups = [group for described in layout for group in described["layers"]]
    arrays = sum(len(group["numbers"]) * len(group["arrays"]) for group in groups)
    if arrays > _MAX_ARRAYS or not all(group["arrays"] for group in groups):
        raise schema.SchemaError(f"layers have 1 array or more, {_MAX_ARRAYS} in all; got {arrays}")
    for part, (described, tokens) in enumerate(zip(layout, counts, strict=True)):
        seen: set[int] = set()
        for group in described["layers"]:
            for layer in group["numbers"]:
                if layer in seen:
                    raise schema.SchemaError(f"layer {layer} is there twice")
                seen.add(layer)
                for array in group["arrays"]:
                    yield _planned_array(part, layer, array, tokens)


def _planned_array(part: int, layer: int, array: Described, tokens: int) -> _Planned:
    sizes, axis = list(array["sizes"]), array["axis"]
    axes = len(sizes) + (axis is not None)
    if axes > _MAX_AXES or (axis is not None and not -axes <= axis < axes):
        raise schema.SchemaError(f"{array['name']!r} has {axes} axes, its tokens on {axis}")
    if axis is not None:
        sizes.insert(axis % axes, tokens)
    dtype = HOST_DTYPES[array["dtype"]]
    return _Planned(part, layer, array["name"], axis, dtype, tuple(sizes))


# The bytes.


def _body(page: Page) -> Iterator[Buffer]:
    """Yield everything behind the header of a page."""
    counts = np.array([part.positions.size for part in page.parts], "<u4")
    positions = [np.asarray(part.positions, "<i4") for part in page.parts]
    head = b"".join([page.layout, counts.tobytes(), *(own.tobytes() for own in positions)])
    yield head
    offset = len(head)
    for part in page.parts:
        for numbers in _groups_of(part).values():
            for number in numbers:
                for array in part.layers[number]:
                    padding = _padding(offset)
                    data = tensor_bytes(array.data)
                    yield bytes(padding)
                    yield data
                    offset += padding + data.nbytes


def _padding(offset: int) -> int:
    """Return the bytes to the next multiple of the alignment, the header of the page included."""
    return -(offset + _HEADER.size) % _ALIGNMENT


def _decoded(body: memoryview, layout_nbytes: int, label: Label, expected: bytes | None) -> Page:
    """Return the page in everything behind its header.

    Raises: PageError, SchemaError.
    """
    if layout_nbytes > min(_MAX_LAYOUT_NBYTES, body.nbytes):
        raise PageError(f"the layout has {layout_nbytes} of {body.nbytes} bytes")
    text = bytes(body[:layout_nbytes])
    digest = hashlib.sha256(text).digest()
    if digest != label.layout or (expected is not None and digest != expected):
        wanted = label.layout if expected is None else expected
        raise PageError(f"the layout of the page is {wanted.hex()}; got {digest.hex()}")
    value = schema.parse_json(text)
    _LAYOUT(value, "the layout")
    layout = cast("Layout", value)
    positions, offset = _positions(body, layout_nbytes, len(layout))
    for number, own in enumerate(positions):
        _check_positions(own, label, layout[number]["kind"])
    planned = list(_planned(layout, [own.size for own in positions]))
    layers = _layers(body, offset, planned, len(layout))
    parts = (
        _record(described, own, rows)
        for described, own, rows in zip(layout, positions, layers, strict=True)
    )
    return Page(label.start, label.stop, tuple(parts))


def _record(described: Described, positions: Int32s, layers: LayerRows) -> Record:
    dtype = described["dtype"]
    return Record(
        described["kind"],
        tuple(described["visibility"]),
        dtype if isinstance(dtype, str) else tuple(dtype),
        positions,
        layers,
    )


def _positions(body: memoryview, offset: int, parts: int) -> tuple[list[Int32s], int]:
    """Return the positions of each part, and the offset behind them."""
    stop = offset + parts * _COUNT_NBYTES
    if stop > body.nbytes:
        raise PageError("the page ends in its counts")
    counts = np.frombuffer(body[offset:stop], "<u4").tolist()
    if stop + sum(counts) * _COUNT_NBYTES > body.nbytes:
        raise PageError(f"the page of {body.nbytes} bytes has no {sum(counts)} positions")
    positions = []
    for count in counts:
        begin, stop = stop, stop + count * _COUNT_NBYTES
        own: npt.NDArray[Any] = np.frombuffer(body[begin:stop], "<i4")
        positions.append(own.astype(np.int32))
    return positions, stop


def _check_positions(positions: Int32s, label: Label, kind: str) -> None:
    """Raise PageError unless positions ascend within the range of the page."""
    if not positions.size:
        return
    # Encoder output has a row for each frame, all at the position of their token.
    least = 0 if kind == "encoder" else 1
    ascending = bool((np.diff(positions.astype(np.int64)) >= least).all())
    if not (ascending and label.start <= positions[0] and positions[-1] < label.stop):
        raise PageError(
            f"positions of a page ascend within [{label.start}, {label.stop}); got {positions[0]} "
            f"to {positions[-1]}"
        )


def _layers(
    body: memoryview, offset: int, planned: Sequence[_Planned], parts: int
) -> list[LayerRows]:
    """Return the arrays of all parts, as views.

    Raises: PageError unless they take all bytes from `offset` on, exactly.
    """
    places, stop = [], offset
    for array in planned:
        begin = stop + _padding(stop)
        stop = begin + array.nbytes
        places.append((begin, stop))
    if stop != body.nbytes:
        raise PageError(f"the arrays of the page end at {stop} of {body.nbytes} bytes")
    layers: list[dict[int, list[NamedArray]]] = [{} for _ in range(parts)]
    for array, (begin, end) in zip(planned, places, strict=True):
        try:
            data = np.frombuffer(body[begin:end], array.dtype).reshape(array.shape)
        except ValueError as error:  # sizes that NumPy has no room for, times 0
            raise PageError(f"an array of the page has sizes {array.shape}") from error
        named = NamedArray(array.name, data, array.axis)
        layers[array.part].setdefault(array.layer, []).append(named)
    return [{layer: tuple(rows[layer]) for layer in sorted(rows)} for rows in layers]
