"""The device side of a pool of cells: keys and values of every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcache.backends import Backend, CacheConfig
from kvcache.backends.base import Array
from kvcache.batch import Int32s
from kvcache.errors import DTypeError, KVCacheError, ShapeError
from kvcache.plan import TOKEN_AXIS, ForwardPlan, Pass, PoolState, device_mask


class LayerBuffers:
    """Buffers of `size` cells for every layer that is put, allocated when it first is.

    Layers may differ in heads and head_dim; one may hold keys only (latent attention, MLA).
    """

    def __init__(self, backend: Backend, config: CacheConfig, dtype: str, size: int) -> None:
        backend.dtype(dtype)
        self.backend = backend
        self.config = config
        self.dtype = dtype
        self.size = size
        self._buffers: dict[int, tuple[Array, Array | None]] = {}
        self._lent: PoolState | None = None

    @property
    def _layers(self) -> dict[int, tuple[Array, Array | None]]:
        if self._lent is not None:
            self._buffers = {layer: self._recalled(held) for layer, held in self._lent.items()}
            self._lent = None
        return self._buffers

    def _recalled(self, held: tuple[Array, ...]) -> tuple[Array, Array | None]:
        keys, *values = (self.backend.from_traced(buffer, self.dtype) for buffer in held)
        return keys, values[0] if values else None

    def lend(self) -> PoolState:
        """All buffers, as :mod:`kvcache.functional` takes them."""
        if self._lent is None:
            self._lent = {
                layer: tuple(self.backend.traced_form(each) for each in pair if each is not None)
                for layer, pair in self._buffers.items()
            }
        return self._lent

    def take_back(self, state: PoolState) -> None:
        """Go on with the buffers of `state`, which programs made of what was lent.

        Raises: ShapeError where those are others; nothing has changed then.
        """
        have, got = _outline(self.lend()), _outline(state)
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
            device_mask(self.backend, self.config, visible),
            self._empty(self.config.key_layout, 1, 1, steps),
            self._empty(self.config.value_layout, 1, 1, steps),
        )

    def range(self, start: int, stop: int) -> tuple[int, int]:
        """The range to read for cells ``[start, stop)``, in lengths that the backend likes."""
        padding, size = self.config.padding, self.size
        start = start // padding * padding
        if self.backend.views:
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
            self._layers[layer] = self._alloc(keys, values)

    def _empty(self, layout: str, heads: int, dim: int, lead: tuple[int, ...] = ()) -> Array:
        """Keys or values of no token."""
        sizes = {"h": heads, "t": 0, "d": dim}
        return self.backend.alloc([*lead, *(sizes[axis] for axis in layout)], self.dtype)

    def put(self, layer: int, keys: Array, values: Array | None, which: Pass) -> None:
        """Store the tokens of a pass in its cells; raises before anything is written."""
        self._check(layer, keys, values, which.cells.size)
        if layer not in self._layers:
            self._layers[layer] = self._alloc(keys, values)
        if not which.stores:
            return
        key_buffer, value_buffer = self._layers[layer]
        key_buffer = self._write(key_buffer, keys, which, TOKEN_AXIS[self.config.key_layout])
        if values is not None:
            axis = TOKEN_AXIS[self.config.value_layout]
            value_buffer = self._write(value_buffer, values, which, axis)
        self._layers[layer] = key_buffer, value_buffer

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

    def free(self) -> None:
        """Give all memory back."""
        held: Any = self._lent or self._buffers
        for buffer in (each for pair in held.values() for each in pair if each is not None):
            self.backend.free(buffer)
        self._buffers, self._lent = {}, None

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
        if values is not None:
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
