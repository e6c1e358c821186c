"""The contract of stores: bytes under keys of 256 bits, and an outcome for every key.

A store moves bytes. It knows neither caches nor frameworks, and pages are bytes to it. No call
raises for something that happens to a store (a full disk, a server that is gone, damage): the
outcome says so, and the caller goes on without the value.
"""

from __future__ import annotations

import logging
import math
import reprlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import NamedTuple, Self, TypeAlias, TypeVar

from kvcache._locks import Lock
from kvcache.errors import KVCacheError, StoreError

_logger = logging.getLogger("kvcache.stores")

KEY_NBYTES = 32
"""Bytes of a key: 256 bits."""
_NO_DIGEST = bytes(KEY_NBYTES)
_MAX_POSITION = 2**32 - 1

Key: TypeAlias = bytes
"""Name of a value: a digest of everything that the value depends on."""
Buffer: TypeAlias = bytes | bytearray | memoryview
"""Contiguous bytes. Of an array: ``kvcache.storage.tensors.tensor_bytes``."""
R = TypeVar("R")


class Label(NamedTuple):
    """Description of a value, kept with it, which :meth:`Store.entries` gives without reading it.

    layout: digest of the form of the arrays. parent: key before this one in its chain. Both have
    32 bytes, zeros for none. start, stop: positions ``[start, stop)`` of the value.
    """

    layout: bytes = _NO_DIGEST
    parent: Key = _NO_DIGEST
    start: int = 0
    stop: int = 0


UNLABELLED = Label()


class Item(NamedTuple):
    """A value to be stored: the concatenation of `buffers`, which a store never joins to send."""

    key: Key
    buffers: Sequence[Buffer]
    label: Label = UNLABELLED

    @property
    def nbytes(self) -> int:
        """Bytes of the value."""
        return sum(memoryview(buffer).nbytes for buffer in self.buffers)


class Entry(NamedTuple):
    """A stored value, as :meth:`Store.entries` lists it.

    nbytes: of the value. used: time of the last read or write as far as the store keeps it, in
    seconds since the epoch. uses: number of reads, as far as the store counts them.
    """

    key: Key
    nbytes: int
    label: Label
    used: float
    uses: int = 0


@dataclass(frozen=True)
class Hit:
    """The value, verified: the bytes that were put under the key.

    value: read-only, contiguous, of format "B"; valid as long as it is referred to.
    """

    value: memoryview
    label: Label = UNLABELLED


@dataclass(frozen=True)
class Present:
    """The store has an entry under the key, read by nobody yet: it may prove to be damaged."""


@dataclass(frozen=True)
class Miss:
    """The store has nothing under the key."""


@dataclass(frozen=True)
class Corrupt:
    """The entry is not what was put under the key; it has been removed if that was possible."""

    reason: str


@dataclass(frozen=True)
class Unavailable:
    """The store could not answer, or not before the deadline. Nothing is known of the key."""

    reason: str


@dataclass(frozen=True)
class Stored:
    """The store has a value under the key: this one, or one that was there before."""


@dataclass(frozen=True)
class Refused:
    """The store works and does not take the value: it is larger than the budget, say."""

    reason: str


@dataclass(frozen=True)
class Deleted:
    """The entry is gone."""


GetOutcome: TypeAlias = Hit | Miss | Corrupt | Unavailable
PutOutcome: TypeAlias = Stored | Refused | Unavailable
ContainsOutcome: TypeAlias = Present | Miss | Unavailable
DeleteOutcome: TypeAlias = Deleted | Miss | Unavailable


@dataclass(frozen=True)
class Usage:
    """Entries of a store, and bytes that count against its budget; None for no limit."""

    entries: int
    nbytes: int
    budget: int | None


@dataclass
class StoreStats:
    """Counts since a store object was made: keys by outcome, and bytes of values."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    unavailable: int = 0
    """Keys of calls of every kind that got no answer."""
    stored: int = 0
    refused: int = 0
    evicted: int = 0
    """Entries that this object removed for its budget."""
    bytes_read: int = 0
    bytes_written: int = 0
    """Bytes of values in the outcome :class:`Stored`, written or there before."""

    def copy(self) -> StoreStats:
        """Return the counts of this moment."""
        return StoreStats(*(getattr(self, field.name) for field in fields(self)))


class Deadline:
    """A moment by which a call returns, in the time of ``time.monotonic``.

    One deadline can be given to several calls in a row.
    """

    __slots__ = ("at",)

    def __init__(self, at: float) -> None:
        self.at = at

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Return the moment so many seconds from now."""
        return cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds that are left, 0 when it has passed, infinity for :data:`NEVER`."""
        return max(0.0, self.at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self.at

    def check(self) -> None:
        """Raise TimeoutError if it has passed; the calls of a store make an outcome of that."""
        if self.passed:
            raise TimeoutError("the deadline has passed")


NEVER = Deadline(math.inf)
"""The deadline of calls that may take any time."""


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
            self._close()

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
            outcomes = list(ask())
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
    if not 0 <= label.start <= label.stop <= _MAX_POSITION:
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
