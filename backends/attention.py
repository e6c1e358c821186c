"""The part of a backend that computes attention over keys that lie in a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy.typing as npt

from .arrays import Array, HostArray, Namespace
from .products import (
    Block,
    ReadCosts,
    Result,
    Scoring,
    VisibleColumns,
    block_size,
    blocks,
    merged,
    product,
)

RowCopier: TypeAlias = Callable[[int, Array, HostArray, int], Array]
"""Copies rows of an array of a layer, whose number comes first: see `AttentionHooks.row_copier`."""


class AttentionHooks(ABC):
    """Attention of some queries over the keys and values of one piece of a history.

    A framework with a kernel of its own overrides :meth:`attention_block`, or all of
    :meth:`attention`. By default the product is computed with the functions of its namespace.
    """

    xp: Namespace
    read_costs: ReadCosts = ReadCosts(shared=1024, run=256)
    """When attention over a pool reads keys in pieces; measured, not a matter of results."""

    @abstractmethod
    def from_host(self, array: npt.ArrayLike, dtype: str | None = None) -> Array:
        """See :meth:`Backend.from_host`."""

    @abstractmethod
    def read_rows(self, buffer: Array, index: HostArray, axis: int) -> Array:
        """See :meth:`Backend.read_rows`."""

    @abstractmethod
    def read_slice(self, buffer: Array, start: int, stop: int, axis: int) -> Array:
        """See :meth:`Backend.read_slice`."""

    @abstractmethod
    def concat(self, arrays: Sequence[Array], axis: int) -> Array:
        """See :meth:`Backend.concat`."""

    def attention(
        self,
        q: Array,
        keys: Array,
        values: Array,
        scoring: Scoring,
        visible: VisibleColumns | None = None,
    ) -> Result:
        """Return attention of `q` over all columns, ``[q_heads, tokens, value_dim]``.

        q: ``[q_heads, tokens, head_dim]``.
        keys, values: ``[kv_heads, columns, dim]``, at least one column; the same array twice for a
            layer of keys only. Query head h attends to key head ``h // (q_heads // kv_heads)``.
        visible: columns that each query sees; None: all. Hidden columns hold finite numbers.

        Scores and sums are float32, whatever the dtype. The second result is None, or with
        ``scoring.log_sum_exp`` the logarithm of the sum of exponentials of the scores, float32
        ``[q_heads, tokens]``. The output is in the dtype of `q`, with such a logarithm also in
        float32.

        Arguments are checked by the caller, and none is changed.
        """
        size = self.attention_size(q, keys, values, scoring, visible)
        if visible is None and q.shape[1] <= size:
            return self.attention_block(q, keys, values, scoring, None)
        parts = [
            self._block(q, keys, values, scoring, block)
            for block in blocks(q.shape[1], keys.shape[1], visible, size)
        ]
        return joined(self, parts)

    def attention_of_runs(
        self,
        q: Array,
        keys: Array,
        values: Array,
        scoring: Scoring,
        runs: Sequence[tuple[int, int]],
    ) -> Array:
        """Do :meth:`attention` of query i over the columns ``[start, stop)`` of ``runs[i]``.

        For decode steps, whose tokens each have one query and columns of their own. keys and values
        are whole buffers, of which a run is a small part. Without logarithms.
        """
        outputs = []
        for token, (start, stop) in enumerate(runs):
            own = self.read_slice(keys, start, stop, 1)
            own_values = own if values is keys else self.read_slice(values, start, stop, 1)
            query = self.read_slice(q, token, token + 1, 1)
            outputs.append(self.attention(query, own, own_values, scoring)[0])
        return outputs[0] if len(outputs) == 1 else self.concat(outputs, 1)

    def row_copier(self) -> RowCopier:
        """Return a function that copies rows as :meth:`read_rows` does, for one product at a time.

        It takes the number of the array in its layer, and then the arguments of `read_rows`. The
        next call with the same number may write over the result, so that no memory is allocated.
        """
        return lambda _, buffer, index, axis: self.read_rows(buffer, index, axis)

    def _block(
        self, q: Array, keys: Array, values: Array, scoring: Scoring, block: Block
    ) -> Result:
        start, stop, left, right, visible = block
        if stop - start < q.shape[1]:
            q = self.read_slice(q, start, stop, 1)
        if right - left < keys.shape[1]:
            same = values is keys
            keys = self.read_slice(keys, left, right, 1)
            values = keys if same else self.read_slice(values, left, right, 1)
        return self.attention_block(q, keys, values, scoring, visible)

    # Hooks.

    def attention_size(
        self,
        q: Array,
        keys: Array,
        values: Array,
        scoring: Scoring,
        visible: VisibleColumns | None,
    ) -> int:
        """Return the largest number of queries for one :meth:`attention_block`.

        Default: as many as have few scores, which the product below holds in memory.
        """
        return block_size(q.shape[0], keys.shape[1])

    def attention_block(
        self,
        q: Array,
        keys: Array,
        values: Array,
        scoring: Scoring,
        visible: VisibleColumns | None,
    ) -> Result:
        """Do :meth:`attention` for as many queries as :meth:`attention_size` allows."""
        mask = None if visible is None else self.from_host(visible.mask(keys.shape[1]))
        return product(self.xp, q, keys, values, scoring, mask)

    def merge_attention(
        self, parts: Sequence[tuple[Array, Array]], sinks: Array | None = None
    ) -> Array:
        """Return attention over the columns of all `parts` together, float32.

        parts: results of :meth:`attention` with logarithms, over disjoint columns. Where a query
            sees nothing of a part, its logarithm there is -inf and its output finite.
        """
        result: Array = merged(self.xp, parts, sinks)
        return result


def joined(backend: AttentionHooks, parts: Sequence[Result]) -> Result:
    """Return results for successive tokens as one."""
    if len(parts) == 1:
        return parts[0]
    outputs, logarithms = zip(*parts, strict=True)
    given = [logarithm for logarithm in logarithms if logarithm is not None]
    return backend.concat(outputs, 1), backend.concat(given, 1) if given else None
