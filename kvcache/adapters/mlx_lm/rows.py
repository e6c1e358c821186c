"""Batches by the protocol of mlx-lm: entries that are merged, extended, filtered and extracted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Self, TypeVar

import mlx.core as mx
import numpy as np

from kvcache.backends.arrays import NativeArray
from kvcache.layers.row_selection import SelectableRows

from .headers import Header

C = TypeVar("C", bound=SelectableRows)


class BatchedEntry(ABC, Generic[C]):
    """An entry of one request, or of the requests of a batch.

    cache: taken over, not copied.
    """

    def __init__(self, cache: C) -> None:
        self.cache: C = cache
        # Requests of a batch without tokens, of which the cache knows nothing.
        self._requests = 1

    @property
    def rows(self) -> int:
        """Requests of the batch."""
        return self.cache.rows or self._requests

    def _header(self, options: Mapping[str, object]) -> str:
        """Return the host's part of the state, with these options, as text."""
        padding = self.cache.padding
        numbers = () if padding is None else padding.tolist()
        return Header(dict(options), self.cache.offset, self.rows, numbers).encoded()

    @abstractmethod
    def _with(self, cache: C) -> Self:
        """Return an entry like this one with another cache."""

    @abstractmethod
    def _padded_row(self, like: C, rows: int) -> C:
        """Return a cache of so many requests without a token, like one that has tokens."""

    @classmethod
    def merge(cls, entries: Sequence[Self]) -> Self:
        """Return an entry with the requests of all `entries`, which stay as they are."""
        return entries[0]._joined(entries)

    def extend(self, other: Self) -> None:
        """Append the requests of `other`."""
        joined = self._joined([self, other])
        self.cache, self._requests = joined.cache, joined._requests

    def _joined(self, entries: Sequence[Self]) -> Self:
        joined = self._with(self._concat([(entry.cache, entry.rows) for entry in entries]))
        joined._requests = sum(entry.rows for entry in entries)
        return joined

    def _concat(self, caches: Sequence[tuple[C, int]]) -> C:
        """Return one cache of several, given with their rows, of which some may be empty."""
        first = next((cache for cache, _ in caches if cache.offset), None)
        if first is None:
            return self.cache.make("mlx", self.cache.options)
        filled = [c if c.offset else self._padded_row(first, rows) for c, rows in caches]
        return first.concat(filled)

    def filter(self, batch_indices: Any) -> None:
        """Keep these requests of the batch only, in this order."""
        rows = np.array(batch_indices).tolist()
        cache, undo = self.cache, self.cache.savepoint()
        try:
            cache.select(rows)
            padding = cache.padding
            if padding is not None and padding.min() and cache.offset:
                cache = cache.concat([cache])  # without the padding that all have
        except BaseException:
            undo()
            raise
        self.cache, self._requests = cache, len(rows)

    def extract(self, idx: int) -> Self:
        """Return an entry of one request of the batch, without padding."""
        rows = self.cache.split([idx]) or [self.cache.make("mlx", self.cache.options)]
        return self._with(rows[0])

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce the padding of the tokens to come, up to :meth:`finalize` if on their right."""
        if left_padding is not None:
            self.cache.pad(left_padding)

    def finalize(self) -> None:
        """Let all requests end with a token: padding on their right goes to their left."""

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        clone = self._with(self.cache.copy())
        clone._requests = self._requests
        return clone


def zeros(rows: int, array: NativeArray, tokens: int | None = None) -> NativeArray:
    """Return zeros for so many rows of `array`, and tokens on its third axis."""
    shape = [rows, *array.shape[1:]]
    if tokens is not None:
        shape[2] = tokens
    return mx.zeros(shape, array.dtype)
