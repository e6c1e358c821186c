"""A store as a whole: the tree of its entries, values that prove damaged, and what to remove.

Entries name their parents in their labels, so the tree is found without reading any value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from kvcache.errors import PageError

from .base import Store
from .outcomes import (
    Corrupt,
    Deadline,
    Deleted,
    Entry,
    GetOutcome,
    Hit,
    Key,
    Miss,
    Unavailable,
)
from .pages import decode_page, is_page
from .sealing import Seal

_BATCH_NBYTES = 64 << 20
"""Bytes of values that are read in one call, beyond the first of them."""
_BATCH_KEYS = 100

State: TypeAlias = Literal["whole", "damaged", "foreign", "gone", "unread"]


@dataclass(frozen=True)
class Run:
    """Entries one behind the other, and the runs that begin behind the last of them."""

    entries: tuple[Entry, ...]
    branches: list[Run] = field(default_factory=list)

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self.entries[0].label.start

    @property
    def stop(self) -> int:
        """Position behind the last token."""
        return max(entry.label.stop for entry in self.entries)

    def runs(self) -> Iterator[Run]:
        """Yield this run and all behind it."""
        pending = [self]
        while pending:
            run = pending.pop()
            yield run
            pending += run.branches

    def all_entries(self) -> list[Entry]:
        """Return the entries of this run and of all behind it."""
        return [entry for run in self.runs() for entry in run.entries]

    @property
    def is_cut_off(self) -> bool:
        """Whether tokens before it are in no entry: a lookup from position 0 does not find it."""
        return self.start > 0


def forest(entries: Sequence[Entry]) -> list[Run]:
    """Return the entries by parents, those used last first.

    Labels come from a store that others may write to: parents that go in a circle are entries all
    the same, each of them once.
    """
    by_use = sorted(entries, key=lambda entry: entry.used, reverse=True)
    known = {entry.key for entry in by_use}
    children: dict[Key, list[Entry]] = {}
    for entry in by_use:
        children.setdefault(entry.label.parent, []).append(entry)
    roots: list[Run] = []
    seen: set[Key] = set()
    for entry in by_use:
        if entry.label.parent not in known:
            _grow(roots, entry, children, seen)
    for entry in by_use:  # what no beginning leads to goes in a circle
        _grow(roots, entry, children, seen)
    return sorted(roots, key=_last_use, reverse=True)


def _grow(into: list[Run], first: Entry, children: dict[Key, list[Entry]], seen: set[Key]) -> None:
    """Add the run that begins with an entry, and all behind it."""
    pending = [(first, into)]
    while pending:
        entry, runs = pending.pop()
        following, run = [entry], []
        while len(following) == 1 and following[0].key not in seen:
            [entry] = following
            seen.add(entry.key)
            run.append(entry)
            following = [child for child in children.get(entry.key, ()) if child.key not in seen]
        if run:
            made = Run(tuple(run))
            runs.append(made)
            pending += [(child, made.branches) for child in reversed(following)]


def _last_use(run: Run) -> float:
    return max(entry.used for entry in run.all_entries())


class Finding(NamedTuple):
    """The result of reading a value.

    It is whole, damaged, foreign (its seal does not open), gone since it was listed, or unread.
    """

    entry: Entry
    state: State
    reason: str = ""


def verify(
    store: Store,
    entries: Iterable[Entry],
    seconds: float,
    read: Callable[[int], None],
    seal: Seal | None = None,
) -> Iterator[Finding]:
    """Read all values, and the layouts of the pages among them.

    A read counts as a use, and removes what a checksum finds damaged, as every read does.

    seconds: for one call of the store. read: is told the bytes of the entries of each call. seal:
        opens sealed pages; None leaves them at their checksums.
    """
    for batch in _batches(entries):
        outcomes = store.get([entry.key for entry in batch], deadline=Deadline.after(seconds))
        for entry, outcome in zip(batch, outcomes, strict=True):
            yield Finding(entry, *_judged(entry.key, outcome, seal))
        read(sum(entry.nbytes for entry in batch))


def _judged(key: Key, outcome: GetOutcome, seal: Seal | None) -> tuple[State, str]:
    match outcome:
        case Hit(value):
            if is_page(value, sealed=False):
                return _judged_page(key, outcome, None)
            if seal is not None and is_page(value, sealed=True):
                return _judged_page(key, outcome, seal)
            return "whole", ""
        case Corrupt(reason):
            return "damaged", reason
        case Miss():
            return "gone", "removed since, or it lost a part"
        case Unavailable(reason):
            return "unread", reason


def _judged_page(key: Key, hit: Hit, seal: Seal | None) -> tuple[State, str]:
    try:
        decode_page(hit, key, seal=seal)
    except PageError as error:
        # The page of another tenant does not open either, and is not to be removed.
        return "damaged" if seal is None else "foreign", str(error)
    return "whole", ""


def _batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Yield entries, some at a time, by their number and by the bytes of their values."""
    batch: list[Entry] = []
    nbytes = 0
    for entry in entries:
        if batch and (len(batch) == _BATCH_KEYS or nbytes + entry.nbytes > _BATCH_NBYTES):
            yield batch
            batch, nbytes = [], 0
        batch.append(entry)
        nbytes += entry.nbytes
    if batch:
        yield batch


def older_than(entries: Iterable[Entry], moment: float) -> list[Entry]:
    """Return the entries last used before a moment; those of an unknown time are none of them."""
    return [entry for entry in entries if 0 < entry.used < moment]


def beyond(entries: Collection[Entry], nbytes: int) -> list[Entry]:
    """Return the entries to remove so that values of at most `nbytes` are left.

    Those used least recently come first, and of one time the ends of prefixes before their
    beginnings, without which no lookup would find the ends.
    """
    excess = sum(entry.nbytes for entry in entries) - nbytes
    chosen = []
    for entry in sorted(entries, key=lambda entry: (entry.used, -entry.label.stop)):
        if excess <= 0:
            break
        chosen.append(entry)
        excess -= entry.nbytes
    return chosen


class Removed(NamedTuple):
    """Entries that were removed, were gone already, and got no answer."""

    deleted: int
    gone: int
    unavailable: int


def remove(
    store: Store, entries: Sequence[Entry], seconds: float, done: Callable[[int], None]
) -> Removed:
    """Delete entries. seconds: for one call. done: is told the entries of each call."""
    outcomes = []
    for first in range(0, len(entries), _BATCH_KEYS):
        keys = [entry.key for entry in entries[first : first + _BATCH_KEYS]]
        outcomes += store.delete(keys, deadline=Deadline.after(seconds))
        done(len(keys))
    kinds = [type(outcome) for outcome in outcomes]
    return Removed(kinds.count(Deleted), kinds.count(Miss), kinds.count(Unavailable))
