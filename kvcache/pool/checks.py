"""Checks of keys and values before they are put."""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.backends import Array, Backend
from kvcache.errors import DTypeError, ShapeError

from .layouts import ArrayLayout


def check_dtype(backend: Backend, dtype: str, name: str, array: Array) -> None:
    """Raise DTypeError unless `array`, called `name`, is of `backend` and has this dtype."""
    if not backend.owns(array) or backend.dtype_name(array) != dtype:
        raise DTypeError(
            f"{name} must be {dtype} arrays of {backend.spec}; got "
            f"{type(array).__name__} of {getattr(array, 'dtype', 'no dtype')}. Convert them."
        )


def check_tokens(layout: ArrayLayout, array: Array, tokens: int) -> None:
    """Raise ShapeError unless `array` has three axes and `tokens` tokens."""
    shape = tuple(array.shape)
    if len(shape) != 3 or shape[layout.token_axis] != tokens:
        raise ShapeError(
            f"{layout.name} hold the {tokens} tokens of this pass in layout {layout.axes!r} "
            f"(h kv_heads, t tokens, d head_dim); got {shape}."
        )


def check_heads(layout: ArrayLayout, shape: Sequence[int], buffer: Array) -> None:
    """Raise ShapeError unless `shape` is that of `buffer`, tokens aside."""
    expected, given = list(buffer.shape), list(shape)
    expected[layout.token_axis] = given[layout.token_axis]
    if expected != given:
        raise ShapeError(
            f"{layout.name} of a layer keep their heads and head_dim; got {given} for {expected}."
        )
