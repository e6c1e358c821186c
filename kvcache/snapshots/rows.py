"""Some positions of a sequence, by layer: in the memory of their cache, or of the host."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcache._types import Bools, Indices, Int32s
from kvcache.storage.arrays import LayerArrays, Rows, concat_layers

Slots: TypeAlias = Indices
"""Places of rows in a cache: cells of a pool, slots of a per-layer buffer."""
LayerRows: TypeAlias = dict[int, LayerArrays]
"""The arrays of every layer, by its number."""


class RowOwner(Protocol):
    """A cache that rows can stay in."""

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Held while rows change form: the owner may ask them to in any thread."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all its layers."""

    def read(self, slots: Slots) -> LayerRows:
        """Return host copies of the rows in `slots`."""

    def pin(self, rows: TokenRows) -> None:
        """Call ``rows.to_host()`` before their slots are written to, from now on."""

    def unpin(self, rows: TokenRows) -> None:
        """Undo :meth:`pin`."""


class TokenRows:
    """Rows of `positions`, ascending. Every change of form leaves the content as it is.

    Resident rows own no memory: they name slots of their owner, which asks them to copy before
    it writes there. Other rows are in host memory.
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
        """Pin rows in `slots` of `owner`, where they stay."""
        rows = cls(positions, owner=owner)
        rows.slots = slots
        owner.pin(rows)
        return rows

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, resident or not."""
        owner = self.owner
        return self.host_nbytes if owner is None else self.positions.size * owner.token_bytes

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory that the rows own, 0 for resident ones."""
        return sum(array.data.nbytes for arrays in self._layers.values() for array in arrays)

    def to_host(self) -> LayerRows:
        """Move the rows to host memory, for good, and return them."""
        with self._owner_lock():
            if self.owner is not None:
                self._layers = self.owner.read(self.slots)
                self._unpin()
            return self._layers

    def close(self) -> None:
        """Give up slots and memory. Closing twice is no error."""
        with self._owner_lock():
            self._unpin()
            self._layers, self.positions = {}, self.positions[:0]

    def _owner_lock(self) -> AbstractContextManager[object]:
        """Return the lock to hold while relying on `owner`.

        Rows may be spilled by another thread meanwhile, but are never pinned again.
        """
        owner = self.owner
        return nullcontext() if owner is None else owner.lock

    def _unpin(self) -> None:
        if self.owner is not None:
            self.owner.unpin(self)
        self.owner, self.slots = None, self.slots[:0]

    def read(self, index: npt.NDArray[np.intp]) -> LayerRows:
        """Return host copies of the rows at `index`; the rows stay as they are."""
        with self._owner_lock():
            if self.owner is not None:
                return self.owner.read(self.slots[index])
            return self._taken(index)

    def _taken(self, index: Rows) -> LayerRows:
        return {
            layer: tuple(array.take(index) for array in arrays)
            for layer, arrays in self._layers.items()
        }

    def take(self, index: npt.NDArray[np.intp] | slice) -> TokenRows:
        """Return the rows at `index` as rows of their own, resident if these are."""
        with self._owner_lock():
            if self.owner is not None:
                return TokenRows.resident(self.positions[index], self.owner, self.slots[index])
            return TokenRows(self.positions[index], self._taken(index))

    def narrowed(self, keep: Bools) -> TokenRows:
        """Return the rows where `keep` is true as rows of their own; these are closed."""
        kept = self.take(np.flatnonzero(keep))
        self.close()
        return kept

    def split(self, at: int) -> tuple[TokenRows, TokenRows]:
        """Return the rows below position `at`, and the others; these are closed."""
        first = int(np.searchsorted(self.positions, at))
        parts = self.take(slice(0, first)), self.take(slice(first, None))
        self.close()
        return parts

    def join(self, other: TokenRows) -> TokenRows:
        """Return these rows and those of `other`, which share no position; both are closed."""
        if other.positions.size and self.positions.size:
            joined = self._merged_with(other)
        else:
            joined = (self if self.positions.size else other)._renewed()
        self.close()
        other.close()
        return joined

    def _merged_with(self, other: TokenRows) -> TokenRows:
        positions = np.concatenate([self.positions, other.positions])
        order = np.argsort(positions)
        with self._owner_lock():
            if self.owner is not None and self.owner is other.owner:
                slots = np.concatenate([self.slots, other.slots])[order]
                return TokenRows.resident(positions[order], self.owner, slots)
        # One lock at a time: those of two caches might be asked for in either order.
        return TokenRows(positions[order], _merged(self.to_host(), other.to_host(), order))

    def _renewed(self) -> TokenRows:
        """Return the same rows, not copied, as another object: closing one leaves the other."""
        with self._owner_lock():
            if self.owner is not None:
                return TokenRows.resident(self.positions, self.owner, self.slots)
            return TokenRows(self.positions, self._layers)


def _merged(one: LayerRows, two: LayerRows, order: npt.NDArray[np.intp]) -> LayerRows:
    """Return the rows of both by layer, in the order of their positions."""
    return {
        layer: tuple(array.take(order) for array in concat_layers([arrays, two[layer]]))
        for layer, arrays in one.items()
    }
