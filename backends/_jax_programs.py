"""The programs of JAX that move data, each compiled once per shape of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial, reduce
from itertools import repeat
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding

from .arrays import DType, Namespace, NativeArray, NativeArrays
from .indexing import Axes, axes_of
from .interrupts import keeping_result
from .nonfinite import finite_bits, replaced, substitutes
from .programs import P, R

# On CPU, XLA rewrites operations on these dtypes as float32 arithmetic, which turns the
# write of one token into a conversion of the whole buffer. A copy needs no arithmetic.
_COPY_ONLY = {
    "xla_disable_hlo_passes": ",".join(
        f"float-normalization-{dtype}" for dtype in ("bf16", "f8e4m3fn", "f8e5m2")
    )
}

# Rows written one after the other, which takes less time than the steps of a loop.
_FEW_ROWS = 16


def replace_nonfinite(arrays: NativeArrays, axis: Axes) -> NativeArrays:
    """Do :meth:`Backend.replace_nonfinite`, traced."""
    kind = arrays[0].dtype
    if not substitutes(kind.name, len(arrays)):
        return arrays
    # On bits, because XLA on CPU has no arithmetic of its own for the small float dtypes.
    bits = tuple(lax.bitcast_convert_type(array, f"uint{8 * kind.itemsize}") for array in arrays)
    finite, numbers = finite_bits(kind.name, len(arrays))
    return tuple(
        lax.bitcast_convert_type(array, kind)
        for array in replaced(cast(Namespace, jnp), bits, axis, numbers, finite)
    )


@lru_cache(maxsize=256)
def place_on(start: int, device: jax.Device | Sharding) -> NativeArray:
    """Return `start` as an argument of programs that is on the device already.

    The layers of a pass are written and read at the same places, and a call copies an argument of
    the host in half the time that all else of it takes.
    """
    return jax.device_put(np.int32(start), device)


def _donating(function: Callable[P, R], options: dict[str, str] | None = None) -> Callable[P, R]:
    """Return `function` compiled, with its first argument donated."""
    return keeping_result(jax.jit(function, donate_argnums=0, compiler_options=options))


def program_options(copy_only: bool) -> dict[str, str] | None:
    """Return options of the compiler for a program that only copies or converts small floats.

    copy_only: whether the device needs them.
    """
    return dict(_COPY_ONLY) if copy_only else None


@cache
def slice_writer(axis: int, copy_only: bool) -> Callable[..., NativeArray]:
    """Return a program for :meth:`Backend.write_slice`."""

    def write_slice(buffer: NativeArray, update: NativeArray, start: NativeArray) -> NativeArray:
        return lax.dynamic_update_slice_in_dim(buffer, update, start, axis)

    return _donating(write_slice, program_options(copy_only))


@cache
def slices_writer(axis: Axes, finite: bool, copy_only: bool) -> Callable[..., NativeArrays]:
    """Return a program to write all arrays of a layer. finite: with finite numbers only."""

    def write_slices(
        buffers: NativeArrays, updates: NativeArrays, start: NativeArray
    ) -> NativeArrays:
        if finite:
            updates = replace_nonfinite(updates, axis)
        write = lax.dynamic_update_slice_in_dim
        return tuple(map(write, buffers, updates, repeat(start), axes_of(buffers, axis)))

    return _donating(write_slices, program_options(copy_only))


@cache
def row_writer(axis: int, copy_only: bool) -> Callable[..., NativeArray]:
    """Return a program for :meth:`Backend.write_rows`."""
    return _donating(partial(_write_rows, axis=axis), program_options(copy_only))


@cache
def row_sets_writer(axis: Axes, finite: bool, copy_only: bool) -> Callable[..., NativeArrays]:
    """Return a program to write rows of all arrays of a layer. finite: as above."""

    def write_row_sets(
        buffers: NativeArrays, rows: NativeArrays, index: NativeArray
    ) -> NativeArrays:
        if finite:
            rows = replace_nonfinite(rows, axis)
        return tuple(map(_write_rows, buffers, rows, repeat(index), axes_of(buffers, axis)))

    return _donating(write_row_sets, program_options(copy_only))


def _write_rows(
    buffer: NativeArray, rows: NativeArray, index: NativeArray, axis: int
) -> NativeArray:
    def write_row(i: int | NativeArray, out: NativeArray) -> NativeArray:
        row = lax.dynamic_slice_in_dim(rows, i, 1, axis)
        return lax.dynamic_update_slice_in_dim(out, row, index[i], axis)

    count = index.shape[0]
    if count > _FEW_ROWS:
        return lax.fori_loop(0, count, write_row, buffer)
    return reduce(lambda out, i: write_row(i, out), range(count), buffer)


@cache
def replacer(axis: Axes, copy_only: bool) -> Callable[[NativeArrays], NativeArrays]:
    """Return a program for :meth:`Backend.replace_nonfinite`."""

    def replace(arrays: NativeArrays) -> NativeArrays:
        return replace_nonfinite(arrays, axis)

    return jax.jit(replace, compiler_options=program_options(copy_only))


@cache
def row_reader(axis: int, copy_only: bool) -> Callable[..., NativeArray]:
    """Return a program for :meth:`Backend.read_rows`."""

    def read_rows(buffer: NativeArray, index: NativeArray) -> NativeArray:
        return jnp.take(buffer, index, axis=axis, mode="clip")

    return jax.jit(read_rows, compiler_options=program_options(copy_only))


@cache
def slice_reader(axis: int, length: int, copy_only: bool) -> Callable[..., NativeArray]:
    """Return a program to read `length` rows from a start on."""

    def read_slice(buffer: NativeArray, start: NativeArray) -> NativeArray:
        return lax.dynamic_slice_in_dim(buffer, start, length, axis)

    return jax.jit(read_slice, compiler_options=program_options(copy_only))


@cache
def slices_reader(axis: Axes, length: int, copy_only: bool) -> Callable[..., NativeArrays]:
    """Return a program to do so in all arrays of a layer."""

    def read_slices(buffers: NativeArrays, start: NativeArray) -> NativeArrays:
        read = partial(lax.dynamic_slice_in_dim, slice_size=length)
        axes = axes_of(buffers, axis)
        pairs = zip(buffers, axes, strict=True)
        return tuple(read(buffer, start, axis=own) for buffer, own in pairs)

    return jax.jit(read_slices, compiler_options=program_options(copy_only))


@cache
def joiner(axis: int, copy_only: bool) -> Callable[..., NativeArray]:
    """Return a program for :meth:`Backend.concat`."""

    def join(*arrays: NativeArray) -> NativeArray:
        return jnp.concatenate(arrays, axis=axis)

    return jax.jit(join, compiler_options=program_options(copy_only))


@cache
def caster(dtype: DType) -> Callable[[NativeArrays], NativeArrays]:
    """Return a program to reinterpret donated buffers as `dtype`, of the same width."""

    def cast_all(buffers: NativeArrays) -> NativeArrays:
        return tuple(lax.bitcast_convert_type(buffer, dtype) for buffer in buffers)

    return _donating(cast_all)
