"""Selecting and splitting the rows of a batch, whatever a cache holds of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from functools import partial
from typing import Self, SupportsIndex

import numpy as np

from kvcache._types import Int32s

from .base import LayerCache
from .padding import check_rows


class SelectableRows(LayerCache):
    """A cache whose rows are selected and split."""

    _padding: Int32s | None

    @property
    @abstractmethod
    def rows(self) -> int | None:
        """Rows of the batch; None before there are tokens, unless padding was declared."""

    @abstractmethod
    def _select(self, index: Int32s) -> None:
        """Do :meth:`select` of other rows than all in their order."""

    @abstractmethod
    def _row(self, row: int) -> Self:
        """Return a cache of one row, without its padding."""

    @property
    def padding(self) -> Int32s | None:
        return self._padding

    def check_select(self, rows: Iterable[SupportsIndex]) -> None:
        self.check_not_exported()
        check_rows(rows, self.rows)

    def select(self, rows: Iterable[SupportsIndex]) -> None:
        self.check_not_exported()
        index = check_rows(rows, self.rows)
        if index.size and not np.array_equal(index, np.arange(self.rows or 0)):
            self._atomic(partial(self._select, index))

    def split(self, rows: Iterable[SupportsIndex] | None = None) -> list[Self]:
        self.check_not_exported()
        count = self.rows
        wanted = range(count or 0) if rows is None else check_rows(rows, count).tolist()
        return [self._row(row) for row in wanted]
