"""Keys and values of one layer in two buffers that grow: ``[B, kv_heads, slots, head_dim]``.

This is the one place that checks what comes in, allocates, grows, and hands out views.
Which token lives in which slot is the business of the caches above.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

from kvcache.backends import (
    HOST_DTYPES,
    Array,
    Backend,
    HostArray,
    backend_of,
    get_backend,
    nbytes,
    transfer,
)
from kvcache.backends.arrays import NativeArray
from kvcache.errors import DTypeError, ShapeError
from kvcache.storage.layout import TOKENS


class Geometry(NamedTuple):
    """What all updates of one cache have in common."""

    batch: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str


class GrowingBuffers:
    """The buffers of one cache. Empty, and of no backend if none was named, until first used.

    step: capacities are multiples of it. limit: most slots ever needed, None for no limit.
    """

    def __init__(
        self, backend: str | Backend | None, dtype: str | None, step: int, limit: int | None = None
    ) -> None:
        self.step = operator.index(step)
        if step < 1:
            raise ValueError(f"step must be >= 1 token; got {step}.")
        if dtype is not None and dtype not in HOST_DTYPES:
            raise DTypeError(f"dtype is one of {', '.join(HOST_DTYPES)}; got {dtype!r}.")
        self.limit = limit
        self.dtype = dtype
        self.capacity = 0
        self.growths = 0
        self.keys: NativeArray = None
        self.values: NativeArray = None
        self._asked = None if backend is None else get_backend(backend)
        self.backend: Any = None
        self._unbind()

    def _unbind(self) -> None:
        """As constructed: whatever the first update was, the next one is the first."""
        self.backend = None
        self.geometry: Geometry | None = None
        self._padding = 1
        self._exact = False
        self._seen: tuple[Any, ...] | None = None
        if self._asked is not None:
            self._bind(self._asked)

    def _bind(self, backend: Backend) -> None:
        if self.dtype is not None:
            backend.dtype(self.dtype)
        self.backend = backend
        self._padding = backend.config.padding
        self._exact = backend.slices_are_views and self._padding == 1

    # What comes in.

    def validate(self, keys: Array, values: Array) -> int:
        """Check an update against everything before it; return its number of tokens.

        Raises ShapeError, DTypeError or UnknownBackendError, and has changed nothing then.
        """
        seen = None
        if self._seen is not None:
            try:  # noqa: SIM105 - a context manager costs more than the comparison
                seen = self.backend.fast_key(keys), self.backend.fast_key(values)
            except AttributeError:  # no array at all, which is found out below
                pass
        # An update that looks like the last one is as good as it: the usual decode step.
        if seen is None or seen != self._seen:
            self._validate_new(keys, values)
            self._seen = self.backend.fast_key(keys), self.backend.fast_key(values)
        tokens: int = self._seen[0][1][TOKENS]
        return tokens

    def _validate_new(self, keys: Array, values: Array) -> None:
        backend = self.backend or backend_of(keys)
        _check_framework(backend, keys, values)
        _check_shapes(tuple(keys.shape), tuple(values.shape))
        geometry = _geometry(backend, keys, values)
        if self.dtype is not None and geometry.dtype != self.dtype:
            raise DTypeError(
                f"this cache holds {self.dtype}; got {geometry.dtype}. Cast keys and values first."
            )
        if self.geometry is not None and geometry != self.geometry:
            _refuse_change(self.geometry, geometry)
        if self.backend is None:
            self._bind(backend)
        self.geometry = geometry

    # Room.

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare capacity included."""
        if self.geometry is None:
            return 0
        batch, heads, key_dim, value_dim, dtype = self.geometry
        return nbytes((batch, heads, self.capacity, key_dim + value_dim), dtype)

    def grow(self, slots: int) -> None:
        """Make room for `slots` slots, keeping what is held.

        Capacity grows by half at least, so that copying stays O(1) per token.
        """
        unit = math.lcm(self.step, self._padding)
        capacity = _round_up(max(slots, self.capacity * 3 // 2), unit)
        if self.limit is not None:
            capacity = min(capacity, self.padded(self.limit))
        # Both are allocated before either old one is given up: running out of memory loses nothing.
        try:
            keys, values = self._alloc(capacity)
        except BaseException:
            if not self.capacity:
                self._unbind()
            raise
        if self.capacity:
            self.growths += 1
            keys = self._move(self.keys, keys)
            values = self._move(self.values, values)
        self.keys, self.values, self.capacity = keys, values, capacity

    def _alloc(self, slots: int) -> tuple[Array, Array]:
        geometry: Any = self.geometry
        lead = geometry.batch, geometry.kv_heads, slots
        return (
            self.backend.alloc((*lead, geometry.key_dim), geometry.dtype),
            self.backend.alloc((*lead, geometry.value_dim), geometry.dtype),
        )

    def _move(self, old: Array, new: Array) -> Array:
        new = self.backend.write_slice(new, old, 0, self.capacity, TOKENS)
        self.backend.free(old)
        return new

    def free(self) -> None:
        """Give the memory back. The object is of no further use."""
        if self.capacity:
            self.backend.free(self.keys)
            self.backend.free(self.values)
        self.keys = self.values = None
        self.capacity = 0

    def export_state(self) -> tuple[Array, Array]:
        """The buffers, as compiled programs take them; :meth:`import_state` ends that."""
        return self.backend.traced_form(self.keys), self.backend.traced_form(self.values)

    def empty(self) -> Array:
        """An array of no elements, in the dtype held."""
        geometry: Any = self.geometry
        empty: Array = self.backend.alloc((0,), geometry.dtype)
        return empty

    def import_state(self, keys: Array, values: Array) -> None:
        """Go on with what programs made of the buffers that were lent.

        Raises: ShapeError where they are others; nothing has changed then.
        """
        for name, have, got in (("keys", self.keys, keys), ("values", self.values, values)):
            if tuple(have.shape) != tuple(got.shape):
                raise ShapeError(
                    f"what is given back has the shape of what was lent; got {name} of "
                    f"{tuple(got.shape)} for {tuple(have.shape)}."
                )
        dtype = self.geometry.dtype if self.geometry else ""
        self.keys = self.backend.from_traced(keys, dtype)
        self.values = self.backend.from_traced(values, dtype)

    # Slots.

    def write(self, keys: Array, values: Array, start: int, stop: int) -> None:
        """Write an admitted update to slots ``[start, stop)``, for which there is room."""
        write = self.backend.write_slice
        self.keys = write(self.keys, keys, start, stop, TOKENS)
        self.values = write(self.values, values, start, stop, TOKENS)

    def write_rows(self, keys: Array, values: Array, slots: HostArray) -> None:
        """Write one row to each of `slots`."""
        self.keys = self.backend.scatter(self.keys, keys, slots, TOKENS)
        self.values = self.backend.scatter(self.values, values, slots, TOKENS)

    def read_rows(self, slots: HostArray) -> tuple[Array, Array]:
        """Copies of the rows in `slots`."""
        return (
            self.backend.gather(self.keys, slots, TOKENS),
            self.backend.gather(self.values, slots, TOKENS),
        )

    def width(self, held: int) -> int:
        """Columns that :meth:`view` returns for `held` slots: all, where a slice is a copy."""
        if self.backend is not None and not self.backend.slices_are_views:
            return self.capacity
        return self.padded(held)

    def view(self, held: int) -> tuple[Array, Array]:
        """The first `held` slots, and no more than padding beyond where slices are free."""
        width = held if self._exact else self.width(held)
        if width == self.capacity:
            return self.keys, self.values
        read = self.backend.read_slice
        return read(self.keys, 0, width, TOKENS), read(self.values, 0, width, TOKENS)

    def padded(self, columns: int) -> int:
        """`columns` rounded up to the backend's padding."""
        return _round_up(columns, self._padding)

    def held_and_update(self, keys: Array, values: Array, held: int) -> tuple[Array, Array]:
        """Copies of the first `held` slots with an update, not written yet, behind them."""
        old_keys, old_values = self.view(held)
        return self._concat_padded(old_keys, keys), self._concat_padded(old_values, values)

    def _concat_padded(self, old: Array, new: Array) -> Array:
        lead, columns = old.shape[:TOKENS], old.shape[TOKENS] + new.shape[TOKENS]
        missing = self.padded(columns) - columns
        parts = [old, new]
        if missing:
            geometry: Any = self.geometry
            parts.append(self.backend.alloc((*lead, missing, old.shape[3]), geometry.dtype))
        joined: Array = self.backend.concat(parts, TOKENS)
        return joined

    def take_tokens(self, keys: Array, values: Array, rows: HostArray) -> tuple[Array, Array]:
        """Copies of some tokens of an update."""
        gather = self.backend.gather
        return gather(keys, rows, TOKENS), gather(values, rows, TOKENS)

    # Copies.

    def held_slice(self, held: int) -> tuple[Array, Array]:
        """The first `held` slots and at most padding beyond: a view where slices are free."""
        width = min(self.capacity, self.padded(held))
        read = self.backend.slice
        return read(self.keys, 0, width, TOKENS), read(self.values, 0, width, TOKENS)

    def to_host(self, held: int) -> tuple[HostArray, HostArray]:
        """NumPy copies of the first `held` slots."""
        keys, values = (self.backend.to_host(part)[:, :, :held] for part in self.held_slice(held))
        return keys, values

    def fill(self, keys: Array, values: Array) -> None:
        """Copy `keys` and `values` into the first slots of buffers never used before."""
        slots = self.validate(keys, values)
        self.grow(slots)
        self.write(keys, values, 0, slots)

    def fill_from(self, other: GrowingBuffers, held: int) -> None:
        """Copy the first `held` slots of `other`, on any backend, as :meth:`fill` does.

        Nobody reads the memory of `other` any more on return.
        """
        # In lengths that this backend likes, if that many are there: programs for few shapes.
        width = min(other.capacity, self.padded(held))
        parts = (self._first(part, other.backend, width) for part in (other.keys, other.values))
        self.fill(*parts)
        self.backend.sync(self.keys, self.values)

    def _first(self, buffer: Array, source: Backend, width: int) -> Array:
        """The first slots of a buffer of `source` here, if possible without copying any."""
        whole = transfer(buffer, source, self.backend)
        if whole.shape[TOKENS] == width:
            return whole
        first: Array = self.backend.read_slice(whole, 0, width, TOKENS)
        return first


def _check_framework(backend: Backend, keys: Array, values: Array) -> None:
    for name, array in (("keys", keys), ("values", values)):
        if not backend.owns(array):
            if not hasattr(array, "dtype"):
                backend_of(array)  # says what to bring instead of something that is no array
            raise DTypeError(
                f"{name} must be an array of {backend.spec}, where this cache lives; got "
                f"{type(array).__module__}.{type(array).__name__}"
                f"{' on ' + str(array.device) if hasattr(array, 'device') else ''}. "
                "Convert it with backend.from_dlpack, or through the host."
            )


def _check_shapes(keys: tuple[int, ...], values: tuple[int, ...]) -> None:
    if len(keys) != 4 or len(values) != 4:
        raise ShapeError(
            f"keys and values must be [B, kv_heads, tokens, head_dim]; got {keys} and {values}."
        )
    if keys[:3] != values[:3]:
        raise ShapeError(
            f"keys and values must agree in batch, kv_heads and tokens; got {keys} and {values}."
        )
    if not all(keys) or not all(values):
        raise ShapeError(f"an update has at least one token; got {keys} and {values}. Skip it.")


def _geometry(backend: Backend, keys: Array, values: Array) -> Geometry:
    dtype = backend.dtype_name(keys)
    if backend.dtype_name(values) != dtype:
        raise DTypeError(
            f"keys and values must have one dtype; got {dtype} and {backend.dtype_name(values)}."
        )
    batch, kv_heads, _, key_dim = keys.shape
    return Geometry(batch, kv_heads, key_dim, values.shape[3], dtype)


def _refuse_change(have: Geometry, got: Geometry) -> None:
    changed = [name for name in have._fields if getattr(have, name) != getattr(got, name)]
    kind = DTypeError if changed == ["dtype"] else ShapeError
    what = ", ".join(f"{n} {getattr(have, n)}, not {getattr(got, n)}" for n in changed)
    raise kind(f"every update of a cache has the same geometry: {what}. reset() starts anew.")


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
