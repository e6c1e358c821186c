"""Rows of some positions of a sequence, in the memory of their cache or of the host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from kvcache._interrupts import uninterrupted
from kvcache._types import Bools, Indices, Int32s
from kvcache.storage.arrays import LayerArrays, Rows, concat_layers

Slots: TypeAlias = Indices
"""Places of rows in their owner: cells of a pool, or slots of a per-layer cache."""
LayerRows: TypeAlias = dict[int, LayerArrays]
"""The arrays of every layer, by layer number."""
R = TypeVar("R")


class RowOwner(ABC):
    """A cache with rows pinned in its memory, or rows that were copied out of one."""

    lock: AbstractContextManager[object]
    """Held while rows change form: their owner may spill them in any thread."""
    own_arrays: int = 0
    """Arrays that the rows of one snapshot have for themselves: 0 in the memory of a cache."""

    @property
    @abstractmethod
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""

    @abstractmethod
    def read(self, slots: Slots) -> LayerRows:
        """Return host copies of the rows in `slots`."""

    @abstractmethod
    def pin(self, rows: TokenRows) -> None:
        """Call ``rows.to_host()`` from now on before their slots are written to.

        Rows already pinned stay pinned, once.
        """

    @abstractmethod
    def unpin(self, rows: TokenRows) -> None:
        """Undo :meth:`pin`; do nothing for rows that are not pinned."""

    @property
    def place(self) -> Hashable:
        """The memory of the rows: those with equal places can be joined without leaving it."""
        return self

    def collect(self, parts: Sequence[tuple[Self, Slots]]) -> tuple[RowOwner, Slots]:
        """Return the rows of all `parts`, owners in one place and slots of theirs, as of one owner.

        In their order. An owner that rows share, as a cache is, moves none.
        """
        return self, np.concatenate([slots for _, slots in parts])

    def detached(self, slots: Slots) -> tuple[RowOwner, Slots] | None:
        """Return copies of the rows in `slots`, which depend on no cache, in the same memory.

        None where they would take up memory of a device other than the host, or where it takes a
        program for each number of them.
        """
        return None


class TokenRows:
    """Rows of some positions of a sequence; their content never changes, only its place.

    positions: int32, ascending; several rows of one position are the frames of encoder output.
    layers: the content in host memory; None for resident rows.
    owner: the cache of resident rows, or copies made by :meth:`detach`.

    Resident rows own no memory: they name slots of their owner, and it spills them to the host
    before it writes there. Copies own what they name.
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
        """Return the rows in `slots` of `owner`, pinned there.

        Pinned rows that nobody knows of would stay so: callers hold interrupts back until they
        have a place for the result, as :func:`exchange` does.
        """
        rows = cls(positions, owner=owner)
        rows.slots = slots  # before pinning, which reads them
        owner.pin(rows)
        return rows

    @classmethod
    def merged(cls, parts: Sequence[TokenRows]) -> TokenRows:
        """Return all rows of `parts`, ascending from one to the next, as an object of its own."""
        held = [rows for rows in parts if rows.positions.size]
        if len(held) < 2:
            return (held or parts)[0].renewed()
        positions = np.concatenate([rows.positions for rows in held])
        with held[0]._owner_lock():
            if (collected := _collected([(rows, slice(None)) for rows in held])) is not None:
                return cls.resident(positions, *collected)
        contents = [rows.content() for rows in held]
        return cls(
            positions,
            {
                layer: concat_layers([content[layer] for content in contents])
                for layer in contents[0]
            },
        )

    @property
    def place(self) -> Hashable:
        """The memory of the rows, None for that of the host: equal where nothing moves in joins."""
        owner = self.owner
        return None if owner is None else owner.place

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, resident or not."""
        owner = self.owner  # read once: another thread may spill the rows in between
        return self.host_nbytes if owner is None else self.positions.size * owner.token_bytes

    @property
    def in_cache(self) -> bool:
        """Whether the rows are in the memory of a cache."""
        owner = self.owner
        return owner is not None and not owner.own_arrays

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory owned by the rows: 0 for resident ones."""
        owner = self.owner
        if owner is not None:
            return self.positions.size * owner.token_bytes if owner.own_arrays else 0
        return sum(array.data.nbytes for arrays in self._layers.values() for array in arrays)

    @property
    def arrays(self) -> int:
        """Number of arrays of all layers that the rows own: 0 for resident ones."""
        owner = self.owner
        return sum(map(len, self._layers.values())) if owner is None else owner.own_arrays

    def to_host(self) -> LayerRows:
        """Spill the rows to host memory, for good, and return them by layer."""
        with self._owner_lock():
            if self.owner is not None:
                # Read before unpinning: free slots may be written to at any time.
                self._become(self.positions, self.owner.read(self.slots))
            return self._layers

    def detached(self) -> TokenRows:
        """Return copies of the rows that depend on no cache, in the same memory or on the host."""
        with self._owner_lock():
            if self.owner is None:
                return self.renewed()
            copied = self.owner.detached(self.slots)
            if copied is not None:
                return TokenRows.resident(self.positions, *copied)
            return TokenRows(self.positions, self.owner.read(self.slots))

    def host_copies(self) -> LayerRows:
        """Return host copies of all rows, which stay where they are."""
        return self.read(np.arange(self.positions.size)) if self.positions.size else {}

    def content(self) -> LayerRows:
        """Return the content by layer, in host memory: a copy of resident rows, which stay so."""
        with self._owner_lock():
            return self._layers if self.owner is None else self.owner.read(self.slots)

    def move_to_host(self, layers: LayerRows) -> None:
        """Hold `layers`, just read from the owner under its lock, instead of its slots."""
        self._become(self.positions, layers)

    def move_to(self, copied: TokenRows) -> None:
        """Hold what `copied` holds, the same rows in another place, which is given up."""
        self._become(self.positions, copied._layers)
        self.owner, self.slots = copied.owner, copied.slots
        copied.owner = None

    def close(self) -> None:
        """Give up slots and memory. Closing twice is fine."""
        with self._owner_lock():
            self._become(self.positions[:0], {})

    def _become(self, positions: Int32s, layers: LayerRows) -> None:
        """Unpin the rows; keep `positions` and `layers`, in host memory."""
        with uninterrupted():
            if self.owner is not None:
                self.owner.unpin(self)
            self.owner, self.slots = None, self.slots[:0]
            self.positions, self._layers = positions, layers

    def savepoint(self) -> Callable[[], None]:
        """Return a function that makes the rows what they are now, spilled or closed since.

        Call it only while their slots have not been written to since.
        """
        positions, owner, slots, layers = self.positions, self.owner, self.slots, self._layers

        def undo() -> None:
            self.positions, self.owner = positions, owner
            self.slots, self._layers = slots, layers
            if owner is not None:
                owner.pin(self)

        return undo

    def _owner_lock(self) -> AbstractContextManager[object]:
        """Return the lock to hold while relying on `owner`.

        Check `owner` again under the lock: another thread may have spilled the rows. Rows without
        an owner never get one, and need no lock.
        """
        owner = self.owner
        return nullcontext() if owner is None else owner.lock

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
                collected = self.owner.collect([(self.owner, self.slots[index])])
                return TokenRows.resident(self.positions[index], *collected)
            return TokenRows(self.positions[index], self._taken(index))

    def split(self, at: int) -> tuple[TokenRows, TokenRows]:
        """Return the rows below position `at`, and the others; close these."""
        return exchange([self], lambda: self.pieces(at), lambda pieces: (pieces[0], pieces[1]))

    def pieces(self, at: int) -> Iterator[TokenRows]:
        """Yield the rows below position `at`, and then the others, as objects of their own."""
        first = int(np.searchsorted(self.positions, at))
        yield self.take(slice(0, first))
        yield self.take(slice(first, None))

    def join(self, other: TokenRows) -> TokenRows:
        """Return the rows of both, without a common position, as one object; close both."""
        return exchange([self, other], lambda: [self.joined(other)], lambda rows: rows[0])

    def joined(self, other: TokenRows, new: Bools | None = None) -> TokenRows:
        """Return these rows and those of `other` as an object of its own; both stay as they are.

        new: which rows of `other` are meant: none with a position that these have. None: all.
        """
        every = new is None or bool(new.all())
        index = np.arange(other.positions.size) if new is None else np.flatnonzero(new)
        if not index.size:
            return self.renewed()
        if not self.positions.size:
            return other.renewed() if every else other.take(index)
        positions = np.concatenate([self.positions, other.positions[index]])
        order = np.argsort(positions, kind="stable")  # frames of one position stay in order
        with self._owner_lock():
            if (collected := _collected([(self, slice(None)), (other, index)])) is not None:
                owner, slots = collected
                return TokenRows.resident(positions[order], owner, slots[order])
        others = other.content() if every else other.read(index)
        return TokenRows(positions[order], _merged(self.content(), others, order))

    def renewed(self) -> TokenRows:
        """Return the same rows, uncopied, as another object: closing one leaves the other open."""
        with self._owner_lock():
            if self.owner is not None:
                return TokenRows.resident(self.positions, self.owner, self.slots)
            return TokenRows(self.positions, self._layers)


def exchange(
    old: Sequence[TokenRows],
    make: Callable[[], Iterable[TokenRows]],
    wrap: Callable[[list[TokenRows]], R],
) -> R:
    """Return ``wrap`` of the rows that `make` makes, and close `old`: all of it, or nothing.

    If something raises, Ctrl-C included, rows made by then are closed, and `old` are as they were.
    New rows are pinned before old ones are closed, so that no slot is free to be overwritten in
    between.
    """
    return _holding(_locks_of(old), lambda: _exchanged(old, make, wrap))


def _exchanged(
    old: Sequence[TokenRows],
    make: Callable[[], Iterable[TokenRows]],
    wrap: Callable[[list[TokenRows]], R],
) -> R:
    undos, made = [rows.savepoint() for rows in old], list[TokenRows]()
    try:
        with uninterrupted():  # what was made but is not in the list yet would stay pinned
            for rows in make():
                made.append(rows)  # one by one, so that an error finds them here
            result = wrap(made)
            for rows in old:
                rows.close()
            return result
    except BaseException:
        for undo in undos:
            undo()
        for rows in made:
            rows.close()
        raise


def close_all(rows: Sequence[TokenRows]) -> None:
    """Close all of `rows`."""
    with uninterrupted():
        for closed in rows:
            closed.close()


def detach_all(rows: Sequence[TokenRows]) -> None:
    """Make all of `rows` copies of themselves that depend on no cache; or none, if one fails."""

    def detach() -> None:
        copies = [TokenRows.detached(own) for own in rows]
        with uninterrupted():
            for own, copied in zip(rows, copies, strict=True):
                own.move_to(copied)

    _holding(_locks_of(rows), detach)


def spill_all(rows: Sequence[TokenRows]) -> None:
    """Spill all of `rows` to host memory, or none if one cannot be read."""

    def spill() -> None:
        contents = [spilled.content() for spilled in rows]
        with uninterrupted():
            for spilled, layers in zip(rows, contents, strict=True):
                spilled.move_to_host(layers)

    _holding(_locks_of(rows), spill)


def _collected(
    parts: Sequence[tuple[TokenRows, npt.NDArray[np.intp] | slice]],
) -> tuple[RowOwner, Slots] | None:
    """Return the rows at an index each as of one owner; None if they are not in one place."""
    owned = [
        (owner, rows.slots[index]) for rows, index in parts if (owner := rows.owner) is not None
    ]
    if len(owned) < len(parts) or len({owner.place for owner, _ in owned}) > 1:
        return None
    return owned[0][0].collect(owned)


def _locks_of(rows: Sequence[TokenRows]) -> list[AbstractContextManager[object]]:
    """Return the locks of the owners of `rows`, sorted.

    Two threads that took those of two caches in opposite order would wait for each other.
    """
    owners = [owner for pinned in rows if (owner := pinned.owner) is not None]
    locks = {id(owner.lock): owner.lock for owner in owners}
    return [lock for _, lock in sorted(locks.items())]


def _holding(locks: Sequence[AbstractContextManager[object]], run: Callable[[], R]) -> R:
    """Return the result of `run`, called while holding `locks`."""
    if not locks:
        return run()
    with locks[0]:
        return _holding(locks[1:], run)


def _merged(one: LayerRows, two: LayerRows, order: npt.NDArray[np.intp]) -> LayerRows:
    """Return the rows of both by layer, sorted by `order`."""
    return {
        layer: tuple(array.take(order) for array in concat_layers([arrays, two[layer]]))
        for layer, arrays in one.items()
    }
