"""Tokens that a per-layer cache holds, its columns, and the masks of its queries."""

from __future__ import annotations

from abc import abstractmethod
from typing import SupportsIndex

import numpy as np

from kvcache._checks import as_index, as_limit, as_sizes
from kvcache._types import Int32s
from kvcache.backends import Array, Backend
from kvcache.errors import KVCacheError
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.lengths import padded_positions

from .buffers import Arrays, GrowingBuffers, swapped
from .columns import Sizes, attention_mask, in_rows
from .programs import ExportableCache


class ReadableCache(ExportableCache):
    """A cache whose tokens, columns and masks are read."""

    _step: int
    _room: int

    # What is held.

    @property
    def offset(self) -> int:
        return self._offset

    @property
    def len(self) -> int:
        return self._offset

    @property
    def backend(self) -> Backend | None:
        return self._admission.backend

    @property
    def dtype(self) -> str | tuple[str, str] | None:
        return self._admission.dtype

    @property
    def nbytes(self) -> int:
        return self._buffers.nbytes if self._buffers is not None else 0

    @property
    def growths(self) -> int:
        """Number of moves to larger buffers since the last reset."""
        return self._buffers.growths if self._buffers is not None else 0

    @property
    def state(self) -> tuple[Array, ...]:
        """Keys and values held, ``[B, kv_heads, len, head_dim]`` each; () when empty.

        In the layout of the cache, ascending by position: see :attr:`state_positions`. Read-only,
        and valid until the next call that changes the cache. Exactly :attr:`len` columns on every
        backend; on JAX they are a copy made by the host.
        """
        self.check_not_exported()
        if self._buffers is None or not self._offset:
            return ()
        return self._exact(self._buffers)

    def _exact(self, buffers: GrowingBuffers) -> Arrays:
        """Return the tokens held, ascending and without padding."""
        _, slots = self._held()
        if buffers.backend.slices_are_views:
            return buffers.slots(int(slots[0]), int(slots[-1]) + 1)
        # Cut on the host, in a tenth of a millisecond; a program for each length takes 100.
        arrays = buffers.read_slots(slots)
        from_host, axes = buffers.backend.from_host_axes, buffers.geometry.axes
        return tuple([from_host(swapped(array.data, buffers.axis), axes) for array in arrays])

    @property
    def state_positions(self) -> Int32s:
        """Position of every column of :attr:`state`, int32 [len], ascending.

        One for all rows of a batch: padding counts.
        """
        return self._held()[0]

    @property
    def positions(self) -> Int32s:
        """Position of every column of the last `update`, int32 [n], ascending; -1 for padding.

        ``[B, n]`` if rows are padded: positions count from the first token of the row.
        """
        self.check_not_exported()
        return self._shown(self._columns())

    def next_positions(self, tokens: SupportsIndex) -> Int32s:
        """Return the positions of the columns that an update of `tokens` tokens will return.

        As :attr:`positions` will be after it, int32 [n], ascending; -1 for padding; ``[B, n]`` if
        rows are padded. For models that ask for the size of a mask before their layers update.

        Raises: ValueError for less than one token, ExportedError.
        """
        self.check_not_exported()
        [count] = as_sizes(tokens=tokens)
        return self._shown(self._next_columns(count))

    def _shown(self, columns: Int32s) -> Int32s:
        return columns if self._padding is None else in_rows(columns, self._padding)

    def _sizes(self) -> Sizes:
        """Return the sizes of the buffers, allocated or not."""
        if self._buffers is not None:
            return self._buffers.sizes
        return Sizes() if self.backend is None else Sizes.on(self.backend, self._step, None)

    def _columns(self) -> Int32s:
        """Return the positions of the columns of the last update."""
        return self._columns_at(self._offset, self._sizes())

    def _columns_at(self, stop: int, sizes: Sizes) -> Int32s:
        first, last = sizes.span(0, stop)
        return padded_positions(np.arange(stop, dtype=np.int32), last - first)

    @abstractmethod
    def _first_room(self, slots: int) -> int:
        """Return the slots to make room for when the first `slots` are needed."""

    # Masks.

    def mask(self, tokens: int, window: int | None = None, *, ahead: bool = False) -> Array | None:
        """Return the attention mask of the last `tokens` queries over the columns of `update`.

        The mask is ``[tokens, n]`` in the backend's ``mask_dtype`` (``"bool"``: True = attend), or
        None when every column is visible to every query. `window` W lets a token see itself and
        the W - 1 tokens before it. Layers with equal histories can share one mask.

        If rows of the batch are padded, ``[B, 1, tokens, n]``: it hides the padding of each row,
        and a query of padding sees itself alone, as softmax over nothing is NaN.

        ahead: return the mask of the next `tokens` queries instead, over the columns that their
            update will return: for models that make the mask before their layers update.

        Raises: ValueError for more tokens than the last update allows, or a window below 1;
            KVCacheError ahead of the first update of a cache that names no backend.
        """
        self.check_not_exported()
        tokens, window = as_index(tokens, "tokens"), as_limit(window, "window")
        stop = self._offset + tokens if ahead else self._offset
        limit = tokens if ahead else self._maskable()
        if not 1 <= tokens <= limit:
            raise ValueError(f"mask covers 1 to {max(1, limit)} latest tokens; got {tokens}.")
        if self.backend is None:
            raise KVCacheError(
                "a mask ahead of the first update needs a backend. Name it when the cache is made."
            )
        columns = self._next_columns(tokens) if ahead else self._columns()
        queries = np.arange(stop - tokens, stop, dtype=np.int32)
        return attention_mask(self.backend, self._attended(window), queries, columns, self._padding)

    def _next_columns(self, tokens: int) -> Int32s:
        """Return the positions of the columns that an update of `tokens` tokens would return."""
        stop, sizes = self._offset + tokens, self._sizes()
        return self._columns_at(
            stop, sizes.grown(stop if self._buffers else self._first_room(stop))
        )

    def _maskable(self) -> int:
        """Return the largest number of latest queries with a mask."""
        return self._offset

    def _attended(self, window: int | None) -> Visibility:
        """Return the rule for masks with a window of `window` tokens, the query included."""
        return Visibility(None if window is None else window - 1)
