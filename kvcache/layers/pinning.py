"""TokenRows of a per-layer cache that stay in its buffers, or were kept on schedule."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcache._types import Int32s
from kvcache.backends import Array, Backend, HostArray, nbytes
from kvcache.snapshots.rows import LayerRows, Slots, TokenRows, Visibility
from kvcache.storage.layout import TOKENS

from .buffers import GrowingBuffers


class LayerPins:
    """The lender of one per-layer cache.

    scheduled: positions to keep the way to. Both it and `rows` are empty in most caches.
    """

    def __init__(self, buffers: GrowingBuffers) -> None:
        self._buffers = buffers
        self.lock = nullcontext()  # a per-layer cache belongs to one thread
        self.rows: dict[TokenRows, None] = {}
        self.scheduled: set[int] = set()
        self._retained: TokenRows | None = None

    @property
    def token_bytes(self) -> int:
        geometry: Any = self._buffers.geometry
        width = geometry.key_dim + geometry.value_dim
        return nbytes((geometry.batch, geometry.kv_heads, width), geometry.dtype)

    def read(self, slots: Slots) -> LayerRows:
        if not slots.size:
            return {}
        keys, values = self._buffers.keys, self._buffers.values
        return read_tokens(self._buffers.backend, keys, values, slots)

    def pin(self, rows: TokenRows) -> None:
        self.rows[rows] = None

    def unpin(self, rows: TokenRows) -> None:
        del self.rows[rows]

    def spill(self, position: int = 0) -> None:
        """Let rows of `position` and behind it move to the host, because their slots change."""
        for rows in list(self.rows):
            if rows.positions.size and rows.positions[-1] >= position:
                rows.to_host()

    def capture(self, positions: Int32s, slots: Slots, start: int, stop: int) -> TokenRows:
        """TokenRows of ``[start, stop)`` of the `positions` held in `slots`, and of those kept."""
        inside = (positions >= start) & (positions < stop)
        rows = TokenRows.resident(positions[inside], self, slots[inside])
        if self._retained is None:
            return rows
        retained = self._retained.positions
        new = (retained >= start) & (retained < stop) & ~np.isin(retained, positions)
        return rows.join(self._retained.take(np.flatnonzero(new)))

    def keep(self, rows: TokenRows) -> None:
        """Keep `rows`, which are the cache's then, for snapshots to come."""
        if self._retained is not None:
            new = rows.take(np.flatnonzero(~np.isin(rows.positions, self._retained.positions)))
            rows.close()
            rows = new.join(self._retained)
        self._retained = rows

    def collect(self, positions: Int32s, slots: Slots, visibility: Visibility, offset: int) -> None:
        """Keep the scheduled of the `positions` in `slots` before some of them are displaced."""
        for place in sorted(each for each in self.scheduled if each <= offset):
            needed = visibility.needed(positions, place)
            self.keep(TokenRows.resident(positions[needed], self, slots[needed]))
            self.scheduled.remove(place)

    def forget(self, position: int) -> None:
        """Drop what was kept of `position` and behind it; what is scheduled there still is."""
        if self._retained is not None:
            before, after = self._retained.split(position)
            after.close()
            self._retained = before if before.positions.size else None


def read_tokens(backend: Backend, keys: Array, values: Array, slots: npt.NDArray[Any]) -> LayerRows:
    """Host copies of some tokens of keys and values ``[B, kv_heads, tokens, head_dim]``."""
    rounded = slots
    if not backend.slices_are_views:  # each length is a program of its own: few of them
        length = 1 << (slots.size - 1).bit_length()
        rounded = np.pad(slots, (0, length - slots.size), "edge")
    both = (backend.to_host(backend.gather(part, rounded, TOKENS)) for part in (keys, values))
    host_keys, host_values = (np.array(part[:, :, : slots.size], order="C") for part in both)
    return {0: (host_keys, host_values)}


def place_rows(parts: Iterable[LayerRows], slots: Slots, width: int) -> tuple[HostArray, HostArray]:
    """Buffers of `width` slots with the rows of `parts` in `slots`, and 0 elsewhere."""
    pairs = [part[0] for part in parts]
    keys = _place_rows([keys for keys, _ in pairs], slots, width)
    return keys, _place_rows([values for _, values in pairs], slots, width)


def _place_rows(parts: list[Any], slots: Slots, width: int) -> HostArray:
    found = np.concatenate(parts, axis=TOKENS)
    whole = np.zeros((*found.shape[:TOKENS], width, found.shape[-1]), found.dtype)
    whole[:, :, slots] = found
    return whole
