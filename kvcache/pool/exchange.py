"""Conversion of the buffers of a pool to the form of compiled programs, and back."""

from __future__ import annotations

from kvcache.backends import Array, Backend
from kvcache.backends.arrays import DType
from kvcache.errors import ShapeError

from .plan import PoolState


def to_traced(backend: Backend, layers: PoolState) -> dict[int, tuple[Array, ...]]:
    """Convert all buffers to the form carried by programs; consumes them."""
    return {
        layer: tuple(backend.traced_form(buffer) for buffer in buffers)
        for layer, buffers in layers.items()
    }


def from_traced(backend: Backend, state: PoolState, dtype: str) -> dict[int, tuple[Array, ...]]:
    """Undo :func:`to_traced`; consumes the buffers of `state`."""
    return {
        layer: tuple(backend.from_traced(buffer, dtype) for buffer in buffers)
        for layer, buffers in state.items()
    }


def check_same_form(exported: PoolState, given: PoolState) -> None:
    """Raise ShapeError unless `given` has the layers, shapes and dtypes of `exported`."""
    own, other = _form(exported), _form(given)
    if own != other:
        layers = sorted(layer for layer in {*own, *other} if own.get(layer) != other.get(layer))
        raise ShapeError(
            "a state to hand back has the layers, shapes and dtypes of the one that was "
            f"taken; layers {layers} differ."
        )


def _form(state: PoolState) -> dict[int, list[tuple[tuple[int, ...], DType]]]:
    return {
        layer: [(tuple(buffer.shape), buffer.dtype) for buffer in buffers]
        for layer, buffers in state.items()
    }
