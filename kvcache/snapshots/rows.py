"""Rows of some positions of a sequence, in the memory of their cache or of the host."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcache._types import Bools, Indices, Int32s
from kvcache.storage.arrays import LayerArrays, Rows, concat_layers

Slots: TypeAlias = Indices
"""Places of rows in their owner: cells of a pool, or slots of a per-layer cache."""
LayerRows: TypeAlias = dict[int, LayerArrays]
"""The arrays of every layer, by layer number."""


class RowOwner(Protocol):
    """A cache with rows pinned in its memory."""

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Held while rows change form: their owner may spill them in any thread."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""

    def read(self, slots: Slots) -> LayerRows:
        """Return host copies of the rows in `slots`."""

    def pin(self, rows: TokenRows) -> None:
        """Call ``rows.to_host()`` from now on before their slots are written to."""

    def unpin(self, rows: TokenRows) -> None:
        """Undo :meth:`pin`."""


class TokenRows:
    """Rows of some positions of a sequence; their content never changes, only its place.

    positions: int32, ascending.
    layers: the content in host memory; None for resident rows.
    owner: the cache of resident rows.

    Resident rows own no memory: they name slots of their owner, and it spills them to the host
    before it writes there.
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
        """Return the rows in `slots` of `owner`, pinned there."""
        rows = cls(positions, owner=owner)
        rows.slots = slots  # before pinning, which reads them
        owner.pin(rows)
        return rows

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, resident or not."""
        owner = self.owner  # read once: another thread may spill the rows in between
        return self.host_nbytes if owner is None else self.positions.size * owner.token_bytes

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory owned by the rows: 0 for resident ones."""
        return sum(array.data.nbytes for arrays in self._layers.values() for array in arrays)

    def to_host(self) -> LayerRows:
        """Spill the rows to host memory, for good, and return them by layer."""
        with self._owner_lock():
            if self.owner is not None:
                # Read before unpinning: free slots may be written to at any time.
                self._layers = self.owner.read(self.slots)
                self._unpin()
            return self._layers

    def close(self) -> None:
        """Give up slots and memory. Closing twice is fine."""
        with self._owner_lock():
            self._unpin()
            self._layers, self.positions = {}, self.positions[:0]

    def _owner_lock(self) -> AbstractContextManager[object]:
        """Return the lock to hold while relying on `owner`.

        Check `owner` again under the lock: another thread may have spilled the rows. Rows without
        an owner never get one, and need no lock.
        """
        owner = self.owner
        return nullcontext() if owner is None else owner.lock

    def _unpin(self) -> None:
        if self.owner is not None:
            self.owner.unpin(self)
        self.owner, self.slots = None, self.slots[:0]

    def read(self, index: npt.NDArray[np.intp]) -> LayerRows:
        """Return host copies of the rows at `index`, leaving all rows where they are."""
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
        """Return the rows at `index` as an object of their own, resident if these are."""
        with self._owner_lock():
            if self.owner is not None:
                return TokenRows.resident(self.positions[index], self.owner, self.slots[index])
            return TokenRows(self.positions[index], self._taken(index))

    def narrowed(self, keep: Bools) -> TokenRows:
        """Return the rows selected by the mask `keep`, and close these."""
        # Closed only now: between the two pins, the slots would be free to be overwritten.
        kept = self.take(np.flatnonzero(keep))
        self.close()
        return kept

    def split(self, at: int) -> tuple[TokenRows, TokenRows]:
        """Return the rows below position `at`, and the others; close these."""
        first = int(np.searchsorted(self.positions, at))
        parts = self.take(slice(0, first)), self.take(slice(first, None))
        self.close()
        return parts

    def join(self, other: TokenRows) -> TokenRows:
        """Return the rows of both, without a common position, as one object; close both."""
        if other.positions.size and self.positions.size:
            joined = self._merged_with(other)
        else:
            joined = (self if self.positions.size else other).renewed()
        self.close()
        other.close()
        return joined

    def _merged_with(self, other: TokenRows) -> TokenRows:
        """Return the rows of both by position: resident if one owner has both, else on the host."""
        positions = np.concatenate([self.positions, other.positions])
        order = np.argsort(positions)
        with self._owner_lock():
            if self.owner is not None and self.owner is other.owner:
                slots = np.concatenate([self.slots, other.slots])[order]
                return TokenRows.resident(positions[order], self.owner, slots)
        # One lock at a time: two threads taking those of two caches in opposite order would wait
        # for each other.
        return TokenRows(positions[order], _merged(self.to_host(), other.to_host(), order))

    def renewed(self) -> TokenRows:
        """Return the same rows, uncopied, as another object: closing one leaves the other open."""
        with self._owner_lock():
            if self.owner is not None:
                return TokenRows.resident(self.positions, self.owner, self.slots)
            return TokenRows(self.positions, self._layers)


def _merged(one: LayerRows, two: LayerRows, order: npt.NDArray[np.intp]) -> LayerRows:
    """Return the rows of both by layer, sorted by `order`."""
    return {
        layer: tuple(array.take(order) for array in concat_layers([arrays, two[layer]]))
        for layer, arrays in one.items()
    }
