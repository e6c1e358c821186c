"""The device side of a pool of cells: keys and values of every layer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcache._types import Indices, Int32s
from kvcache.backends import Array, Backend, CacheConfig, HostArray, nbytes, transfer
from kvcache.errors import DTypeError, KVCacheError, ShapeError, SnapshotMismatchError
from kvcache.snapshots.rows import LayerRows
from kvcache.storage.layout import TOKEN_AXIS
from kvcache.storage.masks import device_mask

from .plan import ForwardPlan, Pass, PoolState


class PoolBuffers:
    """Buffers of `size` cells for every layer that is put, allocated when it first is.

    LayerRows may differ in heads and head_dim; one may hold keys only (latent attention, MLA).
    """

    def __init__(self, backend: Backend, config: CacheConfig, dtype: str, size: int) -> None:
        backend.dtype(dtype)
        self.backend = backend
        self.config = config
        self.dtype = dtype
        self.size = size
        self._buffers: dict[int, tuple[Array, Array | None]] = {}
        self._lent: PoolState | None = None
        # TokenRows to be written before anything is read or written: threads other than that of the
        # passes may bring some, and must not touch the buffers.
        self._pending_writes: deque[tuple[Indices, LayerRows]] = deque()
        # Held while buffers are replaced, and by who reads rows of them in another thread.
        self._replacing = threading.RLock()

    @property
    def _layers(self) -> dict[int, tuple[Array, Array | None]]:
        self._recall()
        if self._pending_writes:
            self._write_pending()
        return self._buffers

    def _recall(self) -> None:
        if self._lent is not None:
            self._buffers = {layer: self._recalled(held) for layer, held in self._lent.items()}
            self._lent = None

    def _write_pending(self) -> None:
        with self._replacing:
            while self._pending_writes:
                self._write_rows(*self._pending_writes[0])
                self._pending_writes.popleft()  # after it is there: others wait for that

    def _recalled(self, held: tuple[Array, ...]) -> tuple[Array, Array | None]:
        keys, *values = (self.backend.from_traced(buffer, self.dtype) for buffer in held)
        return keys, values[0] if values else None

    def export_state(self) -> PoolState:
        """All buffers, as :mod:`kvcache.functional` takes them."""
        if self._lent is None or self._pending_writes:
            self._lent = {
                layer: tuple(self.backend.traced_form(each) for each in pair if each is not None)
                for layer, pair in self._layers.items()
            }
        return self._lent

    def import_state(self, state: PoolState) -> None:
        """Go on with the buffers of `state`, which programs made of what was lent.

        Raises: ShapeError where those are others; nothing has changed then.
        """
        # Not what arrived while programs ran: that is written to what they made.
        have, got = (
            _outline(self.export_state() if self._lent is None else self._lent),
            _outline(state),
        )
        if have != got:
            layers = sorted(layer for layer in {*have, *got} if have.get(layer) != got.get(layer))
            raise ShapeError(
                "a state to hand back has the layers, shapes and dtypes of the one that was "
                f"taken; layers {layers} differ."
            )
        self._lent = dict(state)

    def plan(
        self, cells: Int32s, start: int | list[int], visible: npt.NDArray[np.bool_]
    ) -> ForwardPlan:
        """A plan of one pass, or of several with one more axis in front of everything."""
        steps = cells.shape[:-1]
        return ForwardPlan(
            self.backend.from_host(cells),
            self.backend.traced_index(start),
            device_mask(self.backend, self.config.mask_dtype, visible),
            self._empty(self.config.key_layout, 1, 1, steps),
            self._empty(self.config.value_layout, 1, 1, steps),
        )

    def range(self, start: int, stop: int) -> tuple[int, int]:
        """The range to read for cells ``[start, stop)``, in lengths that the backend likes."""
        padding, size = self.config.padding, self.size
        start = start // padding * padding
        if self.backend.slices_are_views:
            return start, min(size, -(-stop // padding) * padding)
        # Each length is a program of its own: few of them, and soon the whole pool.
        length = padding
        while length < stop - start:
            length *= 2
        if 2 * length > size:
            return 0, size
        start = min(start, size - length)
        return start, start + length

    def allocate(self, layer: int, kv_heads: int, head_dim: int, value_dim: int) -> None:
        """Make the buffers that the first put of a layer would make; `value_dim` 0: keys only."""
        keys = self._empty(self.config.key_layout, kv_heads, head_dim)
        values = self._empty(self.config.value_layout, kv_heads, value_dim) if value_dim else None
        self._check(layer, keys, values, 0)
        if layer not in self._layers:
            self._buffers[layer] = self._alloc(keys, values)

    def _empty(self, layout: str, heads: int, dim: int, lead: tuple[int, ...] = ()) -> Array:
        """Keys or values of no token."""
        sizes = {"h": heads, "t": 0, "d": dim}
        return self.backend.alloc([*lead, *(sizes[axis] for axis in layout)], self.dtype)

    def put(self, layer: int, keys: Array, values: Array | None, which: Pass) -> None:
        """Store the tokens of a pass in its cells; raises before anything is written."""
        self._check(layer, keys, values, which.cells.size)
        if layer not in self._layers:
            self._buffers[layer] = self._alloc(keys, values)
        if which.stores:
            with self._replacing:
                self._store(layer, keys, values, which)

    def _store(self, layer: int, keys: Array, values: Array | None, which: Pass) -> None:
        key_buffer, value_buffer = self._layers[layer]
        key_buffer = self._write(key_buffer, keys, which, TOKEN_AXIS[self.config.key_layout])
        if values is not None and value_buffer is not None:
            axis = TOKEN_AXIS[self.config.value_layout]
            value_buffer = self._write(value_buffer, values, which, axis)
        # Not through `_layers`: what has arrived since would go to buffers that are consumed.
        self._buffers[layer] = key_buffer, value_buffer

    def get(self, layer: int, which: Pass) -> tuple[Array, Array | None]:
        """Keys and values of the pass's range."""
        if layer not in self._layers:
            raise KVCacheError(f"layer {layer} was never put. Put it before you get it.")
        keys, values = self._layers[layer]
        keys = self._read(keys, which, TOKEN_AXIS[self.config.key_layout])
        if values is not None:
            values = self._read(values, which, TOKEN_AXIS[self.config.value_layout])
        return keys, values

    def changed_keys(
        self, cells: Int32s, change: Callable[[int, Array], Array]
    ) -> dict[int, Array]:
        """``change(layer, keys)`` of the keys in `cells`, by layer, checked and not stored."""
        axis = TOKEN_AXIS[self.config.key_layout]
        changed = {}
        for layer, (keys, _) in self._layers.items():
            rows = self.backend.gather(keys, cells, axis)
            shape, found = tuple(rows.shape), change(layer, rows)
            self._check_dtype("shifted keys", found)
            if tuple(found.shape) != shape:
                raise ShapeError(f"a shift keeps shapes; got {tuple(found.shape)} for {shape}.")
            changed[layer] = found
        return changed

    def set_keys(self, cells: Int32s, changed: dict[int, Array]) -> None:
        """Store what :meth:`changed_keys` returned."""
        axis = TOKEN_AXIS[self.config.key_layout]
        for layer, rows in changed.items():
            keys, values = self._layers[layer]
            self._layers[layer] = self.backend.write_rows(keys, rows, cells, axis), values

    def to_backend(self, backend: Backend, config: CacheConfig, size: int) -> PoolBuffers:
        """Copies of all layers on `backend`, of `size` cells: no fewer than here."""
        there = PoolBuffers(backend, config, self.dtype, size)
        for layer in self._layers:
            there._buffers[layer] = there._layer_of(self, layer)
        return there

    def _layer_of(self, source: PoolBuffers, layer: int) -> tuple[Array, Array | None]:
        keys, values = source._layers[layer]
        old, new = source.config, self.config
        keys = self._copied(keys, source, old.key_layout, new.key_layout)
        if values is not None:
            values = self._copied(values, source, old.value_layout, new.value_layout)
        return keys, values

    def _copied(self, buffer: Array, source: PoolBuffers, old: str, new: str) -> Array:
        """A buffer of `source`, laid out as `old`, here as `new`; nobody reads its any more."""
        rows = transfer(buffer, source.backend, self.backend)
        if new != old:  # on the host, which moves bits and computes nothing
            axes = [old.index(name) for name in new]
            rows = self.backend.from_host(self.backend.to_host(rows).transpose(axes))
        whole = self._buffer(rows, new)
        whole = self.backend.write_slice(whole, rows, 0, source.size, TOKEN_AXIS[new])
        self.backend.sync(whole)
        return whole

    # TokenRows, in the layout of snapshots: kv_heads, tokens, head_dim.

    @property
    def token_bytes(self) -> int:
        """Bytes of one cell in all layers allocated."""
        held = self._lent if self._lent is not None else self._buffers
        pairs = list(held.values())  # at once, in case that a pass brings a layer
        shapes = [tuple(each.shape) for pair in pairs for each in pair if each is not None]
        return sum(nbytes(shape, self.dtype) for shape in shapes) // self.size

    def read(self, cells: Indices) -> LayerRows:
        """Copies of what is in `cells`, in host memory; from any thread.

        What has arrived is not written for it: a pass may be using the buffers, which on some
        backends are consumed then.
        """
        with self._replacing:
            self._recall()
            found = {layer: self._rows_of(*pair, cells) for layer, pair in self._buffers.items()}
            for places, layers in self._pending_writes:
                _overlay_pending(found, cells, places, layers)
        return found

    def _rows_of(
        self, keys: Array, values: Array | None, cells: Indices
    ) -> tuple[HostArray, HostArray | None]:
        host = self._read_rows(keys, self.config.key_layout, cells)
        if values is None:
            return host, None
        return host, self._read_rows(values, self.config.value_layout, cells)

    def _read_rows(self, buffer: Array, layout: str, cells: Indices) -> HostArray:
        rows = self.backend.gather(buffer, self._padded_cells(cells), TOKEN_AXIS[layout])
        axes = [layout.index(axis) for axis in "htd"]
        whole: HostArray = self.backend.to_host(rows).transpose(axes)[:, : cells.size]
        return np.array(whole, order="C")

    def _padded_cells(self, cells: Indices) -> Indices:
        """`cells`, the last repeated up to few lengths where each is a program of its own."""
        if self.backend.slices_are_views or not cells.size:
            return cells
        return np.pad(cells, (0, (1 << (cells.size - 1).bit_length()) - cells.size), "edge")

    def check_rows(self, layers: LayerRows) -> None:
        """Raise SnapshotMismatchError unless rows of `layers` fit all that is allocated."""
        held = self._lent if self._lent is not None else self._buffers
        for layer, buffers in list(held.items()):
            have = [self._form(*each) for each in zip(buffers, self._layouts, strict=False)]
            rows = layers.get(layer, ())
            got = [None if each is None else (each.shape[0], each.shape[2]) for each in rows]
            if [form for form in have if form] != [form for form in got if form]:
                raise SnapshotMismatchError(
                    "a snapshot goes back to layers of the same heads and head_dim; "
                    f"layer {layer} has {have}, got {got}."
                )

    def _form(self, buffer: Array | None, layout: str) -> tuple[int, int] | None:
        if buffer is None:
            return None
        return buffer.shape[layout.index("h")], buffer.shape[layout.index("d")]

    @property
    def _layouts(self) -> tuple[str, str]:
        return self.config.key_layout, self.config.value_layout

    def enqueue_rows(self, cells: Indices, layers: LayerRows) -> None:
        """Write `layers` to `cells` before anything is read; from any thread."""
        if layers:
            self._pending_writes.append((cells, layers))

    def _write_rows(self, cells: Indices, layers: LayerRows) -> None:
        places = self._padded_cells(cells).astype(np.int32)
        for layer, (keys, values) in layers.items():
            if layer not in self._buffers:
                self._buffers[layer] = self._alloc_for(keys, values)
            pair = self._buffers[layer]
            held = self._written(pair[0], keys, self.config.key_layout, places), pair[1]
            if values is not None and pair[1] is not None:
                layout = self.config.value_layout
                held = held[0], self._written(pair[1], values, layout, places)
            self._buffers[layer] = held

    def _alloc_for(self, keys: HostArray, values: HostArray | None) -> tuple[Array, Array | None]:
        layouts = self._layouts
        empty = self._empty(layouts[0], keys.shape[0], keys.shape[2])
        if values is None:
            return self._alloc(empty, None)
        return self._alloc(empty, self._empty(layouts[1], values.shape[0], values.shape[2]))

    def _written(self, buffer: Array, rows: HostArray, layout: str, cells: Int32s) -> Array:
        rows = np.pad(rows, ((0, 0), (0, cells.size - rows.shape[1]), (0, 0)), "edge")
        moved = self.backend.from_host(rows.transpose(["htd".index(axis) for axis in layout]))
        return self.backend.write_rows(buffer, moved, cells, TOKEN_AXIS[layout])

    def free(self) -> None:
        """Give all memory back."""
        held: Any = self._lent or self._buffers
        for buffer in (each for pair in held.values() for each in pair if each is not None):
            self.backend.free(buffer)
        self._buffers, self._lent = {}, None
        self._pending_writes.clear()

    def _check(self, layer: int, keys: Array, values: Array | None, tokens: int) -> None:
        self._check_dtype("keys", keys)
        _check_tokens("keys", keys, self.config.key_layout, tokens)
        if values is not None:
            self._check_dtype("values", values)
            _check_tokens("values", values, self.config.value_layout, tokens)
        if layer in self._layers:
            self._check_layer(layer, keys, values)

    def _check_dtype(self, name: str, array: Array) -> None:
        if not self.backend.owns(array) or self.backend.dtype_name(array) != self.dtype:
            raise DTypeError(
                f"{name} must be {self.dtype} arrays of {self.backend.spec}; got "
                f"{type(array).__name__} of {getattr(array, 'dtype', 'no dtype')}. Convert them."
            )

    def _check_layer(self, layer: int, keys: Array, values: Array | None) -> None:
        key_buffer, value_buffer = self._layers[layer]
        if (values is None) != (value_buffer is None):
            raise ShapeError(f"layer {layer} has values in every pass or in none.")
        _check_heads("keys", keys, key_buffer, self.config.key_layout)
        if values is not None and value_buffer is not None:
            _check_heads("values", values, value_buffer, self.config.value_layout)

    def _alloc(self, keys: Array, values: Array | None) -> tuple[Array, Array | None]:
        key_buffer = self._buffer(keys, self.config.key_layout)
        if values is None:
            return key_buffer, None
        return key_buffer, self._buffer(values, self.config.value_layout)

    def _buffer(self, array: Array, layout: str) -> Array:
        shape = list(array.shape)
        shape[TOKEN_AXIS[layout]] = self.size
        return self.backend.alloc(shape, self.dtype)

    def _write(self, buffer: Array, array: Array, which: Pass, axis: int) -> Array:
        if which.first_cell is None:
            return self.backend.write_rows(buffer, array, which.cells, axis)
        stop = which.first_cell + which.cells.size
        return self.backend.write_slice(buffer, array, which.first_cell, stop, axis)

    def _read(self, buffer: Array, which: Pass, axis: int) -> Array:
        if which.start == 0 and which.stop == self.size:
            return buffer
        return self.backend.read_slice(buffer, which.start, which.stop, axis)


def _outline(state: PoolState) -> dict[int, list[tuple[tuple[int, ...], Any]]]:
    return {
        layer: [(tuple(buffer.shape), buffer.dtype) for buffer in buffers]
        for layer, buffers in state.items()
    }


def _check_tokens(name: str, array: Array, layout: str, tokens: int) -> None:
    shape = tuple(array.shape)
    if len(shape) != 3 or shape[TOKEN_AXIS[layout]] != tokens:
        raise ShapeError(
            f"{name} hold the {tokens} tokens of this pass in layout {layout!r} "
            f"(h kv_heads, t tokens, d head_dim); got {shape}."
        )


def _check_heads(name: str, array: Array, buffer: Array, layout: str) -> None:
    have, got = list(buffer.shape), list(array.shape)
    have[TOKEN_AXIS[layout]] = got[TOKEN_AXIS[layout]]
    if have != got:
        raise ShapeError(f"{name} of a layer keep their heads and head_dim; got {got} for {have}.")


def _overlay_pending(found: LayerRows, cells: Indices, places: Indices, layers: LayerRows) -> None:
    """Put what has arrived for `places`, and is not written yet, over what was read of `cells`."""
    _, to, which = np.intersect1d(cells, places, return_indices=True)
    for layer, arrived in layers.items() if to.size else ():
        if layer not in found:  # nothing was put to it yet
            found[layer] = _zeros(arrived[0], cells.size), _zeros(arrived[1], cells.size)
        for rows, new in zip(found[layer], arrived, strict=True):
            if rows is not None and new is not None:
                rows[:, to] = new[:, which]


def _zeros(like: Any, tokens: int) -> Any:
    """TokenRows of 0 for so many tokens, of the heads and head_dim of `like`."""
    return None if like is None else np.zeros((like.shape[0], tokens, like.shape[2]), like.dtype)
