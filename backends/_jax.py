"""JAX on CPU, GPU or TPU.

JAX arrays are immutable, so a cheap write is a compiled program with the old buffer donated for
reuse. Each such program only moves data and is compiled once per shape; positions are arguments,
not constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from kvcache.errors import UnknownBackendError

from ._jax_append import appender
from ._jax_attention import JaxAttention
from ._jax_programs import (
    caster,
    joiner,
    place_on,
    replace_nonfinite,
    replacer,
    row_reader,
    row_sets_writer,
    row_writer,
    slice_reader,
    slice_writer,
    slices_reader,
    slices_writer,
)
from .arguments import checked_device, refuse_traced
from .arrays import (
    DType,
    HostArray,
    Namespace,
    NativeArray,
    NativeArrays,
    RowIndex,
    TracedIndex,
)
from .base import Backend, FastKey, P, R
from .config import CacheConfig
from .dtypes import HOST_DTYPES
from .indexing import FULL_SLICES, Axes
from .interrupts import keeping_result
from .traced import Ts

# A program of the user also computes, and needs that pass. It carries such a buffer as integers,
# which no pass rewrites.
_BITS = {"bfloat16": np.dtype("uint16")} | dict.fromkeys(
    ("float8_e4m3fn", "float8_e5m2"), np.dtype("uint8")
)


class JaxBackend(JaxAttention, Backend):
    """Buffers are donated to each write: using an old one afterwards raises in JAX.

    A live NumPy or DLPack view of a buffer makes XLA copy it instead of reusing it: correct,
    but O(capacity). Take copies with :meth:`to_host`.
    """

    name: ClassVar[str] = "jax"
    modules: ClassVar[tuple[str, ...]] = ("jax", "jaxlib")
    # A slice is a copy, and each new length a new program: caches return whole buffers.
    config: ClassVar[CacheConfig] = CacheConfig(padding=256)
    slices_are_views: ClassVar[bool] = False
    xp = cast(Namespace, jnp)

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        usable = self.devices()
        if device and f"{device}:0" in usable:
            device = f"{device}:0"
        self.device = checked_device(self.name, device, usable)
        platform, _, index = self.device.partition(":")
        [self._device] = [
            device for device in jax.local_devices(backend=platform) if device.id == int(index)
        ]
        self._copy_only = platform == "cpu"

    @staticmethod
    def devices() -> list[str]:
        names = [f"{device.platform}:{device.id}" for device in jax.local_devices()]
        return names if jax.default_backend() == "cpu" else [*names, "cpu:0"]

    @staticmethod
    def device_of(array: NativeArray) -> str:
        if isinstance(array, jax.core.Tracer):
            refuse_traced(array)
        devices = array.devices()
        if len(devices) > 1:  # sharded, or a copy on each
            names = sorted(f"{device.platform}:{device.id}" for device in devices)
            raise UnknownBackendError(
                f"this cache is on one device; got an array on {', '.join(names)}. Make the cache "
                "with backend=kvcache.get_backend('jax', sharding=...), the NamedSharding of its "
                "keys, or put the array on one device."
            )
        [device] = devices
        return f"{device.platform}:{device.id}"

    def _framework_dtypes(self) -> dict[str, DType]:
        return HOST_DTYPES

    def fast_key(self, array: NativeArray) -> FastKey:
        # The sharding knows the device; asking for the device takes twenty times as long.
        return type(array), array.shape, array.dtype, array.sharding

    def alloc(self, shape: Sequence[int], dtype: str) -> NativeArray:
        return jnp.zeros(tuple(shape), self.dtype(dtype), device=self._device)

    def write_slice(
        self, buffer: NativeArray, update: NativeArray, start: int, stop: int, axis: int
    ) -> NativeArray:
        return slice_writer(axis, self._copy_only)(buffer, update, np.int32(start))

    def write_rows(
        self, buffer: NativeArray, rows: NativeArray, index: HostArray, axis: int
    ) -> NativeArray:
        return row_writer(axis, self._copy_only)(buffer, rows, index)

    def write_slices(
        self, buffers: NativeArrays, updates: NativeArrays, start: int, stop: int, axis: Axes
    ) -> NativeArrays:
        return slices_writer(axis, False, self._copy_only)(buffers, updates, np.int32(start))

    def write_row_sets(
        self, buffers: NativeArrays, rows: NativeArrays, index: HostArray, axis: Axes
    ) -> NativeArrays:
        return row_sets_writer(axis, False, self._copy_only)(buffers, rows, index)

    def replace_nonfinite(self, arrays: NativeArrays, axis: Axes) -> NativeArrays:
        return replacer(axis, self._copy_only)(arrays)

    # One program, because the dispatch of another would cost more than what it computes.

    def write_finite_slices(
        self, buffers: NativeArrays, updates: NativeArrays, start: int, stop: int, axis: Axes
    ) -> NativeArrays:
        place = place_on(start, self._device)
        return slices_writer(axis, True, self._copy_only)(buffers, updates, place)

    def row_index(self, index: HostArray) -> RowIndex:
        return jax.device_put(index, self._device)  # each call would copy an argument of the host

    def write_finite_row_sets(
        self, buffers: NativeArrays, rows: NativeArrays, index: RowIndex, axis: Axes
    ) -> NativeArrays:
        return row_sets_writer(axis, True, self._copy_only)(buffers, rows, index)

    def read_rows(self, buffer: NativeArray, index: HostArray, axis: int) -> NativeArray:
        return row_reader(axis, self._copy_only)(buffer, index)

    def read_slice(self, buffer: NativeArray, start: int, stop: int, axis: int) -> NativeArray:
        return slice_reader(axis, stop - start, self._copy_only)(buffer, np.int32(start))

    def read_slices(self, buffers: NativeArrays, start: int, stop: int, axis: Axes) -> NativeArrays:
        place = place_on(start, self._device)
        return slices_reader(axis, stop - start, self._copy_only)(buffers, place)

    def concat(self, arrays: Sequence[NativeArray], axis: int) -> NativeArray:
        return joiner(axis, self._copy_only)(*arrays)

    def owned(self, arrays: NativeArrays) -> NativeArrays:
        return arrays

    def free(self, buffer: NativeArray) -> None:
        buffer.delete()

    def from_host(self, array: npt.ArrayLike, dtype: str | None = None) -> NativeArray:
        # A copy first, because JAX may read its argument later, or adopt the memory for good.
        return jax.device_put(self._host(array, dtype).copy(), self._device)

    def to_host(self, array: NativeArray) -> HostArray:
        return np.array(array)

    @classmethod
    def whole_beside(cls, array: NativeArray) -> object | None:
        sharding = getattr(array, "sharding", None)
        if isinstance(sharding, NamedSharding) and len(sharding.device_set) > 1:
            return NamedSharding(sharding.mesh, PartitionSpec())
        return None

    @classmethod
    def is_traced(cls, array: NativeArray) -> bool:
        return isinstance(array, jax.core.Tracer)

    @classmethod
    def is_deleted(cls, array: NativeArray) -> bool:
        return isinstance(array, jax.Array) and array.is_deleted()

    def import_dlpack(self, array: object) -> NativeArray:
        imported = array if isinstance(array, jax.Array) else jax.dlpack.from_dlpack(array)
        return imported if self.owns(imported) else jax.device_put(imported, self._device)

    def compile(self, function: Callable[P, R], donate: Sequence[int] = ()) -> Callable[P, R]:
        compiled: Callable[P, R] = jax.jit(function, donate_argnums=tuple(donate))
        return keeping_result(compiled) if donate else compiled

    def traced_form(self, buffer: NativeArray) -> NativeArray:
        return self.traced_forms((buffer,))[0]

    def from_traced(self, buffer: NativeArray, dtype: str) -> NativeArray:
        return self.from_traced_forms((buffer,), dtype)[0]

    def traced_forms(self, buffers: NativeArrays) -> NativeArrays:
        bits = _BITS.get(buffers[0].dtype.name) if self._copy_only else None
        return caster(bits)(buffers) if bits else buffers

    def from_traced_forms(self, buffers: NativeArrays, dtype: str) -> NativeArrays:
        wanted = self.dtype(dtype)
        return buffers if buffers[0].dtype == wanted else caster(wanted)(buffers)

    def traced_index(self, start: int | list[int]) -> TracedIndex:
        return np.asarray(start, np.int32)

    def traced_zeros(self, shape: Sequence[int], dtype: str, axes: str = "") -> NativeArray:
        # Inside of a program an array is on no device yet.
        device = None if _in_program() else self._device
        return jnp.zeros(tuple(shape), self._traced_dtype(dtype), device=device)

    def _traced_dtype(self, dtype: str) -> DType:
        kind = self.dtype(dtype)
        return _BITS.get(dtype, kind) if self._copy_only else kind

    def traced_range(self, stop: int) -> NativeArray:
        return jnp.arange(stop, dtype=jnp.int32) if _in_program() else super().traced_range(stop)

    @classmethod
    def traced_replace_nonfinite(cls, arrays: NativeArrays, axis: Axes) -> NativeArrays:
        return replace_nonfinite(arrays, axis)

    @classmethod
    def traced_write(
        cls, buffer: NativeArray, rows: NativeArray, index: NativeArray, axis: int
    ) -> NativeArray:
        rows = _as_bits(rows, buffer)
        if rows.shape[axis] == 1:
            # XLA on CPU fuses a single write with the read that follows, and then copies the whole
            # buffer. Two writes become a loop, which it does not fuse.
            rows, index = jnp.repeat(rows, 2, axis), jnp.repeat(index, 2)
        # "drop" ignores positions beyond the end, as appends to a full cache have them.
        return buffer.at[(*FULL_SLICES[axis], index)].set(rows, mode="drop")

    @classmethod
    def traced_append(
        cls, buffer: NativeArray, rows: NativeArray, start: NativeArray, axis: int
    ) -> NativeArray:
        # Batch and heads stay two axes: merged into one they cannot be divided over devices, and
        # XLA would gather the whole buffer.
        return appender(axis)(buffer, _as_bits(rows, buffer), start)

    @classmethod
    def traced_read(
        cls, buffer: NativeArray, start: NativeArray, length: int, axis: int, dtype: DType
    ) -> NativeArray:
        if length < buffer.shape[axis]:
            buffer = lax.dynamic_slice_in_dim(buffer, start, length, axis)
        return _as_bits(buffer, jnp.empty(0, dtype))

    @classmethod
    def traced_read_rows(
        cls, buffer: NativeArray, index: NativeArray, axis: int, dtype: DType
    ) -> NativeArray:
        count = index.shape[0]
        if count == 1:
            # Like a single write in traced_write: XLA on CPU would fuse a single read with the
            # write that follows, and copy the whole buffer for it.
            index = jnp.repeat(index, 2)
        rows = jnp.take(buffer, index, axis=axis, mode="clip")
        rows = lax.slice_in_dim(rows, 0, count, axis=axis)
        return _as_bits(rows, jnp.empty(0, dtype))

    @classmethod
    def traced_cond(
        cls,
        condition: NativeArray,
        yes: Callable[[Unpack[Ts]], R],
        no: Callable[[Unpack[Ts]], R],
        *operands: *Ts,
    ) -> R:
        chosen: R = lax.cond(condition, yes, no, *operands)
        return chosen

    def sync(self, *arrays: NativeArray) -> None:
        jax.block_until_ready(arrays)


def _in_program() -> bool:
    """Return whether a transform is tracing what is called: every new array is a tracer then."""
    return isinstance(jnp.zeros(1), jax.core.Tracer)


def _as_bits(array: NativeArray, like: NativeArray) -> NativeArray:
    """Return `array` reinterpreted in the dtype of `like`, of the same width."""
    return array if array.dtype == like.dtype else lax.bitcast_convert_type(array, like.dtype)
