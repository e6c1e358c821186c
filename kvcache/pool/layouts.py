"""Order of the axes of a layer's arrays, on the device and on the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from kvcache._checks import as_index, as_room, as_sizes
from kvcache.backends import Array, CacheConfig, HostArray
from kvcache.backends.arrays import Namespace
from kvcache.errors import NotSupportedError, ShapeError

Arrays: TypeAlias = tuple[Array, ...]
"""The arrays of one layer: keys and values, or keys alone."""


@dataclass(frozen=True)
class ArrayLayout:
    """Name of one array of a layer and the order of its axes: h kv_heads, t tokens, d head_dim."""

    name: str
    axes: str
    token_axis: int = field(init=False)

    def __post_init__(self) -> None:
        # Computed once: every put and get of every layer asks for it.
        object.__setattr__(self, "token_axis", self.axes.index("t"))

    def shape(self, heads: int, tokens: int, dim: int) -> tuple[int, ...]:
        """Return the shape of an array of these sizes in this layout."""
        sizes = {"h": heads, "t": tokens, "d": dim}
        return tuple(sizes[axis] for axis in self.axes)

    def resized(self, array: Array, tokens: int) -> tuple[int, ...]:
        """Return the shape of `array` with `tokens` tokens instead of its own."""
        shape = list(array.shape)
        shape[self.token_axis] = tokens
        return tuple(shape)

    def sizes(self, array: Array | HostArray) -> tuple[int, int]:
        """Return kv_heads and head_dim of `array`."""
        return array.shape[self.axes.index("h")], array.shape[self.axes.index("d")]

    def to_host_layout(self, array: HostArray, tokens: int | None = None) -> HostArray:
        """Return a copy of the first `tokens` tokens of `array` in :data:`HOST_LAYOUT`."""
        order = [self.axes.index(axis) for axis in HOST_LAYOUT.axes]
        return np.array(array.transpose(order)[:, :tokens], order="C")

    def from_host_layout(self, array: HostArray) -> HostArray:
        """Return `array` of :data:`HOST_LAYOUT` in this layout: a view."""
        return array.transpose([HOST_LAYOUT.axes.index(axis) for axis in self.axes])


def paged(xp: Namespace, buffer: Array, axis: int, page: int) -> Array:
    """Return a buffer in pages, the first axis: a view, where the framework has views.

    axis: of its cells. ``[pages, page, h, d]`` of a buffer ``[cells, h, d]``, and
    ``[pages, h, page, d]`` of one ``[h, cells, d]``.

    Raises: NotSupportedError for cells on the last axis, ShapeError for a page that does not
        divide them.
    """
    shape = tuple(buffer.shape)
    if axis == 2:
        raise NotSupportedError(
            "pages are views of a cache in layout 'thd' or 'htd'; this one has its tokens last."
        )
    if page < 1 or shape[axis] % page:
        raise ShapeError(f"a page divides the pool; got {page} for {shape[axis]} cells.")
    split = xp.reshape(buffer, (*shape[:axis], shape[axis] // page, page, *shape[axis + 1 :]))
    return xp.permute_dims(split, (1, 0, 2, 3)) if axis else split


HOST_LAYOUT = ArrayLayout("rows", "htd")
"""Layout of rows in host memory, whatever the layout of the pool."""


def kv_layouts(config: CacheConfig) -> tuple[ArrayLayout, ...]:
    """Return the layouts of keys and values."""
    return ArrayLayout("keys", config.key_layout), ArrayLayout("values", config.value_layout)


def layer_sizes(kv_heads: int, head_dim: int, value_dim: int | None) -> tuple[int, list[int]]:
    """Return kv_heads, and the head_dim of each array of a layer: of keys alone for value_dim 0.

    Raises: TypeError for what is no integer, ValueError for sizes below 1 or too large.
    """
    heads, width = as_sizes(kv_heads=kv_heads, head_dim=head_dim)
    values = width if value_dim is None else as_index(value_dim, "value_dim")
    if values < 0:
        raise ValueError(f"value_dim must be >= 0, 0 for keys only; got {values}.")
    dims = [as_room(width, "head_dim"), *([as_room(values, "value_dim")] if values else [])]
    return as_room(heads, "kv_heads"), dims
