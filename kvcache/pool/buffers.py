"""Buffers of a pool on the device, for every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TypeAlias

import numpy as np

from kvcache._types import Indices, Int32s
from kvcache.backends import Array, Backend, CacheConfig, HostArray, nbytes, transfer
from kvcache.backends.base import FastKey
from kvcache.errors import DTypeError, KVCacheError, ShapeError, SnapshotMismatchError
from kvcache.snapshots.rows import LayerRows
from kvcache.storage.arrays import NamedArray
from kvcache.storage.lengths import ceil_div, padded_index

from .exchange import check_same_form, from_traced, to_traced
from .plan import Pass, PoolState
from .rows import PendingWrites

Arrays: TypeAlias = tuple[Array, ...]
"""The arrays of one layer: keys and values, or keys alone."""
Likeness: TypeAlias = tuple[int, *tuple[FastKey, ...]]
"""Number of tokens in a pass, and a key of every array put in it."""
HOST_AXES = "htd"
"""Axes of rows in host memory, whatever the layout of the pool: kv_heads, tokens, head_dim."""


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


def kv_layouts(config: CacheConfig) -> tuple[ArrayLayout, ...]:
    """Return the layouts of keys and values."""
    return ArrayLayout("keys", config.key_layout), ArrayLayout("values", config.value_layout)


class PoolBuffers:
    """Buffers of `cells` cells for every layer, allocated by the first put of the layer.

    layouts: of the arrays of a layer. Layers may differ in heads and head_dim, and one may hold
        only the first of the arrays (keys only: latent attention, MLA). Layouts and arrays are
        therefore paired by ``zip(..., strict=False)``.

    Programs may hold the buffers for a time (:meth:`export_state`), and other threads may have
    queued rows (:meth:`enqueue_rows`). Every access settles both first.
    """

    def __init__(
        self, backend: Backend, layouts: Sequence[ArrayLayout], dtype: str, cells: int
    ) -> None:
        backend.dtype(dtype)  # raises if the backend lacks it
        self.backend = backend
        self.layouts = tuple(layouts)
        self._token_axes = [layout.token_axis for layout in self.layouts]
        self.dtype = dtype
        self.cells = cells
        self._buffers: dict[int, Arrays] = {}
        # What the last arrays of a layer were like: others like them need no checks.
        self._checked: dict[int, Likeness | None] = {}
        self._exported: PoolState | None = None
        self._pending = PendingWrites()

    def _settled(self) -> dict[int, Arrays]:
        """Return the buffers by layer, back from programs and with all pending rows written."""
        if self._exported is not None:
            self._take_back()
        if self._pending.queue:
            self._pending.drain(self._write_host_rows)
        return self._buffers

    # Programs.

    def export_state(self) -> PoolState:
        """Return all buffers by layer in the form for :mod:`kvcache.functional`."""
        # Exported twice without use in between, the state is the same: no conversion.
        if self._exported is None or self._pending.queue:
            self._exported = to_traced(self.backend, self._settled())
        return self._exported

    def import_state(self, state: PoolState) -> None:
        """Replace the buffers by those of `state`, derived by programs from exported ones.

        Raises: ShapeError if layers, shapes or dtypes differ; nothing has changed then.
        """
        # Pending rows stay in the queue: they belong in the buffers returned by the programs.
        check_same_form(self.export_state() if self._exported is None else self._exported, state)
        self._exported = dict(state)

    def _take_back(self) -> None:
        if self._exported is not None:
            self._buffers = from_traced(self.backend, self._exported, self.dtype)
            self._exported = None

    # Passes.

    def empty(self, layout: ArrayLayout, lead: tuple[int, ...] = ()) -> Array:
        """Return an array without tokens in `layout`, with the axes `lead` in front."""
        return self.backend.alloc([*lead, *layout.shape(1, 0, 1)], self.dtype)

    def allocate(self, layer: int, kv_heads: int, dims: Sequence[int]) -> None:
        """Allocate the buffers of a layer before its first put. dims: head_dim of each array."""
        pairs = list(zip(self.layouts, dims, strict=False))
        shapes = [layout.shape(kv_heads, 0, dim) for layout, dim in pairs]
        arrays = tuple(self.backend.alloc(shape, self.dtype) for shape in shapes)
        layers = self._settled()
        self._validate(layer, arrays, 0, layers.get(layer))
        if layer not in layers:
            layers[layer] = self._alloc_like(arrays)

    def put(self, layer: int, arrays: Arrays, forward_pass: Pass) -> None:
        """Store the tokens of a pass in its cells; raise before anything is written."""
        layers = self._settled()
        likeness = self._likeness(arrays, forward_pass.cells.size)
        if likeness is None or likeness != self._checked.get(layer):
            self._validate(layer, arrays, forward_pass.cells.size, layers.get(layer))
            if layer not in layers:
                layers[layer] = self._alloc_like(arrays)
            self._checked[layer] = likeness
        if forward_pass.stores:
            # Another thread may read rows of a snapshot: it must not find consumed buffers.
            with self._pending.lock:
                buffers = self._settled()[layer]
                # Not `self._settled()[layer] = ...`: that runs after the write, and rows queued
                # meanwhile would go to buffers that the write has consumed.
                self._buffers[layer] = self._written_pass(buffers, arrays, forward_pass)

    def _likeness(self, arrays: Arrays, tokens: int) -> Likeness | None:
        """Return what is checked of `arrays` in a form that is quick to compare, None if unfit."""
        try:
            return tokens, *map(self.backend.fast_key, arrays)
        except (AttributeError, TypeError):  # no arrays of this framework: the check names them
            return None

    def _written_pass(self, buffers: Arrays, arrays: Arrays, forward_pass: Pass) -> Arrays:
        """Write the tokens of a pass to its cells; consumes `buffers`, returns their successors."""
        cells, first = forward_pass.cells, forward_pass.first_cell
        axes = self._token_axes[: len(arrays)]
        if first is None:
            return self.backend.write_finite_rows(buffers, arrays, cells, axes)
        stop = first + cells.size
        return self.backend.write_finite_slices(buffers, arrays, first, stop, axes)

    def get(self, layer: int, forward_pass: Pass) -> Arrays:
        """Return the arrays of the range of the pass, as views where the framework has views.

        Raises: KVCacheError for a layer that was never put.
        """
        layers = self._settled()
        if layer not in layers:
            raise KVCacheError(f"layer {layer} was never put. Put it before you get it.")
        start, stop = forward_pass.start, forward_pass.stop
        if start == 0 and stop == self.cells:
            return layers[layer]
        read, buffers = self.backend.read_slice, layers[layer]
        return tuple(map(read, buffers, repeat(start), repeat(stop), self._token_axes))

    def range(self, start: int, stop: int, padding: int) -> tuple[int, int]:
        """Return a range to read around cells ``[start, stop)``, rounded for the backend."""
        start = start // padding * padding
        if self.backend.slices_are_views:
            return start, min(self.cells, ceil_div(stop, padding) * padding)
        # Each length compiles a program: powers of two only, or the whole pool beyond half of it.
        length = padding
        while length < stop - start:
            length *= 2
        if 2 * length > self.cells:
            return 0, self.cells
        start = min(start, self.cells - length)
        return start, start + length

    # Removal from the middle.

    def shifted_keys(self, cells: Int32s, shift: Callable[[int, Array], Array]) -> dict[int, Array]:
        """Return ``shift(layer, keys)`` of the keys in `cells`, by layer, without storing anything.

        Raises: DTypeError, ShapeError for a result unlike the keys.
        """
        axis = self.layouts[0].token_axis
        shifted = {}
        for layer, (keys, *_) in self._settled().items():
            rows = self.backend.gather(keys, cells, axis)
            shape, moved = tuple(rows.shape), shift(layer, rows)
            self._check_dtype("shifted keys", moved)
            if tuple(moved.shape) != shape:
                raise ShapeError(f"a shift keeps shapes; got {tuple(moved.shape)} for {shape}.")
            [shifted[layer]] = self.backend.replace_nonfinite((moved,), (axis,))
        return shifted

    def set_keys(self, cells: Int32s, shifted: dict[int, Array]) -> None:
        """Store the result of :meth:`shifted_keys`."""
        axis = self.layouts[0].token_axis
        for layer, rows in shifted.items():
            keys, *others = self._settled()[layer]
            self._buffers[layer] = self.backend.write_rows(keys, rows, cells, axis), *others

    # Copies.

    def to_backend(
        self, backend: Backend, layouts: Sequence[ArrayLayout], cells: int
    ) -> PoolBuffers:
        """Return copies of all layers on `backend`. cells: at least as many as here."""
        clone = PoolBuffers(backend, layouts, self.dtype, cells)
        for layer, buffers in self._settled().items():
            parts = zip(buffers, self.layouts, clone.layouts, strict=False)
            clone._buffers[layer] = tuple(
                clone._copied(transfer(buffer, self.backend, backend), old, new)
                for buffer, old, new in parts
            )
        return clone

    def _copied(self, rows: Array, old: ArrayLayout, new: ArrayLayout) -> Array:
        """Return a buffer in layout `new`, its first cells a copy of `rows` in layout `old`."""
        if new.axes != old.axes:  # on the host, which moves bits and never computes with them
            order = [old.axes.index(axis) for axis in new.axes]
            rows = self.backend.from_host(self.backend.to_host(rows).transpose(order))
        tokens = rows.shape[new.token_axis]
        buffer = self.backend.alloc(new.resized(rows, self.cells), self.dtype)
        buffer = self.backend.write_slice(buffer, rows, 0, tokens, new.token_axis)
        self.backend.sync(buffer)  # `rows` may share memory with the other pool, soon changed
        return buffer

    # Rows on the host.

    @property
    def token_bytes(self) -> int:
        """Bytes of one cell in all layers allocated."""
        layers = list(self._allocated().values())  # a list: a pass may add a layer meanwhile
        shapes = [tuple(buffer.shape) for buffers in layers for buffer in buffers]
        return sum(nbytes(shape, self.dtype) for shape in shapes) // self.cells

    def _allocated(self) -> PoolState:
        """Return the buffers by layer, exported or not, to look at their shapes only."""
        return self._exported if self._exported is not None else self._buffers

    def read(self, cells: Indices) -> LayerRows:
        """Return host copies of the content of `cells`; from any thread.

        Pending rows are overlaid on the copies, not written: a pass may be using the buffers,
        and on some backends (JAX) a write would consume them.
        """
        with self._pending.lock:
            self._take_back()
            rows: LayerRows = {
                layer: tuple(
                    NamedArray(layout.name, self._read_host_rows(buffer, layout, cells))
                    for layout, buffer in zip(self.layouts, buffers, strict=False)
                )
                for layer, buffers in self._buffers.items()
            }
            self._pending.overlay(rows, cells)
        return rows

    def _read_host_rows(self, buffer: Array, layout: ArrayLayout, cells: Indices) -> HostArray:
        """Return the rows in `cells` of one array, axes :data:`HOST_AXES`."""
        index = padded_index(self.backend, cells)
        rows = self.backend.to_host(self.backend.gather(buffer, index, layout.token_axis))
        order = [layout.axes.index(axis) for axis in HOST_AXES]
        return np.array(rows.transpose(order)[:, : cells.size], order="C")

    def check_rows(self, rows: LayerRows) -> None:
        """Raise SnapshotMismatchError unless `rows` fit every layer allocated."""
        host = ArrayLayout("", HOST_AXES)
        for layer, buffers in list(self._allocated().items()):
            pairs = zip(self.layouts, buffers, strict=False)
            own = [layout.sizes(buffer) for layout, buffer in pairs]
            given = [host.sizes(array.data) for array in rows.get(layer, ())]
            if own != given:
                raise SnapshotMismatchError(
                    "a snapshot goes back to layers of the same heads and head_dim; "
                    f"layer {layer} has {own}, got {given}."
                )

    def enqueue_rows(self, cells: Indices, rows: LayerRows) -> None:
        """Queue `rows` to be written to `cells` before the next access; from any thread."""
        self._pending.enqueue(cells, rows)

    def _write_host_rows(self, cells: Indices, rows: LayerRows) -> None:
        """Write queued rows, allocating layers not put yet; in the thread of the passes."""
        # Rows are padded like their index: the last one is written several times.
        index = padded_index(self.backend, cells).astype(np.int32)
        for layer, arrays in rows.items():
            pairs = list(zip(self.layouts, arrays, strict=False))
            if layer not in self._buffers:
                self._buffers[layer] = self._alloc_for(pairs)
            self._buffers[layer] = tuple(
                self._written(buffer, layout, array.pad(index.size).data, index)
                for buffer, (layout, array) in zip(self._buffers[layer], pairs, strict=True)
            )

    def _alloc_for(self, pairs: Sequence[tuple[ArrayLayout, NamedArray]]) -> Arrays:
        host = ArrayLayout("", HOST_AXES)
        sizes = [(layout, *host.sizes(array.data)) for layout, array in pairs]
        shapes = [layout.shape(heads, self.cells, dim) for layout, heads, dim in sizes]
        return tuple(self.backend.alloc(shape, self.dtype) for shape in shapes)

    def _written(self, buffer: Array, layout: ArrayLayout, rows: HostArray, cells: Int32s) -> Array:
        order = [HOST_AXES.index(axis) for axis in layout.axes]
        moved = self.backend.from_host(rows.transpose(order))
        return self.backend.write_rows(buffer, moved, cells, layout.token_axis)

    def free(self) -> None:
        """Free all memory, and drop pending rows."""
        for buffers in self._allocated().values():
            for buffer in buffers:
                self.backend.free(buffer)
        self._buffers, self._exported, self._checked = {}, None, {}
        self._pending.clear()

    # Checks.

    def _validate(self, layer: int, arrays: Arrays, tokens: int, buffers: Arrays | None) -> None:
        """Raise DTypeError or ShapeError unless `arrays` hold `tokens` tokens and fit `buffers`."""
        for layout, array in zip(self.layouts, arrays, strict=False):
            self._check_dtype(layout.name, array)
            _check_tokens(layout, array, tokens)
        if buffers is None:
            return
        if len(arrays) != len(buffers):
            raise ShapeError(f"layer {layer} has values in every pass or in none.")
        for layout, array, buffer in zip(self.layouts, arrays, buffers, strict=False):
            _check_heads(layout, array, buffer)

    def _check_dtype(self, name: str, array: Array) -> None:
        if not self.backend.owns(array) or self.backend.dtype_name(array) != self.dtype:
            raise DTypeError(
                f"{name} must be {self.dtype} arrays of {self.backend.spec}; got "
                f"{type(array).__name__} of {getattr(array, 'dtype', 'no dtype')}. Convert them."
            )

    def _alloc_like(self, arrays: Arrays) -> Arrays:
        pairs = zip(self.layouts, arrays, strict=False)
        shapes = [layout.resized(array, self.cells) for layout, array in pairs]
        return tuple(self.backend.alloc(shape, self.dtype) for shape in shapes)


def _check_tokens(layout: ArrayLayout, array: Array, tokens: int) -> None:
    shape = tuple(array.shape)
    if len(shape) != 3 or shape[layout.token_axis] != tokens:
        raise ShapeError(
            f"{layout.name} hold the {tokens} tokens of this pass in layout {layout.axes!r} "
            f"(h kv_heads, t tokens, d head_dim); got {shape}."
        )


def _check_heads(layout: ArrayLayout, array: Array, buffer: Array) -> None:
    expected, given = list(buffer.shape), list(array.shape)
    expected[layout.token_axis] = given[layout.token_axis]
    if expected != given:
        raise ShapeError(
            f"{layout.name} of a layer keep their heads and head_dim; got {given} for {expected}."
        )
