"""Attention over keys and values that lie in a row: shared by all backends.

Keys and values are ``[kv_heads, columns, dim]``, queries ``[q_heads, tokens, head_dim]``. Query
head h belongs to key head ``h // (q_heads // kv_heads)``; keys are never repeated for that: the
queries of a key head are the rows of one product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from .arrays import HostArray, Namespace, NativeArray

_BAND = 256
"""Queries of a block in which each sees columns of its own: few, so that they share most."""
SCORES = 1 << 22
"""Scores held at once, of all heads together: 16 MiB in float32."""


class ReadCosts(NamedTuple):
    """From where on reading keys in pieces, and merging, is faster than reading them at once.

    shared: columns that queries of several sequences share, times the sequences but one, from which
        one product for all of them beats a product for each sequence.
    run: columns in a row from which a product of their own beats copying them.
    least: columns of a shared prefix below which the merge costs more than is saved.
    packed: whether one copy of the scattered columns of many queries, each with columns of its own,
        beats a copy for each: where calls cost more than what they do (GPUs).
    """

    shared: int
    run: int
    least: int = 64
    packed: bool = False


NEVER = 1 << 62
"""A cost for frameworks where reading in pieces does not pay."""
Result: TypeAlias = tuple[NativeArray, NativeArray | None]
"""Output of attention, and the logarithm of the sum of exponentials of its scores or None."""


Dot: TypeAlias = Callable[[NativeArray, NativeArray], NativeArray]
"""The products of rows and keys of each head, ``[kv_heads, rows, columns]``."""


class Scoring(NamedTuple):
    """How attention weighs keys: the product of query and key, and what is done to it.

    scale: factor of the products.
    softcap: c bounds scores, scaled already, to ``c * tanh(score / c)``; None: no bound.
    sinks: a logit for each query head, ``[q_heads]``, that takes part in the softmax and brings no
        value; None: none.
    log_sum_exp: ask for the logarithm of the sum of exponentials of the scores as well. Then
        without sinks.
    """

    scale: float
    softcap: float | None = None
    sinks: NativeArray | None = None
    log_sum_exp: bool = False


class VisibleColumns:
    """The columns that each query sees: ``[first[i], last[i])`` for query i, at least one.

    first, last: on the host, int [tokens].
    """

    def __init__(self, first: npt.NDArray[np.integer], last: npt.NDArray[np.integer]) -> None:
        self.first, self.last = first, last

    def causal(self, columns: int) -> bool:
        """Return whether each query sees one column more than the one before, the last one all."""
        return not self.first.any() and int(self.last[-1]) == columns and self._rises

    @cached_property
    def _rises(self) -> bool:
        return bool((np.diff(self.last) == 1).all())

    def mask(self, columns: int) -> HostArray:
        """Return the mask, bool ``[tokens, columns]``, True = attend."""
        numbers = np.arange(columns)
        return (numbers >= self.first[:, None]) & (numbers < self.last[:, None])

    def block(self, start: int, stop: int) -> Block:
        """Return queries ``[start, stop)`` with the columns that they see."""
        first, last = self.first[start:stop], self.last[start:stop]
        left, right = int(first.min()), int(last.max())
        if first.max() == left and last.min() == right:
            return Block(start, stop, left, right, None)
        return Block(start, stop, left, right, VisibleColumns(first - left, last - left))


class Block(NamedTuple):
    """Queries ``[start, stop)``, and the columns ``[left, right)`` that any of them sees.

    visible: which of these each one sees; None: all.
    """

    start: int
    stop: int
    left: int
    right: int
    visible: VisibleColumns | None


def blocks(
    tokens: int, columns: int, visible: VisibleColumns | None, largest: int
) -> Iterator[Block]:
    """Yield blocks of at most `largest` queries, fewer where each sees columns of its own."""
    if visible is None:
        for start in range(0, tokens, largest):
            yield Block(start, min(start + largest, tokens), 0, columns, None)
        return
    size = largest if visible.causal(columns) else min(largest, _BAND)
    for start in range(0, tokens, size):
        yield visible.block(start, min(start + size, tokens))


def block_size(heads: int, columns: int) -> int:
    """Return the number of queries whose scores over `columns` are held at once."""
    return max(1, SCORES // (heads * columns))


def wide(xp: Namespace, array: NativeArray) -> NativeArray:
    """Return `array` in float32, itself if it is."""
    return array if array.dtype == xp.float32 else xp.astype(array, xp.float32)


def product(
    xp: Namespace,
    q: NativeArray,
    keys: NativeArray,
    values: NativeArray,
    scoring: Scoring,
    mask: NativeArray | None,
    dot: Dot | None = None,
) -> Result:
    """Return attention of `q` over all columns, computed in float32, by functions of `xp`.

    mask: bool ``[tokens, columns]``, True = attend. Other arguments and results are those of
    :meth:`Backend.attention`.
    dot: where something is faster than a plain matrix product.
    """
    scale, softcap, sinks, log_sum_exp = scoring
    q_heads, tokens, head_dim = q.shape
    kv_heads, columns, value_dim = values.shape
    shape = kv_heads, q_heads // kv_heads, tokens
    rows = xp.reshape(wide(xp, q) * scale, (kv_heads, -1, head_dim))
    if dot is None:
        scores = xp.matmul(rows, xp.permute_dims(wide(xp, keys), (0, 2, 1)))
    else:
        scores = dot(rows, wide(xp, keys))
    if softcap is not None:
        scores = xp.tanh(scores / softcap) * softcap
    if mask is not None:
        seen = xp.reshape(scores, (*shape, columns))
        scores = xp.reshape(xp.where(mask, seen, -math.inf), (kv_heads, -1, columns))
    largest = xp.max(scores, axis=-1, keepdims=True)
    if sinks is not None:
        per_head = xp.reshape(wide(xp, sinks), (*shape[:2], 1))
        per_row = xp.reshape(xp.broadcast_to(per_head, shape), (kv_heads, -1, 1))
        largest = xp.maximum(largest, per_row)
    weights = xp.exp(scores - largest)
    total = xp.sum(weights, axis=-1, keepdims=True)
    logarithm = None
    if log_sum_exp:
        logarithm = xp.reshape(largest + xp.log(total), (q_heads, tokens))
    if sinks is not None:
        total = total + xp.exp(per_row - largest)
    out = xp.matmul(weights, wide(xp, values)) / total
    out = xp.reshape(out, (q_heads, tokens, value_dim))
    if log_sum_exp:
        return out, logarithm
    return out if out.dtype == q.dtype else xp.astype(out, q.dtype), None


def merged(
    xp: Namespace, parts: Sequence[tuple[NativeArray, NativeArray]], sinks: NativeArray | None
) -> NativeArray:
    """Return attention over the columns of all `parts` together, in float32.

    parts: results over disjoint sets of columns: outputs and logarithms of sums. A query that
    sees nothing of a part has -inf there.
    """
    outputs, logarithms = (xp.stack(list(arrays)) for arrays in zip(*parts, strict=True))
    largest: NativeArray = xp.max(logarithms, axis=0)
    largest = xp.where(largest == -math.inf, 0.0, largest)  # -inf - -inf would be NaN
    weights = xp.exp(logarithms - largest)
    total: NativeArray = xp.sum(weights, axis=0)
    if sinks is not None:
        total = total + xp.exp(wide(xp, sinks)[:, None] - largest)
    shares = weights / xp.where(total == 0, 1.0, total)
    return xp.sum(wide(xp, outputs) * xp.expand_dims(shares, axis=-1), axis=0)
