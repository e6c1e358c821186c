"""Checks of attention on a backend; the oracle computes one query at a time, in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvcache.backends import HOST_DTYPES, Array, Backend, HostArray
from kvcache.backends.blocks import BlockReads, Blocks
from kvcache.backends.nonfinite import LARGEST_BITS, largest_power
from kvcache.backends.products import Scoring, VisibleColumns

from .checks import check
from .coded import coded, same

_Doubles = npt.NDArray[np.float64]

Q_HEADS, KV_HEADS, COLUMNS, DIM = 6, 2, 9, 8
_ULPS = 16
"""Units in the last place of the dtype by which outputs, of size 1, may be off."""


def _random(shape: tuple[int, ...], dtype: str, seed: int) -> HostArray:
    numbers = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return numbers.astype(HOST_DTYPES[dtype])


def _inputs(dtype: str, tokens: int, value_dim: int = DIM) -> tuple[HostArray, ...]:
    """Return queries, keys and values. Over keys of float8, queries are float32."""
    queries = "float32" if dtype.startswith("float8") else dtype
    return (
        _random((Q_HEADS, tokens, DIM), queries, 1),
        _random((KV_HEADS, COLUMNS, DIM), dtype, 2),
        _random((KV_HEADS, COLUMNS, value_dim), dtype, 3),
    )


def _expected(
    arrays: tuple[HostArray, ...],
    scoring: Scoring,
    visible: VisibleColumns | None = None,
    sinks: HostArray | None = None,
) -> tuple[_Doubles, _Doubles]:
    """Return the outputs and logarithms that attention should give."""
    q, keys, values = (array.astype(np.float64) for array in arrays)
    tokens, group = q.shape[1], q.shape[0] // keys.shape[0]
    out = np.empty((*q.shape[:2], values.shape[2]))
    logarithms = np.empty(q.shape[:2])
    for head, token in np.ndindex(q.shape[0], tokens):
        seen = slice(None)
        if visible is not None:
            seen = slice(int(visible.first[token]), int(visible.last[token]))
        scores = keys[head // group, seen] @ q[head, token] * scoring.scale
        if scoring.softcap is not None:
            scores = scoring.softcap * np.tanh(scores / scoring.softcap)
        total = np.exp(scores).sum()
        logarithms[head, token] = np.log(total)
        if sinks is not None:
            total += np.exp(float(sinks[head]))
        out[head, token] = np.exp(scores) @ values[head // group, seen] / total
    return out, logarithms


def _near(backend: Backend, got: Array, expected: _Doubles, dtype: str) -> None:
    """Raise AssertionError unless `got` is near `expected`, both computed from `dtype`."""
    host = backend.to_host(got).astype(np.float64)
    assert host.shape == expected.shape, f"expected {expected.shape}, got {host.shape}"
    bits = {"float32": 20, "float16": 10, "bfloat16": 7}.get(dtype, 20)
    worst = float(np.abs(host - expected).max())  # NaN fails, too
    assert worst <= _ULPS * 2.0**-bits, f"{dtype} attention is off by {worst}"


def _attend(
    backend: Backend,
    arrays: tuple[HostArray, ...],
    scoring: Scoring,
    visible: VisibleColumns | None,
) -> tuple[Array, Array | None]:
    q, keys, values = map(backend.from_host, arrays)
    return backend.attention(q, keys, values, scoring, visible)


def _rule(tokens: int, kind: str) -> VisibleColumns | None:
    """Return all columns, those of causal queries at the end, or a window of four."""
    if kind == "all":
        return None
    last = np.arange(COLUMNS - tokens, COLUMNS) + 1
    first = np.zeros_like(last) if kind == "causal" else np.maximum(0, last - 4)
    return VisibleColumns(first, last)


@check
def attention_weighs_what_is_visible(backend: Backend, dtype: str) -> None:
    """Compute attention with grouped heads over just the columns that each query sees."""
    if dtype not in LARGEST_BITS:
        return
    for tokens, kind in ((1, "all"), (4, "all"), (4, "causal"), (COLUMNS, "causal"), (4, "window")):
        visible, scoring = _rule(tokens, kind), Scoring(DIM**-0.5)
        for value_dim in (DIM, 5):
            arrays = _inputs(dtype, tokens, value_dim)
            out, logarithm = _attend(backend, arrays, scoring, visible)
            assert logarithm is None, "a logarithm that nobody asked for"
            assert backend.dtype_name(out) == arrays[0].dtype.name, backend.dtype_name(out)
            _near(backend, out, _expected(arrays, scoring, visible)[0], dtype)


@check
def attention_hides_large_numbers(backend: Backend, dtype: str) -> None:
    """Give hidden columns the weight 0, also where values stand for NaN."""
    if dtype not in LARGEST_BITS:
        return
    visible, scoring = _rule(2, "causal"), Scoring(DIM**-0.5)
    arrays = _inputs(dtype, 2)
    expected = _expected(arrays, scoring, visible)[0][:, :1]
    arrays[1][:, -1], arrays[2][:, -1] = 0, largest_power(dtype)  # the first query sees neither
    out, _ = _attend(backend, arrays, scoring, visible)
    _near(backend, out[:, :1, :], expected, dtype)


@check
def attention_bounds_scores_and_has_sinks(backend: Backend, dtype: str) -> None:
    """Scale scores, then bound them by `softcap`; count `sinks` in the sum, without a value."""
    if dtype not in LARGEST_BITS:
        return
    logits = np.linspace(-1, 2, Q_HEADS).astype(np.float32)
    for tokens, kind in ((1, "all"), (4, "causal")):
        for softcap, sinks in ((1.5, None), (None, logits), (1.5, logits)):
            given = None if sinks is None else backend.from_host(sinks)
            scoring, arrays = Scoring(0.5, softcap, given), _inputs(dtype, tokens)
            out, _ = _attend(backend, arrays, scoring, _rule(tokens, kind))
            expected, _ = _expected(arrays, scoring, _rule(tokens, kind), sinks)
            _near(backend, out, expected, dtype)


@check
def attention_merges(backend: Backend, dtype: str) -> None:
    """Merge the results over some columns and over the others to those over all, with sinks."""
    if dtype not in LARGEST_BITS:
        return
    arrays, scoring = _inputs(dtype, 3), Scoring(DIM**-0.5, log_sum_exp=True)
    sinks = np.linspace(-1, 2, Q_HEADS).astype(np.float32)
    q, keys, values = arrays
    parts = []
    for columns in (slice(0, 2), slice(2, None)):
        piece = q, keys[:, columns], values[:, columns]
        out, logarithm = _attend(backend, piece, scoring, None)
        assert logarithm is not None, "no logarithm, though it was asked for"
        _near(backend, logarithm, _expected(piece, scoring)[1], dtype)
        parts.append((out, logarithm))
    nothing = backend.alloc((Q_HEADS, 3, DIM), backend.dtype_name(parts[0][0]))
    parts.append((nothing, backend.from_host(np.full((Q_HEADS, 3), -np.inf, np.float32))))
    for logits in (None, sinks):
        given = None if logits is None else backend.from_host(logits)
        merged = backend.merge_attention(parts, given)
        _near(backend, merged, _expected(arrays, scoring, None, logits)[0], dtype)


@check
def row_copiers_copy_one_read_after_the_other(backend: Backend, dtype: str) -> None:
    """Return the rows of each call, more and fewer of them, from buffers of any sizes."""
    copy = backend.row_copier()
    for index in ((3, 0, 3), (1,), (5, 4, 2, 1, 0), (2, 2)):
        positions = np.array(index, np.int32)
        for number, (dim, axis) in enumerate(((4, 1), (2, 0))):
            host = coded((3, 6, 6, dim), dtype)[number]
            got = copy(number, backend.from_host(host), positions, axis)
            same(backend.to_host(got), host.take(positions, axis))


@check
def attention_of_runs_reads_each_run(backend: Backend, dtype: str) -> None:
    """Let query i meet the columns of run i alone, whatever lies beside it."""
    if dtype not in LARGEST_BITS:
        return
    runs, scoring = ((4, 7), (0, 1), (7, COLUMNS)), Scoring(DIM**-0.5)
    arrays = _inputs(dtype, len(runs))
    visible = VisibleColumns(*(np.array(ends) for ends in zip(*runs, strict=True)))
    q, keys, values = map(backend.from_host, arrays)
    out = backend.attention_of_runs(q, keys, values, scoring, runs)
    _near(backend, out, _expected(arrays, scoring, visible)[0], dtype)


def _reads(backend: Backend) -> BlockReads:
    """Return reads of three tokens: of cells of their own, and of two that the first two share."""
    own = (
        [0, 1, 2, 0],
        [[4, 5, 6, 6], [4, 5, 5, 5], [7, 8, 8, 8], [8, 8, 8, 8]],  # the last one is padding
        [[0], [0], [0], [0]],
        [[3], [2], [2], [0]],
    )
    shared = [0], [[2, 3, 3, 3]], [[0, 1]], [[2, 2]]

    def move(array: object) -> Array:
        return backend.from_host(np.array(array, np.int32))

    blocks = tuple(Blocks(*map(move, arrays)) for arrays in (own, shared))
    return BlockReads(move([0, 1, 2, 0]), move([0, 1, 2]), blocks)


@check
def attention_in_blocks_adds_up(backend: Backend, dtype: str) -> None:
    """Add up what each query sees in several blocks, of one query and of two."""
    if dtype not in LARGEST_BITS:
        return
    arrays, visible = _inputs(dtype, 3, 5), VisibleColumns(np.array([2, 3, 7]), np.array([7, 6, 9]))
    q, *buffers = map(backend.from_host, arrays)
    likes = [backend.alloc((KV_HEADS, 0, dim), dtype) for dim in (DIM, 5)]
    logits = np.linspace(-1, 2, Q_HEADS).astype(np.float32)
    for softcap, sinks in ((None, None), (1.5, logits)):
        given = None if sinks is None else backend.from_host(sinks)
        scoring = Scoring(0.5, softcap, given)
        reads = _reads(backend)
        out = backend.attention_in_blocks(q, tuple(buffers), tuple(likes), scoring, reads)
        assert backend.dtype_name(out) == arrays[0].dtype.name, backend.dtype_name(out)
        _near(backend, out, _expected(arrays, scoring, visible, sinks)[0], dtype)
