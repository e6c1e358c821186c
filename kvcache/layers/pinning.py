"""Rows of a per-layer cache that stay in its buffers, or were kept on schedule."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcache.backends import Backend
from kvcache.backends.base import Array, HostArray, nbytes
from kvcache.pool.batch import Int32s
from kvcache.snapshots.rows import Layers, Places, Rows, Sight

from .buffers import TOKENS, TokenBuffers


class Spans:
    """The lender of one per-layer cache.

    due: positions to keep the way to. Both it and `rows` are empty in most caches.
    """

    def __init__(self, buffers: TokenBuffers) -> None:
        self._buffers = buffers
        self.lock = nullcontext()  # a per-layer cache belongs to one thread
        self.rows: dict[Rows, None] = {}
        self.due: set[int] = set()
        self._early: Rows | None = None

    @property
    def token_bytes(self) -> int:
        geometry: Any = self._buffers.geometry
        width = geometry.key_dim + geometry.value_dim
        return nbytes((geometry.batch, geometry.kv_heads, width), geometry.dtype)

    def read(self, places: Places) -> Layers:
        if not places.size:
            return {}
        keys, values = self._buffers.keys, self._buffers.values
        return picked(self._buffers.backend, keys, values, places)

    def lend(self, rows: Rows) -> None:
        self.rows[rows] = None

    def release(self, rows: Rows) -> None:
        del self.rows[rows]

    def leave(self, position: int = 0) -> None:
        """Let rows of `position` and behind it move to the host, because their slots change."""
        for rows in list(self.rows):
            if rows.positions.size and rows.positions[-1] >= position:
                rows.to_host()

    def capture(self, positions: Int32s, slots: Places, start: int, stop: int) -> Rows:
        """Rows of ``[start, stop)`` of the `positions` held in `slots`, and of those kept."""
        inside = (positions >= start) & (positions < stop)
        rows = Rows.resident(positions[inside], self, slots[inside])
        if self._early is None:
            return rows
        early = self._early.positions
        new = (early >= start) & (early < stop) & ~np.isin(early, positions)
        return rows.join(self._early.take(np.flatnonzero(new)))

    def keep(self, rows: Rows) -> None:
        """Keep `rows`, which are the cache's then, for snapshots to come."""
        if self._early is not None:
            new = rows.take(np.flatnonzero(~np.isin(rows.positions, self._early.positions)))
            rows.close()
            rows = new.join(self._early)
        self._early = rows

    def collect(self, positions: Int32s, slots: Places, sight: Sight, offset: int) -> None:
        """Keep what is due of the `positions` in `slots`, before some of them are displaced."""
        for place in sorted(each for each in self.due if each <= offset):
            needed = sight.needed(positions, place)
            self.keep(Rows.resident(positions[needed], self, slots[needed]))
            self.due.remove(place)

    def forget(self, position: int) -> None:
        """Drop what was kept of `position` and behind it; what is due there still is."""
        if self._early is not None:
            before, after = self._early.split(position)
            after.close()
            self._early = before if before.positions.size else None


def picked(backend: Backend, keys: Array, values: Array, places: npt.NDArray[Any]) -> Layers:
    """Host copies of some tokens of keys and values ``[B, kv_heads, tokens, head_dim]``."""
    rounded = places
    if not backend.views:  # each length is a program of its own: few of them
        length = 1 << (places.size - 1).bit_length()
        rounded = np.pad(places, (0, length - places.size), "edge")
    both = (backend.to_host(backend.gather(part, rounded, TOKENS)) for part in (keys, values))
    host_keys, host_values = (np.array(part[:, :, : places.size], order="C") for part in both)
    return {0: (host_keys, host_values)}


def arranged(parts: Iterable[Layers], slots: Places, width: int) -> tuple[HostArray, HostArray]:
    """Buffers of `width` slots with the rows of `parts` in `slots`, and 0 elsewhere."""
    pairs = [part[0] for part in parts]
    keys = _arranged([keys for keys, _ in pairs], slots, width)
    return keys, _arranged([values for _, values in pairs], slots, width)


def _arranged(parts: list[Any], slots: Places, width: int) -> HostArray:
    found = np.concatenate(parts, axis=TOKENS)
    whole = np.zeros((*found.shape[:TOKENS], width, found.shape[-1]), found.dtype)
    whole[:, :, slots] = found
    return whole
