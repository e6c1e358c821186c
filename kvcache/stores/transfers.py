"""One job for a store: look-ups, loads, puts or removals of several keys, in pieces.

Pieces are answered in threads, several at once. The buffers of a job are touched by nobody once it
is over, though a call of a store may still hang: values are copied in when they are there and
verified, and copied out before they are put. A value ends with an XXH3-128 checksum of its key, its
form and its bytes, so that a store which answers with anything else is found out.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import xxhash

from .base import Store, as_keys
from .buffers import buffer_of
from .outcomes import Deadline, Deleted, Hit, Item, Key, Miss, Present, Stored

_logger = logging.getLogger("kvcache.stores")

SUM_NBYTES = 16
_PIECE_NBYTES = 1 << 22
"""Bytes asked for in one call: few, so that their memory is used again while it is in the cache."""
_PIECE_KEYS = 512

Bytes: TypeAlias = "bytes | bytearray | memoryview[int]"


class Sink(NamedTuple):
    """A taker of a value in the place of a buffer, which saves a copy.

    nbytes: of the value; one of another length is not taken. take: called with the value, verified
    and read-only, in a thread of the jobs, once at most and not after the job is over. The end of
    the job waits for it, so it takes note and returns.
    """

    nbytes: int
    take: Callable[[memoryview], None]


class Place(NamedTuple):
    """A buffer that holds the value of a key, or is to hold it.

    buffer: contiguous bytes, writable where values are loaded; or, there, a :class:`Sink`. form:
    the form of the value, such as its shape and dtype; one that was put in another form is not
    loaded.
    """

    key: Key
    buffer: Bytes | Sink
    form: bytes = b""

    @property
    def nbytes(self) -> int:
        """Bytes of the value."""
        buffer = self.buffer
        return buffer.nbytes if isinstance(buffer, Sink) else memoryview(buffer).nbytes


@dataclass(frozen=True)
class Report:
    """Outcome of a job.

    moved: of each key in order, the bytes that were moved, 0 where none had to be, and None where
    the key failed or is not there. seconds: from the beginning of the job to its end.
    """

    moved: tuple[int | None, ...]
    seconds: float

    @property
    def succeeded(self) -> tuple[bool, ...]:
        """Whether each key is there, and was moved if it had to be."""
        return tuple(nbytes is not None for nbytes in self.moved)

    @property
    def nbytes(self) -> int:
        """Bytes that were moved."""
        return sum(nbytes or 0 for nbytes in self.moved)


class Job(ABC):
    """Several keys, and what a store answered so far. It is over once, and reported once."""

    def __init__(
        self, keys: Sequence[Key], deadline: Deadline, then: Callable[[Report], None] | None
    ) -> None:
        self._keys = as_keys(keys)
        self.deadline = deadline
        self._then = then
        self._began = time.monotonic()
        self._moved: list[int | None] = [None] * len(self._keys)
        self._pieces = list(reversed(self._cut()))
        self._unanswered = len(self._pieces)
        self._touching = 0
        self._over = False
        self._changed = threading.Condition()
        self._reported = threading.Event()
        self._report = Report((), 0.0)  # until it is over

    def wait(self) -> Report:
        """Return the report when the job is over, which is at its deadline at the latest."""
        self._reported.wait()
        return self._report

    @property
    def has_pieces(self) -> bool:
        """Whether there is anything to ask for."""
        return bool(self._pieces)

    def next_piece(self) -> range | None:
        """Return the keys that a thread is to ask for next, or None."""
        with self._changed:
            return self._pieces.pop() if self._pieces and not self._over else None

    def answer(self, store: Store, piece: range) -> bool:
        """Ask a store for a piece, and return whether all pieces have an answer."""
        try:
            self._answer(store, piece)
        except Exception:  # of buffers that are not what they should be
            _logger.warning("%d keys of a job failed", len(piece), exc_info=True)
        with self._changed:
            self._unanswered -= 1
            return not self._unanswered

    def end(self) -> bool:
        """End the job and report it, unless that was done; return whether it was this call."""
        with self._changed:
            if self._over:
                return False
            self._over = True
            self._changed.wait_for(lambda: not self._touching)  # copies, of milliseconds
            self._report = Report(tuple(self._moved), time.monotonic() - self._began)
            self._release()
        try:
            if self._then is not None:
                self._then(self._report)
        except Exception:  # which the threads of the store must outlive
            _logger.exception("the end of a job could not be reported")
        self._reported.set()
        return True

    @contextmanager
    def _open(self) -> Iterator[bool]:
        """Keep the job from ending meanwhile; yield False if it is over: hands off then."""
        with self._changed:
            is_open = not self._over
            self._touching += is_open
        try:
            yield is_open
        finally:
            with self._changed:
                self._touching -= is_open
                self._changed.notify_all()

    @property
    def is_put(self) -> bool:
        """Whether it writes, so that reads go first."""
        return False

    def _cut(self) -> list[range]:
        """Return the pieces of the job."""
        count = len(self._keys)
        return [
            range(start, min(start + _PIECE_KEYS, count)) for start in range(0, count, _PIECE_KEYS)
        ]

    @abstractmethod
    def _answer(self, store: Store, piece: range) -> None:
        """Ask a store for a piece, and note what was moved."""

    def _release(self) -> None:  # noqa: B027 - some have no buffers
        """Let go of all buffers."""


class LookUp(Job):
    """Whether there are values under keys."""

    def _answer(self, store: Store, piece: range) -> None:
        keys = [self._keys[index] for index in piece]
        outcomes = store.contains(keys, deadline=self.deadline)
        with self._open() as is_open:
            for index, outcome in zip(piece, outcomes, strict=True):
                if is_open and isinstance(outcome, Present):
                    self._moved[index] = 0


class Removal(Job):
    """Values to be removed; one that is not there is a success."""

    def _answer(self, store: Store, piece: range) -> None:
        keys = [self._keys[index] for index in piece]
        outcomes = store.delete(keys, deadline=self.deadline)
        with self._open() as is_open:
            for index, outcome in zip(piece, outcomes, strict=True):
                if is_open and isinstance(outcome, Deleted | Miss):
                    self._moved[index] = 0


class _Transfer(Job):
    """Values between a store and buffers."""

    def __init__(
        self, places: Sequence[Place], deadline: Deadline, then: Callable[[Report], None] | None
    ) -> None:
        self._places: list[Place] = list(places)
        super().__init__([place.key for place in places], deadline, then)

    def _cut(self) -> list[range]:
        pieces, start, nbytes = [], 0, 0
        for index, place in enumerate(self._places):
            size = place.nbytes
            if index > start and (nbytes + size > _PIECE_NBYTES or index - start == _PIECE_KEYS):
                pieces.append(range(start, index))
                start, nbytes = index, 0
            nbytes += size
        return [*pieces, range(start, len(self._places))] if self._places else []

    def _release(self) -> None:
        self._places.clear()


class Load(_Transfer):
    """Values to be loaded into buffers."""

    def _answer(self, store: Store, piece: range) -> None:
        outcomes = store.get([self._keys[index] for index in piece], deadline=self.deadline)
        wrong = []
        with self._open() as is_open:
            for index, outcome in zip(piece, outcomes, strict=True):
                if is_open and isinstance(outcome, Hit):
                    self._moved[index] = loaded = _load(outcome.value, self._places[index])
                    wrong += [self._keys[index]] if loaded is None else []
        if wrong:  # or nobody could ever put a right one in its place
            store.delete(wrong, deadline=self.deadline)


class Put(_Transfer):
    """Values to be put, except those that are there."""

    @property
    def is_put(self) -> bool:
        return True

    def _answer(self, store: Store, piece: range) -> None:
        there = store.contains([self._keys[index] for index in piece], deadline=self.deadline)
        items: dict[int, Item] = {}
        with self._open() as is_open:
            for index, outcome in zip(piece, there, strict=True):
                if is_open and isinstance(outcome, Present):
                    self._moved[index] = 0
                elif is_open:
                    items[index] = _item(self._places[index])
        outcomes = store.put(items.values(), deadline=self.deadline)
        with self._open() as is_open:
            for (index, item), put in zip(items.items(), outcomes, strict=True):
                if is_open and isinstance(put, Stored):
                    self._moved[index] = item.nbytes - SUM_NBYTES


def _item(place: Place) -> Item:
    """Return a copy of the value in a buffer, and its checksum."""
    if isinstance(place.buffer, Sink):
        raise TypeError("values are put from buffers; got a Sink, which only takes them.")
    value = buffer_of(place.nbytes)
    np.copyto(_flat(value), _flat(place.buffer))
    return Item(place.key, [value, _checksum(place, value)])


def _load(value: memoryview, place: Place) -> int | None:
    """Bring a value to its place, and return its bytes; None if it is not the one wanted."""
    content, checksum = value[:-SUM_NBYTES], value[-SUM_NBYTES:]
    if content.nbytes != place.nbytes or checksum != _checksum(place, content):
        return None
    if isinstance(place.buffer, Sink):
        place.buffer.take(content)
    else:
        np.copyto(_flat(place.buffer), _flat(content))  # without the interpreter's lock
    return content.nbytes


def _flat(buffer: Bytes) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(buffer, np.uint8)


def _checksum(place: Place, content: memoryview) -> bytes:
    checksum = xxhash.xxh3_128(place.key)
    checksum.update(len(place.form).to_bytes(8, "little"))
    checksum.update(place.form)
    checksum.update(content)
    return checksum.digest()
