"""Conversion of the buffers of a pool to the form of compiled programs, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from kvcache.backends import Array, Backend
from kvcache.backends.arrays import DType
from kvcache.errors import ShapeError

from .layouts import Arrays
from .plan import PoolState

Form: TypeAlias = dict[int, list[tuple[tuple[int, ...], DType]]]
"""Shape and dtype of the arrays of every layer."""


def convert(layers: dict[int, Arrays], conversion: Callable[[Array], Array]) -> None:
    """Replace every buffer by its `conversion`, which may consume it.

    Each is replaced in the statement that converts it. If one fails, all are usable in one form or
    the other, and converting them again, in either direction, is right.
    """
    for layer in list(layers):
        for i, buffer in enumerate(layers[layer]):
            present = layers[layer]  # with the buffers converted so far
            layers[layer] = *present[:i], conversion(buffer), *present[i + 1 :]


def form_of(state: Mapping[int, Sequence[Array]]) -> Form:
    """Return the form of `state`."""
    return {
        layer: [(tuple(buffer.shape), buffer.dtype) for buffer in buffers]
        for layer, buffers in state.items()
    }


def traced_form_of(backend: Backend, layers: Mapping[int, Sequence[Array]], dtype: str) -> Form:
    """Return the form that `layers`, of `dtype`, would be exported in, without converting them."""
    traced = backend.traced_form(backend.alloc((1,), dtype)).dtype
    return {
        layer: [(tuple(buffer.shape), traced) for buffer in buffers]
        for layer, buffers in layers.items()
    }


def check_form(expected: Form, state: PoolState) -> None:
    """Raise ShapeError unless `state` has the layers, shapes and dtypes of `expected`."""
    given = form_of(state)
    if expected != given:
        layers = sorted(
            layer for layer in {*expected, *given} if expected.get(layer) != given.get(layer)
        )
        raise ShapeError(
            "a state to import has the layers, shapes and dtypes of the exported one; "
            f"layers {layers} differ."
        )
