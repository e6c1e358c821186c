"""Keys and values of some positions of a sequence, in a cache's memory or in the host's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcache._types import Indices, Int32s
from kvcache.backends import HostArray

Slots: TypeAlias = Indices
"""Where in a cache rows are: cells of a pool, slots of a buffer."""
LayerRows: TypeAlias = dict[int, tuple[HostArray, HostArray | None]]
"""By layer: keys and values ``[..., tokens, head_dim]``; None where it holds keys only."""


class RowOwner(Protocol):
    """A cache that rows can stay in."""

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Held while rows change form: the lender may ask them to in any thread."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all its layers."""

    def read(self, slots: Slots) -> LayerRows:
        """Copies of what is there."""

    def pin(self, rows: TokenRows) -> None:
        """Call ``rows.to_host()`` before their slots are written to, from now on."""

    def unpin(self, rows: TokenRows) -> None:
        """The end of :meth:`pin`."""


class TokenRows:
    """TokenRows of `positions`, ascending. Every change of form leaves the content as it is.

    Resident ones own no memory: they name slots in the cache of a lender, which asks them to
    copy before it writes there. The others are in host memory.
    """

    def __init__(
        self, positions: Int32s, layers: LayerRows | None = None, owner: RowOwner | None = None
    ) -> None:
        self.positions = positions
        self.owner = owner
        self.slots: Slots = np.empty(0, np.int64)
        self._layers = layers or {}

    @classmethod
    def resident(cls, positions: Int32s, owner: RowOwner, slots: Slots) -> TokenRows:
        """TokenRows that stay where they are."""
        rows = cls(positions, owner=owner)
        rows.slots = slots
        owner.pin(rows)
        return rows

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, wherever they are."""
        owner = self.owner
        return self.host_nbytes if owner is None else self.positions.size * owner.token_bytes

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory that are theirs, 0 for resident ones."""
        parts = (part for pair in self._layers.values() for part in pair)
        return sum(part.nbytes for part in parts if part is not None)

    def to_host(self) -> LayerRows:
        """The rows in host memory, theirs from now on."""
        with self._guard():
            if self.owner is not None:
                self._layers = self.owner.read(self.slots)
                self._spill()
            return self._layers

    def close(self) -> None:
        """Give up what they hold; closing twice is no error."""
        with self._guard():
            self._spill()
            self._layers, self.positions = {}, self.positions[:0]

    def _guard(self) -> AbstractContextManager[object]:
        """For who looks at `owner` and goes on as if it stayed: it may go, and never comes."""
        owner = self.owner
        return nullcontext() if owner is None else owner.lock

    def _spill(self) -> None:
        if self.owner is not None:
            self.owner.unpin(self)
        self.owner, self.slots = None, self.slots[:0]

    def read(self, which: npt.NDArray[np.intp]) -> LayerRows:
        """Some of the rows, in host memory; they stay where they are."""
        with self._guard():
            if self.owner is not None:
                return self.owner.read(self.slots[which])
            return self._taken(which)

    def _taken(self, which: npt.NDArray[np.intp] | slice) -> LayerRows:
        return {
            layer: (_taken(keys, which), None if values is None else _taken(values, which))
            for layer, (keys, values) in self._layers.items()
        }

    def take(self, which: npt.NDArray[np.intp] | slice) -> TokenRows:
        """Some of the rows, as rows of their own."""
        with self._guard():
            if self.owner is not None:
                return TokenRows.resident(self.positions[which], self.owner, self.slots[which])
            return TokenRows(self.positions[which], self._taken(which))

    def split(self, at: int) -> tuple[TokenRows, TokenRows]:
        """The rows below position `at`, and the others; these are closed."""
        first = int(np.searchsorted(self.positions, at))
        parts = self.take(slice(0, first)), self.take(slice(first, None))
        self.close()
        return parts

    def join(self, other: TokenRows) -> TokenRows:
        """These rows and those of `other`, which share no position; both are closed."""
        if other.positions.size and self.positions.size:
            joined = self._with(other)
        else:
            joined = (self if self.positions.size else other)._renewed()
        self.close()
        other.close()
        return joined

    def _with(self, other: TokenRows) -> TokenRows:
        positions = np.concatenate([self.positions, other.positions])
        order = np.argsort(positions)
        with self._guard():
            if self.owner is not None and self.owner is other.owner:
                slots = np.concatenate([self.slots, other.slots])[order]
                return TokenRows.resident(positions[order], self.owner, slots)
        # One lock at a time: those of two caches might be asked for in either order.
        return TokenRows(positions[order], _joined(self.to_host(), other.to_host(), order))

    def _renewed(self) -> TokenRows:
        """The same rows as another object, not copied: who closes this one closes no other."""
        with self._guard():
            if self.owner is not None:
                return TokenRows.resident(self.positions, self.owner, self.slots)
            return TokenRows(self.positions, self._layers)


class Visibility(NamedTuple):
    """What a cache needs of the past to go on somewhere.

    window: tokens right before, None for all, 0 for none. chunk: none of earlier chunks of so
    many, but for the last token, from which a sequence knows where it stands.
    sinks: the first so many as well.
    """

    window: int | None = None
    chunk: int | None = None
    sinks: int = 0

    def lowest(self, position: int) -> int:
        """Lowest position needed to go on at `position`, sinks apart."""
        if self.window is None and self.chunk is None:
            return 0
        low = min(self.sinks, position)
        if self.window is not None:
            low = max(low, position - self.window)
        if self.chunk is not None:
            low = max(low, min(position - position % self.chunk, position - 1))
        return low

    def needed(self, positions: Int32s, position: int) -> npt.NDArray[np.bool_]:
        """Which of `positions` it needs to go on at `position`."""
        recent = (positions >= self.lowest(position)) & (positions < position)
        return recent | (positions < min(self.sinks, position))

    def last_resumable(self, positions: Int32s, limit: int) -> int:
        """The last position up to `limit` to go on at, if just `positions` (ascending) are held."""
        held = positions[: int(np.searchsorted(positions, limit))]
        if self.window == 0:
            return limit
        if not held.size:
            return 0
        breaks = np.flatnonzero(np.diff(held) != 1)
        starts = held[np.concatenate([[0], breaks + 1])].tolist()
        stops = (held[np.concatenate([breaks, [held.size - 1]])] + 1).tolist()
        sunk = stops[0] if starts[0] == 0 else 0
        for start, stop in zip(reversed(starts), reversed(stops), strict=True):
            # What is needed moves on with the position, so that the end of a run is decisive.
            if self.lowest(stop) >= start and sunk >= min(self.sinks, stop):
                return int(stop)
        return 0


def _taken(array: HostArray, which: npt.NDArray[np.intp] | slice) -> HostArray:
    return np.array(array[..., which, :], order="C")


def _joined(one: LayerRows, two: LayerRows, order: npt.NDArray[np.intp]) -> LayerRows:
    def merged(first: HostArray, second: HostArray) -> HostArray:
        return np.concatenate([first, second], axis=-2)[..., order, :]

    return {
        layer: (
            merged(keys, two[layer][0]),
            None if values is None else merged(values, _present(two[layer][1])),
        )
        for layer, (keys, values) in one.items()
    }


def _present(array: HostArray | None) -> HostArray:
    if array is None:
        raise ValueError("a layer has values in all rows or in none.")
    return array
