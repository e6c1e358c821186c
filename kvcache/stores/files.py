"""A store in a local directory, shared by the processes of one machine."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import SupportsIndex

from kvcache._checks import as_budget
from kvcache.errors import KVCacheError

from .base import Store
from .directory import Directory
from .eviction import Candidates, Policy
from .frames import OVERHEAD, IncomingFrame
from .index import Index
from .outcomes import (
    ContainsOutcome,
    Corrupt,
    Deadline,
    Deleted,
    DeleteOutcome,
    Entry,
    GetOutcome,
    Hit,
    Item,
    Key,
    Miss,
    Present,
    PutOutcome,
    Refused,
    Stored,
    Usage,
)
from .unlinking import READ_FLAGS, Unlinking

_READ_NBYTES = 1 << 22
"""Bytes read between two looks at the deadline: most values in one call, as threads wait for each
other between calls, and not all of a large one, which is hashed while the processor has it."""
_VICTIMS = 16
_LISTED = 1000
_MAX_TOUCHED = 64
_TOUCH_SECONDS = 1.0
"""Uses are noted in the index so many, or so many seconds, at a time."""
_TROUBLE = (OSError, sqlite3.Error, KVCacheError)  # TimeoutError is an OSError


class FileStore(Store):
    """Values in a local directory, within a budget.

    directory: made when it is needed. Not on a network: SQLite needs the locks of one machine.
    budget: bytes of all files of values, also of those being written, None for no limit. Each
        process keeps its own, so they should agree. The index takes some 300 bytes per value
        beside it.
    policy: chooses what to give up, such as a new ``kvcache.prefix.policies.Cost()``, in this
        process; None for the least recently used.

    Several processes may use one directory. Killed at any point, they leave nothing that is read
    as a value and is none; the next process to write to the directory clears away the rest. A
    directory that cannot be written to can still be read.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        budget: SupportsIndex | None = None,
        policy: Policy | None = None,
    ) -> None:
        super().__init__()
        self._budget = as_budget(budget, "bytes of files")
        # Absolute: the program may change its working directory.
        self._directory = Directory(Path.cwd() / directory, self._warn_once)
        self._candidates = None if policy is None else Candidates(policy)
        self._touched: dict[Key, tuple[float, int]] = {}
        self._touch_time = time.monotonic()

    def __repr__(self) -> str:
        return f"<FileStore {self.directory}>"

    @property
    def directory(self) -> Path:
        """Where the files are."""
        return self._directory.path

    # Reading, which needs no index.

    def _get(self, keys: Sequence[Key], deadline: Deadline) -> Sequence[GetOutcome]:
        outcomes = self._each(keys, lambda key: self._read(key, deadline), deadline)
        self._note_uses(
            [key for key, outcome in zip(keys, outcomes, strict=True) if isinstance(outcome, Hit)]
        )
        return outcomes

    def _read(self, key: Key, deadline: Deadline) -> GetOutcome:
        try:
            descriptor = os.open(self._directory.path_of(key), READ_FLAGS)
        except FileNotFoundError:
            return Miss()
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO):
                raise
            return self._discarded(key, None, f"{key.hex()} is no regular file")
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return self._discarded(key, status, f"{key.hex()} is no regular file")
            outcome = _read_frame(descriptor, key, status.st_size, deadline)
        finally:
            os.close(descriptor)
        if isinstance(outcome, Corrupt):
            return self._discarded(key, status, outcome.reason)
        return outcome

    def _discarded(self, key: Key, status: os.stat_result | None, reason: str) -> Corrupt:
        """Return the outcome for a damaged file, after removing it if that is possible."""
        path = self._directory.path_of(key)
        with suppress(*_TROUBLE), self._changing(Deadline.after(1.0)) as index:
            # Somebody may have put a whole one in its place.
            if status is None or os.path.samestat(status, path.lstat()):
                path.unlink()
                index.remove(key)
        return Corrupt(reason)

    def _note_uses(self, keys: Sequence[Key]) -> None:
        """Remember uses, and note them in the index now and then."""
        now = time.time()
        with self._counting:
            for key in keys:
                self._touched[key] = (now, self._touched.get(key, (now, 0))[1] + 1)
            due = len(self._touched) >= _MAX_TOUCHED
            due = due or time.monotonic() - self._touch_time > _TOUCH_SECONDS
        if due and self._touched:
            # Nearly at once or not at all: a read does not wait for the writers of the index.
            with suppress(*_TROUBLE), self._changing(Deadline.after(0.001)):
                pass
            self._take_touched()  # those that could not be noted would only grow

    def _take_touched(self) -> dict[Key, tuple[float, int]]:
        with self._counting:
            touched, self._touched = self._touched, {}
            self._touch_time = time.monotonic()
        return touched

    def _contains(self, keys: Sequence[Key], deadline: Deadline) -> Sequence[ContainsOutcome]:
        return self._each(keys, self._look_up, deadline)

    def _look_up(self, key: Key) -> ContainsOutcome:
        try:
            self._directory.path_of(key).lstat()
        except FileNotFoundError:
            return Miss()
        return Present()

    # Writing.

    def _put(self, items: Sequence[Item], deadline: Deadline) -> Sequence[PutOutcome]:
        try:
            return self._each(items, lambda item: self._write(item, deadline), deadline)
        finally:
            self._settle_soon(deadline)

    def _write(self, item: Item, deadline: Deadline) -> PutOutcome:
        nbytes = item.nbytes + OVERHEAD
        if self._budget is not None and nbytes > self._budget:
            return Refused(f"a file of {nbytes} bytes is larger than the budget, {self._budget}")
        with self._directory.writing(item.key) as alone:
            if not alone:
                return Refused("another thread is writing it")
            with Unlinking() as unlinking, self._changing(deadline) as index:
                outcome = self._reserve(index, item, nbytes, unlinking)
            if outcome is None:
                self._directory.write(item, deadline)
        return Stored() if outcome is None else outcome

    def _settle_soon(self, deadline: Deadline) -> None:
        """Settle what this process has begun; if that fails, a later change does it."""
        with suppress(*_TROUBLE), self._changing(deadline):
            pass

    def _reserve(
        self, index: Index, item: Item, nbytes: int, unlinking: Unlinking
    ) -> PutOutcome | None:
        """Take bytes of the budget for an item; return None if it is to be written."""
        directory, key = self._directory, item.key
        directory.settle(index, key)
        writer = index.writer_of(key)
        if writer and directory.reclaim(index, writer):
            writer = index.writer_of(key)
        if writer:
            return Refused("another process is writing it")
        if writer is not None:
            if os.path.lexists(directory.path_of(key)):
                index.touch({key: (time.time(), 0)})
                return Stored()
            index.remove(key)
        if not self._make_room(index, nbytes, unlinking):
            directory.reclaim_all(index)
            if not self._make_room(index, nbytes, unlinking):
                return Refused("the budget is taken by values that others are writing")
        index.begin(key, nbytes, item.label, directory.writer)
        return None

    def _make_room(self, index: Index, incoming: int, unlinking: Unlinking) -> bool:
        """Remove entries until there is room for so many bytes; return False if there is none."""
        if self._budget is None:
            return True
        # Files go before the transaction ends. Otherwise a process killed in between would leave
        # files that no row accounts for.
        while (excess := index.totals()[1] + incoming - self._budget) > 0:
            victims = self._victims(index)
            if not victims:
                return False
            for key, nbytes in victims:
                unlinking.unlink(self._directory.path_of(key), nbytes)
                index.remove(key)
                self._evicted(1)
                excess -= nbytes
                if excess <= 0:
                    break
        return True

    def _victims(self, index: Index) -> list[tuple[Key, int]]:
        """Return keys and bytes of the next entries to give up."""
        candidates = self._candidates
        if candidates is not None:
            for entry in index.used_since(candidates.latest):
                candidates.note(entry)
            while (key := candidates.evict()) is not None:
                nbytes = index.nbytes_of(key)
                if nbytes is not None:  # else another process was faster
                    return [(key, nbytes)]
        # Also of what a policy chose and a transaction that failed has kept.
        return index.oldest(_VICTIMS)

    def _delete(self, keys: Sequence[Key], deadline: Deadline) -> Sequence[DeleteOutcome]:
        with self._changing(deadline) as index:
            return [self._delete_one(index, key) for key in keys]

    def _delete_one(self, index: Index, key: Key) -> DeleteOutcome:
        writer = index.writer_of(key)
        try:
            self._directory.path_of(key).unlink()
        except FileNotFoundError:
            outcome: DeleteOutcome = Miss()
        else:
            outcome = Deleted()
        if not writer:  # the row of one that is being written stays its writer's
            index.remove(key)
        return outcome

    @contextmanager
    def _changing(self, deadline: Deadline) -> Iterator[Index]:
        """Give the index for a change, with all uses noted."""
        with self._directory.changing(deadline) as index:
            index.touch(self._take_touched())
            yield index

    # The whole of it.

    def _entries(self, deadline: Deadline) -> Iterator[Entry]:
        try:
            with self._directory.opened(deadline) as index:
                index.totals()
        except _TROUBLE:  # a directory that cannot be written to
            yield from self._entries_of_files()
            return
        last = b""
        while True:
            with self._directory.opened(deadline) as index:
                batch = index.entries_after(last, _LISTED)
            yield from (entry._replace(nbytes=entry.nbytes - OVERHEAD) for entry in batch)
            if len(batch) < _LISTED:
                return
            last = batch[-1].key

    def _entries_of_files(self) -> Iterator[Entry]:
        for key in self._directory.stored_keys():
            file = self._directory.file(key)
            if file is not None:
                yield Entry(key, file.nbytes - OVERHEAD, file.label, file.used)

    def _usage(self, deadline: Deadline) -> Usage:
        with self._directory.opened(deadline) as index:
            return Usage(*index.totals(), self._budget)

    def _close(self) -> None:
        if self._directory.is_open:
            self._settle_soon(Deadline.after(1.0))
        self._directory.close()


def _read_frame(descriptor: int, key: Key, nbytes: int, deadline: Deadline) -> Hit | Corrupt:
    frame = IncomingFrame(key, nbytes)
    start = 0
    while start < nbytes:
        count = os.readv(descriptor, [frame.buffer[start : start + _READ_NBYTES]])
        if not count:  # truncated meanwhile
            break
        frame.received(count)
        start += count
        deadline.check()
    return frame.finish()
