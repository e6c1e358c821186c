"""Attention of the queries of a pass: the reads of its plan, carried out on the buffers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcache._locks import Lock
from kvcache._types import Int32s
from kvcache.backends import Array, Backend
from kvcache.backends.attention import RowCopier, joined
from kvcache.backends.products import Result, Scoring
from kvcache.errors import DTypeError, ShapeError
from kvcache.storage.admission import described, refuse_several_devices
from kvcache.storage.lengths import padded_index

from .blocks import block_reads
from .buffers import PoolBuffers
from .checks import as_factors, check_dtype, check_query_sizes, check_sink_shape, refuse_gradients
from .layouts import ArrayLayout, Arrays
from .plan import Pass, PassBlocks
from .reads import Read, Reads, Segment, plan_reads

_NAME = "queries"
_OF_QUERIES = ("float32", "float16", "bfloat16")
"""Dtypes that queries may have over keys of float8, in which nobody computes them."""


def as_scoring(
    buffers: PoolBuffers,
    layer: int,
    q: Array,
    tokens: int,
    scale: float | None,
    softcap: float | None,
    sinks: Array | None,
) -> Scoring:
    """Return the checked arguments of attention of `q` over a layer.

    q: queries of the `tokens` of a pass, in the layout of the keys.

    Raises: ShapeError, DTypeError, ValueError, TypeError; NotSupportedError for queries that ask
        for gradients, KVCacheError for a layer that was never put.
    """
    backend, layouts = buffers.backend, buffers.layouts
    _check_queries(backend, layouts, q, buffers.whole(layer), buffers.dtype, tokens)
    q_heads, head_dim = layouts[0].sizes(q)
    factors = as_factors(head_dim, scale, softcap)
    if sinks is not None:
        _check_sinks(backend, sinks, q_heads)
    return Scoring(*factors, sinks)


def _check_queries(
    backend: Backend,
    layouts: Sequence[ArrayLayout],
    q: Array,
    buffers: Arrays,
    dtype: str,
    tokens: int,
) -> None:
    """Raise DTypeError, ShapeError or NotSupportedError unless `q` can attend to a layer.

    layouts, buffers: of the arrays of the layer. dtype: of the cache.
    """
    layout, keys = layouts[0], buffers[0]
    if dtype.startswith("float8") and backend.owns(q) and backend.dtype_name(q) in _OF_QUERIES:
        dtype = backend.dtype_name(q)
    check_dtype(backend, dtype, _NAME, q)
    if not dtype.startswith(("float", "bfloat")):
        raise DTypeError(f"attention is computed on floats; this cache holds {dtype}. Call get.")
    refuse_gradients(backend, _NAME, q)
    shape = tuple(q.shape)
    if len(shape) != 3 or shape[layout.token_axis] != tokens:
        raise ShapeError(
            f"{_NAME} are of the {tokens} tokens of this pass in layout {layout.axes!r} "
            f"(h q_heads, t tokens, d head_dim); got {shape}."
        )
    value_heads = layouts[len(buffers) - 1].sizes(buffers[-1])[0]
    check_query_sizes(layout.sizes(q), layout.sizes(keys), value_heads)


def _check_sinks(backend: Backend, sinks: Array, q_heads: int) -> None:
    if not backend.owns(sinks) or backend.dtype_name(sinks) not in _OF_QUERIES:
        refuse_several_devices(backend, sinks)
        raise DTypeError(
            f"sinks must be float arrays of {backend.spec}; got {described(sinks)}. "
            f"{backend.moved_by}"
        )
    check_sink_shape(sinks.shape, q_heads)


def attend(
    buffers: PoolBuffers, layer: int, q: Array, forward_pass: Pass, scoring: Scoring, lock: Lock
) -> Array:
    """Return attention of checked queries over what a pass sees, in the layout of the keys.

    The keys of a layer without values serve as values. lock: of the cache.
    """
    backend, layout = buffers.backend, buffers.layouts[0]
    reads = forward_pass.reads
    if reads is None:
        with lock:  # other threads may change sequences, and so the table, during a pass
            reads = forward_pass.reads = plan_reads(forward_pass, backend.read_costs)
    if not backend.slices_are_views:
        if forward_pass.blocks is None:
            forward_pass.blocks = _pass_blocks(buffers, reads, forward_pass.cells.size)
        return _attend_in_blocks(buffers, layer, q, forward_pass.blocks, scoring)
    copiers = forward_pass.copiers
    try:  # another thread may attend in another layer
        copier = copiers.pop()
    except IndexError:
        copier = backend.row_copier()
    source = _Source(backend, buffers.layouts, buffers.whole(layer), copier)
    rows = _permuted(backend, q, layout.axes, "htd")
    if reads.order is not None:
        rows = backend.read_rows(rows, reads.order, 1)
    outputs = [_segment(source, rows, segment, scoring) for segment in reads.segments]
    copiers.append(copier)
    out = outputs[0] if len(outputs) == 1 else backend.concat(outputs, 1)
    if reads.inverse is not None:
        out = backend.read_rows(out, reads.inverse, 1)
    return _permuted(backend, out, "htd", layout.axes)


def _pass_blocks(buffers: PoolBuffers, reads: Reads, tokens: int) -> PassBlocks:
    backend = buffers.backend
    rows = padded_index(backend, np.arange(tokens)).astype(np.int32)
    blocks = block_reads([reads], tokens, rows.size, lambda array: backend.from_host(array[0]))
    return PassBlocks(rows, blocks, tuple(map(buffers.empty, buffers.layouts)))


def _attend_in_blocks(
    buffers: PoolBuffers, layer: int, q: Array, blocks: PassBlocks, scoring: Scoring
) -> Array:
    """Do :func:`attend` by one program.

    Where a slice is a copy, and each length another program, reading piece after piece is slow.
    """
    backend, axis = buffers.backend, buffers.layouts[0].token_axis
    tokens, arrays = q.shape[axis], buffers.whole(layer)
    padded = blocks.rows.size > tokens
    rows = backend.read_rows(q, blocks.rows, axis) if padded else q
    out = backend.attention_in_blocks(rows, arrays, blocks.likes, scoring, blocks.reads)
    return backend.read_slice(out, 0, tokens, axis) if padded else out


class _Source:
    """The arrays of a layer, of which keys and values are taken for one read after the other."""

    def __init__(
        self,
        backend: Backend,
        layouts: Sequence[ArrayLayout],
        buffers: Arrays,
        copier: RowCopier,
    ) -> None:
        self.backend, self._copy = backend, copier
        self._arrays = list(zip(layouts, buffers, strict=False))
        layout, last = self._arrays[-1]
        self.value_dim = layout.sizes(last)[1]

    def whole(self) -> tuple[Array, Array]:
        """Return the whole buffers of keys and values, ``[kv_heads, cells, dim]``, as views."""
        views = [
            _permuted(self.backend, buffer, layout.axes, "htd") for layout, buffer in self._arrays
        ]
        return views[0], views[-1]

    def arrays(self, read: Read) -> tuple[Array, Array]:
        """Return the keys and values of a read, ``[kv_heads, columns, dim]``."""
        if read.scattered is not None:
            return self.copied(read.scattered)
        backend = self.backend
        views = [
            _permuted(
                backend,
                backend.read_slice(buffer, read.first, read.last, layout.token_axis),
                layout.axes,
                "htd",
            )
            for layout, buffer in self._arrays
        ]
        return views[0], views[-1]

    def copied(self, cells: Int32s) -> tuple[Array, Array]:
        """Return copies of the keys and values in `cells`, ``[kv_heads, columns, dim]``.

        The next call may write over them.
        """
        copies = [
            _permuted(
                self.backend,
                self._copy(number, buffer, cells, layout.token_axis),
                layout.axes,
                "htd",
            )
            for number, (layout, buffer) in enumerate(self._arrays)
        ]
        return copies[0], copies[-1]


def _segment(source: _Source, q: Array, segment: Segment, scoring: Scoring) -> Array:
    """Return attention of the tokens of a segment, ``[q_heads, tokens, value_dim]``."""
    backend = source.backend
    if segment.runs is not None:
        own = (
            q
            if len(segment.runs) == q.shape[1]
            else backend.read_slice(q, segment.start, segment.stop, 1)
        )
        arrays = source.whole() if segment.packed is None else source.copied(segment.packed)
        return backend.attention_of_runs(own, *arrays, scoring, segment.runs)
    if len(segment.levels) == 1:
        out: Array = _level(source, q, segment, segment.levels[0], scoring)[0]
        return out
    part = scoring._replace(sinks=None, log_sum_exp=True)
    results = [_level(source, q, segment, level, part) for level in segment.levels]
    parts = [(out, total) for out, total in results if total is not None]
    merged = backend.merge_attention(parts, scoring.sinks)
    return merged if merged.dtype == q.dtype else backend.xp.astype(merged, q.dtype)


def _level(
    source: _Source, q: Array, segment: Segment, level: Sequence[Read], scoring: Scoring
) -> Result:
    """Return the results of a level for its segment; a token without a read sees nothing."""
    results = [_product(source, q, read, scoring) for read in level]
    like = results[0][0] if results else q
    in_order: list[Result] = []
    covered = segment.start
    for read, result in zip(level, results, strict=True):
        if read.start > covered:
            in_order.append(_nothing(source, like, read.start - covered, scoring))
        in_order.append(result)
        covered = read.stop
    if covered < segment.stop:
        in_order.append(_nothing(source, like, segment.stop - covered, scoring))
    return joined(source.backend, in_order)


def _nothing(source: _Source, like: Array, tokens: int, scoring: Scoring) -> Result:
    """Return the result of tokens that see nothing, in the dtype of `like`."""
    backend, heads = source.backend, like.shape[0]
    out = backend.alloc([heads, tokens, source.value_dim], backend.dtype_name(like))
    if not scoring.log_sum_exp:
        return out, None
    return out, backend.from_host(np.full((heads, tokens), -np.inf, np.float32))


def _product(source: _Source, q: Array, read: Read, scoring: Scoring) -> Result:
    backend, tokens = source.backend, read.stop - read.start
    if tokens < q.shape[1]:
        q = backend.read_slice(q, read.start, read.stop, 1)
    return backend.attention(q, *source.arrays(read), scoring, read.visible)


def _permuted(backend: Backend, array: Array, old: str, new: str) -> Array:
    """Return `array` with its axes in another order: itself, a view, or where it must be a copy."""
    if old == new:
        return array
    return backend.xp.permute_dims(array, tuple(old.index(axis) for axis in new))
