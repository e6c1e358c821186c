"""States that no cache exported, and the rows of states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

import numpy as np

from kvcache._checks import as_room
from kvcache.backends import Array, Backend, backend_type, get_backend
from kvcache.errors import DTypeError, NotSupportedError, ShapeError
from kvcache.storage.layout import LAYER_AXIS

from .padding import as_padding, check_padding
from .state import BatchState, LayerState, RecurrentState, RingState, with_fields

NO_OWNER = -1
"""Number of states that no cache exported."""
EMPTY_SLOT = -1


def empty(
    shapes: Sequence[Sequence[SupportsIndex]],
    dtype: str,
    sharding: object | None = None,
    backend: str | Backend = "jax",
    *,
    layout: str = "bhtd",
    padding: Sequence[SupportsIndex] | Array | None = None,
) -> LayerState:
    """Return the state of a growing cache without tokens, made inside of a program or outside.

    shapes: of keys and of values, ``[B, kv_heads, slots, head_dim]`` each, or as `layout` says; the
        two head_dims may differ. slots: the most tokens that the state ever takes.
    sharding: on JAX, the NamedSharding of keys and values; see :func:`kvcache.get_backend`. All
        other arrays of the state are whole on every device.
    backend: name or :class:`~kvcache.Backend`; inside of ``torch.compile``, which cannot look a
        name up, the latter.
    layout: axes of keys and values, ``"bhtd"``, or ``"bthd"``: ``[B, slots, kv_heads, head_dim]``.
    padding: tokens that each row lacks on its left, see :meth:`KVCache.pad`: a list, or an int32
        array ``[B]`` of the framework, which may be traced.

    The state belongs to its program: no cache exported it, so none imports it.

    Raises: ShapeError, also for a batch or kv_heads that the sharding cannot divide; DTypeError;
        ValueError for another layout; as get_backend.
    """
    target = get_backend(backend, sharding=sharding)
    buffers = _buffers(target, shapes, dtype, layout)
    zero = target.traced_zeros((), "int32")
    return LayerState(
        keys=buffers.keys,
        values=buffers.values,
        # Arrays of their own: a program can be given the state to consume.
        offset=zero + 0,
        positions=target.traced_range(buffers.slots),
        likes=buffers.likes,
        owner=zero + NO_OWNER,
        written=zero + 0,
        padding=_padding(target, padding, buffers.batch),
    )


def empty_ring(
    shapes: Sequence[Sequence[SupportsIndex]],
    dtype: str,
    sharding: object | None = None,
    backend: str | Backend = "jax",
    *,
    sinks: SupportsIndex = 0,
    layout: str = "bhtd",
    padding: Sequence[SupportsIndex] | Array | None = None,
) -> RingState:
    """Return the state of a rotating cache without tokens: a query sees as many as it has slots.

    shapes: as for :func:`empty`. slots: `max_size` of a :class:`~kvcache.RotatingKVCache`, sinks
        included. sinks: first tokens that every query sees, its `keep`.
    padding: as for :func:`empty`, but not with sinks, for which rows need slots of their own.
    Others as for :func:`empty`.

    Raises: as :func:`empty`; ValueError for as many sinks as slots; NotSupportedError for padding
        with sinks.
    """
    target, keep = get_backend(backend, sharding=sharding), as_room(sinks, "sinks")
    if keep and padding is not None:
        raise NotSupportedError(
            f"rows with sinks are not padded without a cache; got {keep} sinks and padding. "
            "Export the state of a RotatingKVCache after its pad(padding)."
        )
    buffers = _buffers(target, shapes, dtype, layout)
    if keep >= buffers.slots:
        raise ValueError(
            f"sinks must be fewer than slots, so that a window is left; got {keep} sinks in "
            f"{buffers.slots} slots."
        )
    zero = target.traced_zeros((), "int32")
    return RingState(
        keys=buffers.keys,
        values=buffers.values,
        offset=zero + 0,
        positions=target.traced_zeros((buffers.slots,), "int32") + EMPTY_SLOT,
        likes=buffers.likes,
        owner=zero + NO_OWNER,
        slot=zero + 0,
        sinks=zero + keep,
        keep=zero + keep,
        window=zero + (buffers.slots - keep),
        size=zero + buffers.slots,
        padding=_padding(target, padding, buffers.batch),
    )


def empty_recurrent(
    arrays: Sequence[tuple[Sequence[SupportsIndex], str]],
    sharding: object | None = None,
    backend: str | Backend = "jax",
) -> RecurrentState:
    """Return the state of a recurrent layer before its first token: zeros.

    arrays: shape, batch first, and dtype of each array of the state.
    sharding, backend: as for :func:`empty`.

    Raises: ShapeError for a shape without a batch, or a size of 0; DTypeError; as get_backend.
    """
    target = get_backend(backend, sharding=sharding)
    zero = target.traced_zeros((), "int32")
    shapes = [tuple(as_room(size, "a size") for size in shape) for shape, _ in arrays]
    if not shapes or not all(shape and all(shape) for shape in shapes):
        raise ShapeError(
            "a recurrent state has one array or more, batch first, of sizes at least 1; got "
            f"{', '.join(map(str, shapes)) or 'none'}."
        )
    zeros = [
        target.from_traced(target.traced_zeros(shape, dtype, _STATE_AXES[: len(shape)]), dtype)
        for shape, (_, dtype) in zip(shapes, arrays, strict=True)
    ]
    return RecurrentState(tuple(zeros), zero + 0, zero + NO_OWNER)


_STATE_AXES = "bc"


class _Buffers(NamedTuple):
    keys: Array
    values: Array
    likes: tuple[Array, Array]
    batch: int
    slots: int


def _buffers(
    target: Backend, shapes: Sequence[Sequence[SupportsIndex]], dtype: str, layout: str
) -> _Buffers:
    """Return keys and values without tokens. Raises: as :func:`empty`."""
    if layout not in LAYER_AXIS:
        raise ValueError(f"layout must be {' or '.join(LAYER_AXIS)}; got {layout!r}.")
    axis = LAYER_AXIS[layout]
    key_shape, value_shape = _checked_shapes(shapes)
    target.dtype(dtype)  # raises if the backend lacks it
    like = tuple(0 if number == axis else 1 for number in range(len(layout)))
    return _Buffers(
        target.traced_zeros(key_shape, dtype, layout),
        target.traced_zeros(value_shape, dtype, layout),
        (target.alloc(like, dtype), target.alloc(like, dtype)),
        key_shape[0],
        key_shape[axis],
    )


def _checked_shapes(shapes: Sequence[Sequence[SupportsIndex]]) -> list[tuple[int, ...]]:
    """Return the shapes of keys and values as ints. Raises: ShapeError."""
    checked = [tuple(as_room(size, "a size") for size in shape) for shape in shapes]
    forms = {(len(shape), shape[:3], all(shape)) for shape in checked}
    if len(checked) != 2 or {(4, checked[0][:3], True)} != forms:
        raise ShapeError(
            "keys and values are [B, kv_heads, slots, head_dim], of one batch, kv_heads and slots, "
            f"each at least 1; got {', '.join(map(str, checked))}."
        )
    return checked


def _padding(target: Backend, padding: Sequence[SupportsIndex] | Array | None, batch: int) -> Array:
    """Return the padding of each row as it stands in a state. Raises: as :func:`empty`."""
    if padding is None:
        return target.traced_zeros((0,), "int32")
    if isinstance(padding, np.ndarray | Sequence):
        numbers = list(padding)
        declared = as_padding(numbers)
        check_padding(np.array(numbers), batch)
        return target.from_host(np.zeros(batch) if declared is None else declared, "int32")
    if tuple(padding.shape) != (batch,):
        raise ShapeError(f"padding has one number per row, {batch}; got {list(padding.shape)}.")
    if (dtype := target.dtype_name(padding)) != "int32":
        raise DTypeError(f"padding is int32; got {dtype}. Cast it.")
    return padding + 0  # a program consumes the state, and its caller may need its own array


def select(state: BatchState, rows: Array) -> BatchState:
    """Return `state` with the rows of the batch at `rows`, as :meth:`KVCache.select` does.

    rows: int32 ``[new B]``, an array of the framework, which may be traced: the beams that go on,
        say. One may occur more than once. They are not checked in a program.

    Copies the rows: a state cannot be reordered in place.

    Raises: while it is traced, ShapeError for another shape, DTypeError for another dtype.
    """
    if len(rows.shape) != 1 or not rows.shape[0]:
        raise ShapeError(f"rows have one axis, of one row or more; got {list(rows.shape)}.")
    if not str(rows.dtype).endswith(("int32", "int64")):
        raise DTypeError(f"rows are int32; got {rows.dtype}.")
    read = backend_type(rows).traced_read_rows

    def selected(array: Array) -> Array:
        return read(array, rows, 0, array.dtype)  # as it lies: a buffer may carry bits

    if isinstance(state, RecurrentState):
        arrays = tuple(map(selected, state.arrays))
        return with_fields(state, arrays=arrays)
    padding = selected(state.padding) if state.padding.shape[0] else state.padding
    keys, values = selected(state.keys), selected(state.values)
    return with_fields(state, keys=keys, values=values, padding=padding)
