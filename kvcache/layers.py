"""The device side of a pool of cells: keys and values of every layer."""

from __future__ import annotations

from collections.abc import Callable

from kvcache.backends import Backend, CacheConfig
from kvcache.backends.base import Array
from kvcache.batch import Int32s
from kvcache.errors import DTypeError, KVCacheError, ShapeError
from kvcache.plan import TOKEN_AXIS, ForwardPlan


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
        self._layers: dict[int, tuple[Array, Array | None]] = {}

    def put(self, layer: int, keys: Array, values: Array | None, plan: ForwardPlan) -> None:
        """Store the tokens of a pass in the plan's cells; raises before anything is written."""
        self._check(layer, keys, values, plan.cells.size)
        if layer not in self._layers:
            self._layers[layer] = self._alloc(keys, values)
        if not plan.stores:
            return
        key_buffer, value_buffer = self._layers[layer]
        key_buffer = self._write(key_buffer, keys, plan, TOKEN_AXIS[self.config.key_layout])
        if values is not None:
            axis = TOKEN_AXIS[self.config.value_layout]
            value_buffer = self._write(value_buffer, values, plan, axis)
        self._layers[layer] = key_buffer, value_buffer

    def get(self, layer: int, plan: ForwardPlan) -> tuple[Array, Array | None]:
        """Keys and values of the plan's range."""
        if layer not in self._layers:
            raise KVCacheError(f"layer {layer} was never put. Put it before you get it.")
        keys, values = self._layers[layer]
        keys = self._read(keys, plan, TOKEN_AXIS[self.config.key_layout])
        if values is not None:
            values = self._read(values, plan, TOKEN_AXIS[self.config.value_layout])
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
        for buffers in self._layers.values():
            for buffer in buffers:
                if buffer is not None:
                    self.backend.free(buffer)
        self._layers.clear()

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

    def _write(self, buffer: Array, array: Array, plan: ForwardPlan, axis: int) -> Array:
        if plan.first_cell is None:
            return self.backend.write_rows(buffer, array, plan.cells, axis)
        stop = plan.first_cell + plan.cells.size
        return self.backend.write_slice(buffer, array, plan.first_cell, stop, axis)

    def _read(self, buffer: Array, plan: ForwardPlan, axis: int) -> Array:
        if plan.start == 0 and plan.stop == self.size:
            return buffer
        return self.backend.read_slice(buffer, plan.start, plan.stop, axis)


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
