"""Attention in programs of JAX."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax import lax

from ._jax_programs import program_options
from .arrays import NativeArray, NativeArrays
from .attention import AttentionHooks
from .blocks import (
    BlockReads,
    Blocks,
    Sums,
    add_block,
    begin_sums,
    end_sums,
    read_columns,
    visible_columns,
)
from .products import NEVER, ReadCosts, Result, Scoring, VisibleColumns
from .traced import TracedFunctions


class JaxAttention(AttentionHooks, TracedFunctions):
    """Attention in compiled programs."""

    read_costs = ReadCosts(shared=4096, run=NEVER)  # all cells of a read are copied as it is
    _copy_only: bool

    def attention_block(
        self,
        q: NativeArray,
        keys: NativeArray,
        values: NativeArray,
        scoring: Scoring,
        visible: VisibleColumns | None,
    ) -> Result:
        with _precision_for(q):
            return super().attention_block(q, keys, values, scoring, visible)

    def attention_in_blocks(
        self,
        q: NativeArray,
        buffers: NativeArrays,
        likes: NativeArrays,
        scoring: Scoring,
        reads: BlockReads,
    ) -> NativeArray:
        # A Python number is an argument of a program like an array: another one compiles nothing.
        form = scoring.scale, scoring.softcap, scoring.sinks
        attend = _program(type(self), self._copy_only)
        return attend(q, buffers, likes, form, reads)

    @classmethod
    def traced_attention(
        cls,
        q: NativeArray,
        buffers: NativeArrays,
        likes: NativeArrays,
        scoring: Scoring,
        reads: BlockReads,
    ) -> NativeArray:
        read = partial(read_columns, jnp, cls.traced_read_rows, buffers, likes)
        rows, sums = begin_sums(jnp, q, buffers, likes, scoring.scale, reads)
        for blocks in reads.blocks:
            used = jnp.any(blocks.last > blocks.first, axis=1)
            # Blocks of padding come last: loops end before them, so they cost nothing.
            count = jnp.max(jnp.where(used, jnp.arange(1, used.shape[0] + 1), 0))
            if blocks.last.shape[1] == 1:
                sums = _with_single_queries(read, rows, scoring.softcap, blocks, count, sums)
            else:
                add = partial(_with_block, read, rows, scoring.softcap, blocks)
                sums = lax.fori_loop(0, count, add, sums)
        return end_sums(jnp, sums, q, likes, scoring.sinks, reads)


def _precision_for(q: NativeArray) -> AbstractContextManager[None]:
    """Return a context in which products keep the precision of `q`.

    GPUs multiply float32 as TF32 otherwise; other floats lose nothing by that.
    """
    exact = q.dtype == jnp.float32
    return jax.default_matmul_precision("highest") if exact else nullcontext()


@cache
def _program(backend: type[JaxAttention], copy_only: bool) -> Callable[..., NativeArray]:
    """Return a program for :meth:`Backend.attention_in_blocks`."""

    def attend(
        q: NativeArray,
        buffers: NativeArrays,
        likes: NativeArrays,
        form: tuple[float, float | None, NativeArray | None],
        reads: BlockReads,
    ) -> NativeArray:
        with _precision_for(q):
            return backend.traced_attention(q, buffers, likes, Scoring(*form), reads)

    # All arithmetic is in float32. Of the small floats there are only copies and conversions.
    return jax.jit(attend, compiler_options=program_options(copy_only))


# A product by transposed keys would be a copy of them in a loop.
_dot_products = partial(jnp.einsum, "...rd,...cd->...rc")

_BYTES = 1 << 22
"""Most bytes of keys and values, as float32, that a round of a loop reads for single queries.

Fewer, and its calls are what it costs; more, and they leave the caches of a processor.
"""


def _with_block(
    read: Callable[[NativeArray], tuple[NativeArray, NativeArray]],
    rows: NativeArray,
    softcap: float | None,
    blocks: Blocks,
    number: NativeArray,
    sums: Sums,
) -> Sums:
    """Return the sums of all queries with one more block added."""
    start, cells, first, last = (array[number] for array in blocks)
    visible = visible_columns(jnp, jnp.arange(cells.shape[0]), first, last)
    own = lax.dynamic_slice_in_dim(rows, start, last.shape[0], axis=2)

    def add(sums: Sums) -> Sums:
        return add_block(jnp, sums, own, read(cells), visible, softcap, _dot_products)

    return _changed(sums, start, last.shape[0], add)


def _with_single_queries(
    read: Callable[[NativeArray], tuple[NativeArray, NativeArray]],
    rows: NativeArray,
    softcap: float | None,
    blocks: Blocks,
    count: NativeArray,
    sums: Sums,
) -> Sums:
    """Return the sums of all queries with `count` blocks of one query each added.

    Several blocks are one product, for calls cost as much as the product of one.
    """
    total, columns = blocks.cells.shape
    kv_heads, _, _, value_dim = sums.weighted.shape
    most = _BYTES // (4 * columns * kv_heads * (rows.shape[3] + value_dim))
    size = min(total, 1 << max(0, most.bit_length() - 1))  # both powers of two
    # From `sums`, so that they are divided over devices alike.
    none = Sums(*(jnp.zeros_like(array[:, None, :, :1]) for array in sums))
    none = none._replace(largest=none.largest - jnp.inf)

    def add(number: NativeArray, sums: Sums) -> Sums:
        take = partial(lax.dynamic_slice_in_dim, start_index=number * size, slice_size=size)
        starts, cells, first, last = map(take, blocks)
        visible = visible_columns(jnp, jnp.arange(columns), first, last)[:, None]
        keys, values = (
            array.reshape(kv_heads, size, columns, -1) for array in read(cells.reshape(-1))
        )
        own = jnp.moveaxis(jnp.take(rows, starts, axis=2), 2, 1)[:, :, :, None]
        parts = add_block(jnp, none, own, (keys, values), visible, softcap, _dot_products)
        left = jnp.minimum(size, count - number * size)
        joined: Sums = lax.fori_loop(0, left, partial(_joined, parts, starts), sums)
        return joined

    added: Sums = lax.fori_loop(0, -(-count // size), add, sums)
    return added


def _joined(parts: Sums, starts: NativeArray, number: NativeArray, sums: Sums) -> Sums:
    """Return the sums of all queries with those of block `number` added."""
    new = Sums(*(array[:, number] for array in parts))

    def add(own: Sums) -> Sums:
        largest = jnp.maximum(own.largest, new.largest)
        kept, added = jnp.exp(own.largest - largest), jnp.exp(new.largest - largest)
        total = own.total * kept + new.total * added
        return Sums(largest, total, own.weighted * kept + new.weighted * added)

    return _changed(sums, starts[number], 1, add)


def _changed(sums: Sums, start: NativeArray, count: int, change: Callable[[Sums], Sums]) -> Sums:
    """Return `sums` with those of `count` queries from `start` on replaced by the changed ones."""
    own = Sums(*(lax.dynamic_slice_in_dim(array, start, count, axis=2) for array in sums))
    write = partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=2)
    return Sums(*map(write, sums, change(own)))
