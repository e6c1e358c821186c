"""Outcomes of the calls of a store, and the values, labels and deadlines that these take."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeAlias

KEY_NBYTES = 32
"""Bytes of a key: 256 bits."""
MAX_POSITION = 2**32 - 1
_NO_DIGEST = bytes(KEY_NBYTES)

Key: TypeAlias = bytes
"""Name of a value: a digest of everything that the value depends on."""
Buffer: TypeAlias = "bytes | bytearray | memoryview[int] | memoryview[float]"
"""Contiguous bytes. Of an array: ``kvcache.storage.tensors.tensor_bytes``."""


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
