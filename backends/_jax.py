"""JAX on CPU, GPU or TPU.

JAX arrays never change, so a cheap write is a compiled program that is given the old
buffer to reuse (donation). Each program here only moves data and is compiled once per
shape; positions are arguments, not constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from .base import FULL_SLICES, HOST_DTYPES, Array, Backend, CacheConfig, HostArray

# On CPU, XLA rewrites operations on these dtypes as float32 arithmetic, which turns the
# write of one token into a conversion of the whole buffer. A copy needs no arithmetic.
_COPY_ONLY = {
    "xla_disable_hlo_passes": ",".join(
        f"float-normalization-{dtype}" for dtype in ("bf16", "f8e4m3fn", "f8e5m2")
    )
}
# In a program of somebody else's, which computes too, that pass has to run. There such a buffer
# is carried as integers, which nothing rewrites.
_BITS = {"bfloat16": np.dtype("uint16")} | dict.fromkeys(
    ("float8_e4m3fn", "float8_e5m2"), np.dtype("uint8")
)


class JaxBackend(Backend):
    """Buffers are donated to each write: using an old one afterwards raises in JAX.

    A live NumPy or DLPack view of a buffer makes XLA copy it instead of reusing it: correct,
    but O(capacity). Take copies with :meth:`to_host`.
    """

    name: ClassVar[str] = "jax"
    modules: ClassVar[tuple[str, ...]] = ("jax", "jaxlib")
    # A slice is a copy and each new length a new program: caches hand out whole buffers.
    config: ClassVar[CacheConfig] = CacheConfig(padding=256)
    slices_are_views: ClassVar[bool] = False
    xp = jnp

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        usable = self.devices()
        if device and f"{device}:0" in usable:
            device = f"{device}:0"
        self.device = self._check_device(device, usable)
        platform, _, index = self.device.partition(":")
        self._device = jax.devices(platform)[int(index)]
        self._copy_only = platform == "cpu"

    @staticmethod
    def devices() -> list[str]:
        found = [f"{device.platform}:{device.id}" for device in jax.devices()]
        return found if jax.default_backend() == "cpu" else [*found, "cpu:0"]

    @staticmethod
    def device_of(array: Array) -> str:
        device = next(iter(array.devices()))
        return f"{device.platform}:{device.id}"

    def _framework_dtypes(self) -> dict[str, Any]:
        return HOST_DTYPES

    def fast_key(self, array: Array) -> tuple[Any, ...]:
        # The sharding knows the device; asking for the device takes twenty times as long.
        return type(array), array.shape, array.dtype, array.sharding

    def alloc(self, shape: Sequence[int], dtype: str) -> Array:
        return jnp.zeros(tuple(shape), self.dtype(dtype), device=self._device)

    def write_slice(self, buffer: Array, update: Array, start: int, stop: int, axis: int) -> Array:
        return _slice_writer(axis, self._copy_only)(buffer, update, np.int32(start))

    def write_rows(self, buffer: Array, rows: Array, index: HostArray, axis: int) -> Array:
        return _row_writer(axis, self._copy_only)(buffer, rows, index)

    def read_rows(self, buffer: Array, index: HostArray, axis: int) -> Array:
        return _row_reader(axis, self._copy_only)(buffer, index)

    def read_slice(self, buffer: Array, start: int, stop: int, axis: int) -> Array:
        return _slice_reader(axis, stop - start, self._copy_only)(buffer, np.int32(start))

    def concat(self, arrays: Sequence[Array], axis: int) -> Array:
        return _joiner(axis, self._copy_only)(*arrays)

    def free(self, buffer: Array) -> None:
        buffer.delete()

    def from_host(self, array: npt.ArrayLike, dtype: str | None = None) -> Array:
        # JAX may keep reading the array it is given, or adopt its memory: it gets one of its own.
        return jax.device_put(self._host(array, dtype).copy(), self._device)

    def to_host(self, array: Array) -> HostArray:
        return np.array(array)

    def import_dlpack(self, array: Any) -> Array:
        return array if isinstance(array, jax.Array) else jax.dlpack.from_dlpack(array)

    def compile(
        self, function: Callable[..., Any], donate: Sequence[int] = ()
    ) -> Callable[..., Any]:
        return jax.jit(function, donate_argnums=tuple(donate))

    def traced_form(self, buffer: Array) -> Array:
        bits = _BITS.get(buffer.dtype.name) if self._copy_only else None
        return _caster(bits)(buffer) if bits else buffer

    def from_traced(self, buffer: Array, dtype: str) -> Array:
        wanted = self.dtype(dtype)
        return buffer if buffer.dtype == wanted else _caster(wanted)(buffer)

    def traced_index(self, start: int | list[int]) -> Any:
        return np.asarray(start, np.int32)

    @classmethod
    def traced_write(cls, buffer: Array, rows: Array, index: Array, axis: int) -> Array:
        rows = _as_bits(rows, buffer)
        if rows.shape[axis] == 1:
            # XLA on CPU fuses a single write into the read behind it, and then has to copy the
            # whole buffer. Two writes are a loop to it, which it leaves alone.
            rows, index = jnp.repeat(rows, 2, axis), jnp.repeat(index, 2)
        return buffer.at[(*FULL_SLICES[axis], index)].set(rows, mode="drop")

    @classmethod
    def traced_append(cls, buffer: Array, rows: Array, start: Any, axis: int) -> Array:
        # One axis in front: with two, XLA on CPU copies the buffer of a batch of one.
        flat, news = (array.reshape(-1, *array.shape[axis:]) for array in (buffer, rows))
        index = start + jnp.arange(rows.shape[axis])
        return cls.traced_write(flat, news, index, 1).reshape(buffer.shape)

    @classmethod
    def traced_read(cls, buffer: Array, start: Any, length: int, axis: int, dtype: Any) -> Array:
        if length < buffer.shape[axis]:
            buffer = lax.dynamic_slice_in_dim(buffer, start, length, axis)
        return _as_bits(buffer, jnp.empty(0, dtype))

    @classmethod
    def traced_cond(
        cls,
        condition: Any,
        yes: Callable[..., Any],
        no: Callable[..., Any],
        *operands: Any,
    ) -> Any:
        return lax.cond(condition, yes, no, *operands)

    def sync(self, *arrays: Array) -> None:
        jax.block_until_ready(arrays)


def _as_bits(array: Array, like: Array) -> Array:
    """`array` in the dtype of `like`, which has as many bits."""
    return array if array.dtype == like.dtype else lax.bitcast_convert_type(array, like.dtype)


@cache
def _caster(dtype: Any) -> Callable[[Array], Array]:
    """Takes over a buffer and gives its bits another name."""
    return jax.jit(lambda buffer: lax.bitcast_convert_type(buffer, dtype), donate_argnums=0)


def _options(copy_only: bool) -> dict[str, Any] | None:
    return dict(_COPY_ONLY) if copy_only else None


@cache
def _slice_writer(axis: int, copy_only: bool) -> Callable[..., Array]:
    def write_slice(buffer: Array, update: Array, start: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(buffer, update, start, axis)

    return jax.jit(write_slice, donate_argnums=0, compiler_options=_options(copy_only))


@cache
def _row_writer(axis: int, copy_only: bool) -> Callable[..., Array]:
    def write_rows(buffer: Array, rows: Array, index: Array) -> Array:
        def write_row(i: Array, out: Array) -> Array:
            row = lax.dynamic_slice_in_dim(rows, i, 1, axis)
            return lax.dynamic_update_slice_in_dim(out, row, index[i], axis)

        return lax.fori_loop(0, index.shape[0], write_row, buffer)

    return jax.jit(write_rows, donate_argnums=0, compiler_options=_options(copy_only))


@cache
def _row_reader(axis: int, copy_only: bool) -> Callable[..., Array]:
    def read_rows(buffer: Array, index: Array) -> Array:
        return jnp.take(buffer, index, axis=axis, mode="clip")

    return jax.jit(read_rows, compiler_options=_options(copy_only))


@cache
def _slice_reader(axis: int, length: int, copy_only: bool) -> Callable[..., Array]:
    def read_slice(buffer: Array, start: Array) -> Array:
        return lax.dynamic_slice_in_dim(buffer, start, length, axis)

    return jax.jit(read_slice, compiler_options=_options(copy_only))


@cache
def _joiner(axis: int, copy_only: bool) -> Callable[..., Array]:
    def join(*arrays: Array) -> Array:
        return jnp.concatenate(arrays, axis=axis)

    return jax.jit(join, compiler_options=_options(copy_only))
