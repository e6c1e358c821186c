"""Attention in programs of JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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
from .products import (
    NEVER,
    ReadCosts,
    Result,
    Scoring,
    VisibleColumns,
    block_size,
    merged,
    product,
)
from .traced import TracedFunctions


class JaxAttention(AttentionHooks, TracedFunctions):
    """Attention in compiled programs."""

    read_costs = ReadCosts(shared=4096, run=NEVER)  # all cells of a read are copied as it is

    def attention(
        self,
        q: NativeArray,
        keys: NativeArray,
        values: NativeArray,
        scoring: Scoring,
        visible: VisibleColumns | None = None,
    ) -> Result:
        bounds = None if visible is None else (np.int32(visible.first), np.int32(visible.last))
        # A Python number is an argument of a program like an array: another one compiles nothing.
        form = scoring.scale, scoring.softcap, scoring.sinks
        others = None if values is keys else values
        result: Result = attend(q, keys, others, form, bounds, log_sum_exp=scoring.log_sum_exp)
        return result

    def merge_attention(
        self, parts: Sequence[tuple[NativeArray, NativeArray]], sinks: NativeArray | None = None
    ) -> NativeArray:
        return merge(tuple(parts), sinks)

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
            if blocks.last.shape[1] == 1:  # the first ones: nothing was added before
                sums = _of_single_queries(read, rows, scoring.softcap, blocks, used, count, sums)
            else:
                add = partial(_with_block, read, rows, scoring.softcap, blocks)
                sums = lax.fori_loop(0, count, add, sums)
        return end_sums(jnp, sums, q, likes, scoring.sinks, reads)


@partial(jax.jit, static_argnames="log_sum_exp")
def attend(
    q: NativeArray,
    keys: NativeArray,
    values: NativeArray | None,
    scoring: tuple[float, float | None, NativeArray | None],
    bounds: tuple[NativeArray, NativeArray] | None,
    log_sum_exp: bool,
) -> Result:
    """Compute attention, block after block. bounds: first and last column that a query sees."""
    # GPUs multiply float32 as TF32 otherwise; other floats lose nothing by that.
    if q.dtype == jnp.float32:
        with jax.default_matmul_precision("highest"):
            return _attend(q, keys, values, scoring, bounds, log_sum_exp)
    return _attend(q, keys, values, scoring, bounds, log_sum_exp)


def _attend(
    q: NativeArray,
    keys: NativeArray,
    values: NativeArray | None,
    scoring: tuple[float, float | None, NativeArray | None],
    bounds: tuple[NativeArray, NativeArray] | None,
    log_sum_exp: bool,
) -> Result:
    """Do :func:`attend` with products of the precision at hand."""
    form, columns = Scoring(*scoring, log_sum_exp), jnp.arange(keys.shape[1])
    values = keys if values is None else values

    def attend_block(block: tuple[NativeArray, tuple[NativeArray, NativeArray] | None]) -> Result:
        rows, own = block
        mask = None
        if own is not None:
            mask = (columns >= own[0][:, None]) & (columns < own[1][:, None])
        return product(jnp, rows, keys, values, form, mask)

    heads, tokens = q.shape[:2]
    size = block_size(heads, keys.shape[1])
    if tokens <= size:
        return attend_block((q, bounds))
    count = -(-tokens // size)
    # The last token again, up to a whole number of blocks.
    index = jnp.minimum(jnp.arange(count * size), tokens - 1).reshape(count, size)
    rows = jnp.moveaxis(q[:, index], 0, 1)
    results: Result = lax.map(
        attend_block, (rows, jax.tree.map(lambda bound: bound[index], bounds))
    )
    out, logarithm = results
    return _in_row(out, tokens), None if logarithm is None else _in_row(logarithm, tokens)


def _in_row(blocks: NativeArray, tokens: int) -> NativeArray:
    """Return ``[blocks, heads, tokens of a block, ...]`` as ``[heads, tokens, ...]``."""
    heads_first = jnp.moveaxis(blocks, 1, 0)
    heads = heads_first.shape[0]
    return heads_first.reshape(heads, -1, *blocks.shape[3:])[:, :tokens]


@jax.jit
def merge(
    parts: tuple[tuple[NativeArray, NativeArray], ...], sinks: NativeArray | None
) -> NativeArray:
    """Do :meth:`Backend.merge_attention`."""
    return merged(jnp, parts, sinks)


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
    take = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=last.shape[0], axis=2)
    own = Sums(*map(take, sums))
    new = add_block(jnp, own, take(rows), read(cells), visible, softcap, _dot_products)
    write = partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=2)
    return Sums(*map(write, sums, new))


def _of_single_queries(
    read: Callable[[NativeArray], tuple[NativeArray, NativeArray]],
    rows: NativeArray,
    softcap: float | None,
    blocks: Blocks,
    used: NativeArray,
    count: NativeArray,
    empty: Sums,
) -> Sums:
    """Return the sums of all queries over blocks of one query each.

    Several blocks are one product, and each keeps sums of its own up to the end: these are small,
    and running sums would cost as much per block as its product.

    used: which blocks are no padding. count: how many. empty: sums over no block.
    """
    kv_heads, group, queries, value_dim = empty.weighted.shape
    total, columns = blocks.cells.shape
    most = _BYTES // (4 * columns * kv_heads * (rows.shape[3] + value_dim))
    size = min(total, 1 << max(0, most.bit_length() - 1))  # both powers of two

    def add(number: NativeArray, parts: Sums) -> Sums:
        take = partial(lax.dynamic_slice_in_dim, start_index=number * size, slice_size=size)
        starts, cells, first, last = map(take, blocks)
        visible = visible_columns(jnp, jnp.arange(columns), first, last)[:, None]
        keys, values = (
            array.reshape(kv_heads, size, columns, -1) for array in read(cells.reshape(-1))
        )
        own = jnp.moveaxis(jnp.take(rows, starts, axis=2), 2, 1)[:, :, :, None]
        none = _no_sums((kv_heads, size, group, 1), value_dim)
        new = add_block(jnp, none, own, (keys, values), visible, softcap, _dot_products)
        write = partial(lax.dynamic_update_slice_in_dim, start_index=number * size, axis=0)
        return Sums(*map(write, parts, (jnp.moveaxis(array[:, :, :, 0], 1, 0) for array in new)))

    parts = _no_sums((total, kv_heads, group), value_dim)
    largest, sums, weighted = lax.fori_loop(0, -(-count // size), add, parts)
    # Padding belongs to a query that is not there: whatever its cells hold is added to nothing.
    segments = jnp.where(used, blocks.starts, queries)
    by_query = partial(jax.ops.segment_sum, segment_ids=segments, num_segments=queries)
    highest = jax.ops.segment_max(largest, segments, queries)
    scale = jnp.exp(largest - highest[segments])
    joined = highest, by_query(sums * scale), by_query(weighted * scale)
    return Sums(*(jnp.moveaxis(array, 0, 2) for array in joined))


def _no_sums(shape: tuple[int, ...], value_dim: int) -> Sums:
    """Return sums over no column; shape: theirs without the last axis."""
    total = jnp.zeros((*shape, 1))
    return Sums(total - jnp.inf, total, jnp.zeros((*shape, value_dim)))
