"""Appending to a buffer inside of a program of the user, on JAX."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax import lax

from .arrays import NativeArray


@cache
def appender(axis: int) -> Callable[..., NativeArray]:
    """Return :meth:`Backend.traced_append` along `axis`, of rows in the dtype of the buffer."""

    def write(buffer: NativeArray, rows: NativeArray, start: NativeArray) -> NativeArray:
        count, slots = rows.shape[axis], buffer.shape[axis]
        if count > slots:
            return buffer
        # XLA moves a range beyond the end onto older tokens: these are written again then.
        present = lax.dynamic_slice_in_dim(buffer, start, count, axis)
        rows = jnp.where(start <= slots - count, rows, present)
        return lax.dynamic_update_slice_in_dim(buffer, rows, start, axis)

    def write_twice(buffer: NativeArray, rows: NativeArray, start: NativeArray) -> NativeArray:
        # A write of no rows, which XLA leaves out: inside of jax.shard_map it gives the buffer the
        # type of what is written, as a loop demands.
        nothing = lax.slice_in_dim(rows, 0, 0, axis=axis)
        buffer = lax.dynamic_update_slice_in_dim(buffer, nothing, start, axis)
        # XLA on CPU fuses a single write with the read that follows, and then copies the whole
        # buffer. It does not fuse a loop.
        return lax.fori_loop(0, 2, lambda _, out: write(out, rows, start), buffer)

    # Compiled, so that calls outside of a program need not trace it each time.
    return jax.jit(partial(lax.platform_dependent, cpu=write_twice, default=write), inline=True)
