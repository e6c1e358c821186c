"""The contract of stores: bytes under keys of 256 bits, and an outcome for every key.

A store moves bytes. It knows neither caches nor frameworks, and pages are bytes to it. No call
raises for something that happens to a store (a full disk, a server that is gone, damage): the
outcome says so, and the caller goes on without the value.
"""

from __future__ import annotations

import logging
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from kvcache._locks import Lock
from kvcache.errors import KVCacheError, StoreError

from .outcomes import (
    KEY_NBYTES,
    MAX_POSITION,
    NEVER,
    Buffer,
    ContainsOutcome,
    Corrupt,
    Deadline,
    DeleteOutcome,
    Entry,
    GetOutcome,
    Hit,
    Item,
    Key,
    Miss,
    PutOutcome,
    Refused,
    Stored,
    StoreStats,
    Unavailable,
    Usage,
)

_logger = logging.getLogger("kvcache.stores")

A = TypeVar("A")
R = TypeVar("R")


class Store(ABC):
    """A place for values outside of caches. All calls may come from several threads at once.

    Calls take several keys and return one outcome for each, in their order. They raise for wrong
    arguments only (TypeError, ValueError); whatever happens to the store is an outcome, a count in
    :attr:`stats`, and one warning of the logger ``kvcache.stores`` per kind of trouble. Every call
    returns at its deadline at the latest, as far as the system interrupts what it does.

    Keys name content: whoever puts a value under a key puts the same content as all others, so that
    a store may keep the value it has. A read returns the bytes that were put, or no bytes.

    Authors of stores write the methods with an underscore. These may raise any Exception: it
    becomes the outcome :class:`Unavailable` of all keys of the call. They get keys that have been
    checked, and at least one.
    """

    def __init__(self) -> None:
        self._counts = StoreStats()
        self._counting = Lock()
        self._warned: set[str] = set()
        self._closed = False

    # What callers use.

    def get(self, keys: Iterable[Key], *, deadline: Deadline = NEVER) -> list[GetOutcome]:
        """Return the values under `keys`, each verified or not given at all."""
        wanted = as_keys(keys)
        outcomes = self._answers(wanted, lambda: self._get(wanted, deadline), deadline)
        self._count(outcomes)
        return outcomes

    def put(self, items: Iterable[Item], *, deadline: Deadline = NEVER) -> list[PutOutcome]:
        """Store values. Their buffers must not change until the call returns."""
        given = [_as_item(item) for item in items]
        outcomes = self._answers(given, lambda: self._put(given, deadline), deadline)
        self._count(outcomes)
        with self._counting:
            self._counts.bytes_written += sum(
                item.nbytes
                for item, outcome in zip(given, outcomes, strict=True)
                if isinstance(outcome, Stored)
            )
        return outcomes

    def contains(self, keys: Iterable[Key], *, deadline: Deadline = NEVER) -> list[ContainsOutcome]:
        """Return whether there are entries under `keys`, without reading their values."""
        wanted = as_keys(keys)
        outcomes = self._answers(wanted, lambda: self._contains(wanted, deadline), deadline)
        self._count([outcome for outcome in outcomes if isinstance(outcome, Unavailable)])
        return outcomes

    def delete(self, keys: Iterable[Key], *, deadline: Deadline = NEVER) -> list[DeleteOutcome]:
        """Remove the entries under `keys`."""
        wanted = as_keys(keys)
        outcomes = self._answers(wanted, lambda: self._delete(wanted, deadline), deadline)
        self._count([outcome for outcome in outcomes if isinstance(outcome, Unavailable)])
        return outcomes

    def entries(self, *, deadline: Deadline = NEVER) -> Iterator[Entry]:
        """Yield all entries, in any order: for inspection, and for those who look what is there.

        Entries that come or go meanwhile are listed or not.

        Raises: StoreError if the store cannot tell, or the deadline passes.
        """
        self._check_open()
        try:
            for entry in self._entries(deadline):
                yield entry
                deadline.check()
        except KVCacheError:
            raise
        except Exception as error:
            raise StoreError(f"the entries of {self!r} cannot be listed: {describe(error)}.") from (
                error
            )

    def usage(self, *, deadline: Deadline = NEVER) -> Usage | Unavailable:
        """Return how much the store holds."""
        [usage] = self._answers([None], lambda: [self._usage(deadline)], deadline)
        return usage

    @property
    def stats(self) -> StoreStats:
        """A copy of the counts so far."""
        with self._counting:
            return self._counts.copy()

    def close(self) -> None:
        """Give up connections, files and threads; entries stay. Closing twice is fine.

        Calls that come later find the store unavailable.
        """
        if not self._closed:
            self._closed = True
            try:
                self._close()
            except Exception as error:  # noqa: BLE001 - nothing that a caller could mend
                self._warn_once("it does not close", describe(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # What authors of stores write.

    @abstractmethod
    def _get(self, keys: Sequence[Key], deadline: Deadline) -> Sequence[GetOutcome]:
        """Return the outcome of each key, with verified values only."""

    @abstractmethod
    def _put(self, items: Sequence[Item], deadline: Deadline) -> Sequence[PutOutcome]:
        """Store each item whole or not at all, and return the outcome of each."""

    @abstractmethod
    def _contains(self, keys: Sequence[Key], deadline: Deadline) -> Sequence[ContainsOutcome]:
        """Return whether there is an entry under each key."""

    @abstractmethod
    def _delete(self, keys: Sequence[Key], deadline: Deadline) -> Sequence[DeleteOutcome]:
        """Remove the entry under each key."""

    @abstractmethod
    def _entries(self, deadline: Deadline) -> Iterator[Entry]:
        """Yield every entry."""

    @abstractmethod
    def _usage(self, deadline: Deadline) -> Usage:
        """Return how much the store holds."""

    def _close(self) -> None:  # noqa: B027 - some have nothing to give up
        """Give up everything but the entries."""

    def _each(
        self, asked: Iterable[A], answer: Callable[[A], R], deadline: Deadline
    ) -> list[R | Unavailable]:
        """Return the outcome of each of `asked` alone, so that the trouble of one is not of all."""
        outcomes: list[R | Unavailable] = []
        for one in asked:
            outcomes += self._answers([one], partial(_alone, answer, one), deadline)
        return outcomes

    def _evicted(self, entries: int) -> None:
        """Count entries removed for the budget."""
        with self._counting:
            self._counts.evicted += entries

    def _warn_once(self, trouble: str, reason: str) -> None:
        """Log a kind of trouble the first time that this object meets it."""
        with self._counting:
            first = trouble not in self._warned
            self._warned.add(trouble)
        if first:
            _logger.warning(
                "%r: %s: %s. Further cases are counted in its stats only.", self, trouble, reason
            )

    # The common part.

    def _answers(
        self,
        asked: Sequence[object],
        ask: Callable[[], Sequence[R]],
        deadline: Deadline,
    ) -> list[R | Unavailable]:
        """Return the outcome of each of `asked`; Unavailable for all if `ask` raises."""
        if not asked:
            return []
        try:
            self._check_open()
            deadline.check()
            outcomes = _as_many(list(ask()), len(asked))
        except Exception as error:  # noqa: BLE001 - a cache goes on, whatever a client raises
            return [Unavailable(describe(error))] * len(asked)
        return [*outcomes]

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"{self!r} is closed. Make a new one.")

    def _count(self, outcomes: Sequence[object]) -> None:
        """Count outcomes by kind, and warn of the first trouble of each kind."""
        with self._counting:
            for outcome in outcomes:
                counter = _COUNTERS.get(type(outcome))
                if counter is not None:
                    setattr(self._counts, counter, getattr(self._counts, counter) + 1)
                if isinstance(outcome, Hit):
                    self._counts.bytes_read += outcome.value.nbytes
        for outcome in outcomes:
            if isinstance(outcome, Corrupt):
                self._warn_once("a value is damaged", outcome.reason)
            elif isinstance(outcome, Unavailable) and not self._closed:
                self._warn_once("the store is unavailable", outcome.reason)


def _as_many(outcomes: list[R], asked: int) -> list[R]:
    if len(outcomes) != asked:
        raise StoreError(f"{asked} were asked for; the store answered {len(outcomes)}")
    return outcomes


def _alone(answer: Callable[[A], R], one: A) -> list[R]:
    return [answer(one)]


_COUNTERS: dict[type, str] = {
    Hit: "hits",
    Miss: "misses",
    Corrupt: "corrupt",
    Unavailable: "unavailable",
    Stored: "stored",
    Refused: "refused",
}


def as_keys(keys: Iterable[Key]) -> list[Key]:
    """Return keys as a list.

    Raises: TypeError for anything but bytes, ValueError for another number of them than 32.
    """
    return [_as_key(key, "a key") for key in keys]


def _as_key(key: object, name: str) -> Key:
    if not isinstance(key, bytes):
        raise TypeError(
            f"{name} is a digest, {KEY_NBYTES} bytes; got {reprlib.repr(key)}. Give keys in a list."
        )
    if len(key) != KEY_NBYTES:
        raise ValueError(f"{name} has {KEY_NBYTES} bytes; got {len(key)}.")
    return key


def _as_item(item: object) -> Item:
    """Return a value to be stored, with its buffers as flat bytes.

    Raises: TypeError, ValueError for a wrong key or label, or for buffers that are not contiguous.
    """
    if not isinstance(item, Item):
        raise TypeError(f"values are put as kvcache.stores.Item; got {type(item).__name__}.")
    key, buffers, label = item
    _as_key(key, "a key")
    _as_key(label.layout, "the layout of a label")
    _as_key(label.parent, "the parent of a label")
    if not 0 <= label.start <= label.stop <= MAX_POSITION:
        raise ValueError(
            f"positions of a label are 0 <= start <= stop < 2**32; got {label.start}, {label.stop}."
        )
    return Item(key, [_as_bytes(buffer) for buffer in buffers], label)


def _as_bytes(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise ValueError("buffers of a value are contiguous; got one that is not. Copy it first.")
    return view.cast("B") if view.nbytes else memoryview(b"")


def describe(error: Exception) -> str:
    """Return an error in words, for the reason of an outcome."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
