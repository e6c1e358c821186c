"""Attention in programs: queries meet keys of a pool block by block, with running sums.

The shapes of a program are fixed when it is compiled, and the lengths of sequences are not. So the
cells that the tokens of a pass see come as blocks of one size. A program knows only how many there
may be; those of padding come last, and a loop need not reach them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeAlias

from array_api_compat import device

from .arrays import Arrays, DType, Namespace, NativeArray
from .indexing import FULL_SLICES
from .products import SCORES, Dot, Scoring, wide

ReadRows: TypeAlias = Callable[[NativeArray, NativeArray, int, DType], NativeArray]
"""That of a backend for programs: :meth:`TracedFunctions.traced_read_rows`."""


class Blocks(NamedTuple):
    """Products of equal size: of some queries and some columns each; a pytree.

    Queries are counted in the order of :class:`BlockReads`.
    """

    starts: NativeArray
    """int32 [blocks]: place of the first query."""
    cells: NativeArray
    """int32 [blocks, columns]."""
    first: NativeArray
    """int32 [blocks, queries]: first column that each query sees."""
    last: NativeArray
    """int32 [blocks, queries]: the column behind the last one. In padding no query sees any."""


class BlockReads(NamedTuple):
    """Everything that the tokens of a pass see, for a program; a pytree."""

    order: NativeArray
    """int32: batch index of each query. Longer than the pass, so that no block ends beyond it."""
    inverse: NativeArray
    """int32 [tokens]: place of each token of the batch in that order."""
    blocks: tuple[Blocks, ...]
    """For each number of queries per block that occurs."""


class Sums(NamedTuple):
    """Softmax of each query over the columns met so far, float32 ``[kv_heads, group, queries, n]``.

    largest: the largest score; -inf before any. total: sum of ``exp(score - largest)``.
    weighted: the sum of the values, weighted by these; n is value_dim, and 1 for the others.
    """

    largest: NativeArray
    total: NativeArray
    weighted: NativeArray


def read_columns(
    xp: Namespace,
    read_rows: ReadRows,
    buffers: Arrays,
    likes: Arrays,
    cells: NativeArray,
) -> tuple[NativeArray, NativeArray]:
    """Return keys and values of `cells`; the same twice for a layer of keys only.

    likes: an empty array like each of `buffers`.
    """
    taken: list[NativeArray] = []
    for buffer, like in zip(buffers, likes, strict=False):
        axis = token_axis(like)
        rows = read_rows(buffer, cells, axis, like.dtype)
        taken.append(heads_first(xp, rows, axis))
    return taken[0], taken[-1]


def token_axis(like: NativeArray) -> int:
    """Return the token axis of `like`, an empty array: the one axis of length 0."""
    return int(list(like.shape).index(0))


def dim_axis(like: NativeArray) -> int:
    """Return the axis of head_dim of `like`: the last one that is not that of tokens."""
    return 1 if token_axis(like) == 2 else 2


def heads_first(xp: Namespace, rows: NativeArray, axis: int) -> NativeArray:
    """Return `rows`, with their tokens on `axis`, as ``[heads, tokens, dim]``, or these as rows."""
    if axis == 1:
        return rows
    return xp.permute_dims(rows, (1, 0, 2) if axis == 0 else (0, 2, 1))


def _sizes(buffers: Arrays, likes: Arrays) -> tuple[int, int]:
    """Return kv_heads and value_dim of a layer."""
    last, axis = buffers[-1], token_axis(likes[len(buffers) - 1])
    heads, dim = (size for i, size in enumerate(last.shape) if i != axis)
    return heads, dim


def begin_sums(
    xp: Namespace,
    q: NativeArray,
    buffers: Arrays,
    likes: Arrays,
    scale: float,
    reads: BlockReads,
) -> tuple[NativeArray, Sums]:
    """Return scaled queries in order, ``[kv_heads, group, queries, head_dim]``, and their sums.

    q: in the layout of the keys. Other arguments as for :func:`read_columns`.
    """
    kv_heads, value_dim = _sizes(buffers, likes)
    rows = xp.take(heads_first(xp, q, token_axis(likes[0])), reads.order, axis=1)
    q_heads, _, dim = rows.shape
    rows = xp.reshape(wide(xp, rows) * scale, (kv_heads, q_heads // kv_heads, -1, dim))
    total = xp.zeros_like(rows[:, :, :, :1])
    weighted = xp.broadcast_to(total, (*total.shape[:3], value_dim)) + 0.0  # a copy
    return rows, Sums(total - math.inf, total, weighted)


def add_block(
    xp: Namespace,
    sums: Sums,
    rows: NativeArray,
    columns: tuple[NativeArray, NativeArray],
    visible: NativeArray,
    softcap: float | None,
    dot: Dot | None = None,
) -> Sums:
    """Return the sums of some queries with more columns added.

    columns: their keys and values. visible: bool ``[queries, columns]``, True = attend. dot: as for
    :func:`product`; with it, `rows` and `columns` may have more axes in front of group and columns.
    """
    keys, values = (wide(xp, array) for array in columns)
    *several, group, queries, dim = rows.shape
    flat = xp.reshape(rows, (*several, group * queries, dim))
    scores = xp.matmul(flat, xp.permute_dims(keys, (0, 2, 1))) if dot is None else dot(flat, keys)
    scores = xp.reshape(scores, (*several, group, queries, -1))
    if softcap is not None:
        scores = xp.tanh(scores / softcap) * softcap
    scores = xp.where(visible, scores, -math.inf)
    largest: NativeArray = xp.maximum(sums.largest, xp.max(scores, axis=-1, keepdims=True))
    finite = xp.where(largest == -math.inf, 0.0, largest)  # -inf - -inf would be NaN
    weights, kept = xp.exp(scores - finite), xp.exp(sums.largest - finite)
    total = sums.total * kept + xp.sum(weights, axis=-1, keepdims=True)
    added = xp.matmul(xp.reshape(weights, (*several, group * queries, -1)), values)
    weighted = sums.weighted * kept + xp.reshape(added, (*several, group, queries, -1))
    return Sums(largest, total, weighted)


def visible_columns(
    xp: Namespace, numbers: NativeArray, first: NativeArray, last: NativeArray
) -> NativeArray:
    """Return the columns that queries see, of those numbered: bool ``[..., queries, columns]``."""
    return (numbers >= xp.expand_dims(first, axis=-1)) & (numbers < xp.expand_dims(last, axis=-1))


def end_sums(
    xp: Namespace,
    sums: Sums,
    q: NativeArray,
    likes: Arrays,
    sinks: NativeArray | None,
    reads: BlockReads,
) -> NativeArray:
    """Return attention in the dtype and layout of `q`, in the order of its tokens."""
    largest, total, weighted = sums
    kv_heads, group, _, value_dim = weighted.shape
    if sinks is not None:
        logits = xp.reshape(wide(xp, sinks), (kv_heads, group, 1, 1))
        highest = xp.maximum(largest, logits)
        kept = xp.exp(largest - highest)
        total, weighted = total * kept + xp.exp(logits - highest), weighted * kept
    out: NativeArray = weighted / xp.where(total == 0, 1.0, total)
    out = xp.reshape(out, (kv_heads * group, -1, value_dim))
    out = heads_first(xp, xp.take(out, reads.inverse, axis=1), token_axis(likes[0]))
    return out if out.dtype == q.dtype else xp.astype(out, q.dtype)


def attend_eagerly(
    xp: Namespace,
    read_rows: ReadRows,
    q: NativeArray,
    buffers: Arrays,
    likes: Arrays,
    scoring: Scoring,
    reads: BlockReads,
) -> NativeArray:
    """Do :meth:`TracedFunctions.traced_attention`, looking at the values of `reads`."""
    rows, sums = begin_sums(xp, q, buffers, likes, scoring.scale, reads)
    heads = rows.shape[0] * rows.shape[1]
    read = partial(_read_run_or_rows, xp, read_rows)
    for blocks in reads.blocks:
        queries, columns = blocks.last.shape[1], blocks.cells.shape[1]
        numbers = xp.arange(columns, dtype=blocks.cells.dtype, device=device(q))
        most = max(1, SCORES // (heads * queries * columns))
        for start, left, right in _joined(xp, blocks, most):
            first, last = blocks.first[left:right, :], blocks.last[left:right, :]
            used = (right - left - 1) * columns + int(xp.max(last[-1, :]))
            by_block = visible_columns(xp, numbers, first, last)
            visible = xp.reshape(xp.permute_dims(by_block, (1, 0, 2)), (queries, -1))
            place = slice(None), slice(None), slice(start, start + queries), slice(None)
            own = Sums(*(array[place] for array in sums))
            cells = xp.reshape(blocks.cells[left:right, :], (-1,))[:used]
            columns_read = read_columns(xp, read, buffers, likes, cells)
            seen = visible[:, :used]
            new = add_block(xp, own, rows[place], columns_read, seen, scoring.softcap)
            for array, part in zip(sums, new, strict=True):
                array[place] = part
    return end_sums(xp, sums, q, likes, scoring.sinks, reads)


def _read_run_or_rows(
    xp: Namespace,
    read_rows: ReadRows,
    buffer: NativeArray,
    cells: NativeArray,
    axis: int,
    dtype: DType,
) -> NativeArray:
    """Return the rows of `cells`: where these lie in a row a view, which costs nothing."""
    first, count = int(cells[0]), cells.shape[0]
    if int(cells[-1]) - first == count - 1 and bool(xp.all(cells[1:] - cells[:-1] == 1)):
        return buffer[(*FULL_SLICES[axis], slice(first, first + count), ...)]
    return read_rows(buffer, cells, axis, dtype)


def _joined(xp: Namespace, blocks: Blocks, most: int) -> Iterator[tuple[int, int, int]]:
    """Yield blocks ``[left, right)`` of the same queries, at most so many, with their start."""
    used = xp.any(blocks.last > blocks.first, axis=1)
    count = max((i + 1 for i in range(used.shape[0]) if used[i]), default=0)
    starts = [int(blocks.starts[i]) for i in range(count)]
    left = 0
    for right in range(1, len(starts) + 1):
        ends = right == len(starts) or starts[right] != starts[left]
        if ends or right - left == most:
            yield starts[left], left, right
            left = right
