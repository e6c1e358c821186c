"""Checks of keys and values before they are put, and of queries before they attend."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvcache.backends import Array, Backend
from kvcache.errors import DTypeError, NotSupportedError, ShapeError
from kvcache.storage.admission import described, refuse_several_devices

from .layouts import ArrayLayout, Arrays


def check_dtype(backend: Backend, dtype: str, name: str, array: Array) -> None:
    """Raise DTypeError unless `array`, called `name`, is of `backend` and has this dtype."""
    owned = backend.owns(array)
    if not owned or backend.dtype_name(array) != dtype:
        refuse_several_devices(backend, array)
        raise DTypeError(
            f"{name} must be {dtype} arrays of {backend.spec}; got {described(array)}. "
            f"{'Cast it.' if owned else backend.moved_by}"
        )


def refuse_gradients(backend: Backend, name: str, array: Array) -> None:
    """Raise NotSupportedError if gradients are to flow to `array`."""
    if backend.requires_grad(array):
        raise NotSupportedError(
            f"gradients do not flow through a pool; {name} ask for them. Run the model without "
            "gradients, or let a program call kvcache.functional.put and get."
        )


def check_tokens(layout: ArrayLayout, array: Array, tokens: int) -> None:
    """Raise ShapeError unless `array` has three axes and `tokens` tokens."""
    shape = tuple(array.shape)
    if len(shape) != 3 or shape[layout.token_axis] != tokens:
        raise ShapeError(
            f"{layout.name} hold the {tokens} tokens of this pass in layout {layout.axes!r} "
            f"(h kv_heads, t tokens, d head_dim); got {shape}."
        )
    check_sizes_of(layout, shape)


def check_sizes_of(layout: ArrayLayout, shape: tuple[int, ...]) -> None:
    """Raise ShapeError unless heads and head_dim are at least 1."""
    if not all(shape[: layout.token_axis] + shape[layout.token_axis + 1 :]):
        raise ShapeError(
            f"{layout.name} have at least one head and one dimension; got {shape} in layout "
            f"{layout.axes!r}. A layer of keys only is put without values."
        )


def check_heads(layout: ArrayLayout, shape: Sequence[int], buffer: Array) -> None:
    """Raise ShapeError unless `shape` is that of `buffer`, tokens aside."""
    expected, given = list(buffer.shape), list(shape)
    expected[layout.token_axis] = given[layout.token_axis]
    if expected != given:
        raise ShapeError(
            f"{layout.name} of a layer keep their heads and head_dim; got {given} for {expected}."
        )


def check_arrays(
    backend: Backend, dtype: str, layouts: Sequence[ArrayLayout], arrays: Arrays, tokens: int
) -> None:
    """Raise DTypeError, ShapeError or NotSupportedError unless a pass can put `arrays`."""
    for layout, array in zip(layouts, arrays, strict=False):
        check_dtype(backend, dtype, layout.name, array)
        check_tokens(layout, array, tokens)
        refuse_gradients(backend, layout.name, array)


def check_fit(
    layouts: Sequence[ArrayLayout], layer: int, shapes: Sequence[Sequence[int]], buffers: Arrays
) -> None:
    """Raise ShapeError unless arrays of `shapes` have the sizes of `buffers`, those of a layer."""
    if len(shapes) != len(buffers):
        raise ShapeError(f"layer {layer} has values in every pass or in none.")
    for layout, shape, buffer in zip(layouts, shapes, buffers, strict=False):
        check_heads(layout, shape, buffer)


def check_query_sizes(queries: tuple[int, int], keys: tuple[int, int], value_heads: int) -> None:
    """Raise ShapeError unless queries can attend to keys. queries, keys: heads and head_dim."""
    (q_heads, dim), (kv_heads, head_dim) = queries, keys
    if value_heads != kv_heads:
        raise ShapeError(
            f"attention needs a value for each key; this layer has keys of {kv_heads} heads and "
            f"values of {value_heads}. Call get."
        )
    if dim != head_dim:
        raise ShapeError(f"queries have the head_dim of the keys, {head_dim}; got {dim}.")
    if not q_heads or q_heads % kv_heads:
        raise ShapeError(
            f"heads of queries are a multiple of the {kv_heads} kv_heads; got {q_heads}."
        )


def as_factors(
    head_dim: int, scale: float | None, softcap: float | None
) -> tuple[float, float | None]:
    """Return scale and soft cap of attention. Raises: ValueError, TypeError for other numbers."""
    factor = head_dim**-0.5 if scale is None else float(scale)
    if not math.isfinite(factor):
        raise ValueError(f"scale is a finite number; got {scale}.")
    cap = None if softcap is None else float(softcap)
    if cap is not None and not (cap > 0 and math.isfinite(cap)):
        raise ValueError(f"softcap is a finite number above 0, or None; got {softcap}.")
    return factor, cap


def check_sink_shape(shape: Sequence[int], q_heads: int) -> None:
    """Raise ShapeError unless an array of this shape has a sink for each query head."""
    if tuple(shape) != (q_heads,):
        raise ShapeError(f"sinks are one logit per query head, [{q_heads}]; got {tuple(shape)}.")
