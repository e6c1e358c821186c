"""The index of a directory of frames: sizes, labels and uses of all, shared by processes.

The files are the store; the index is its accounts. A file lies under its name only while the index
has a row of it, so the sum of the rows is never less than what the directory takes:

- a row is written before the file, in the state "writing", and holds its bytes of the budget;
- a row is deleted together with the file, in one transaction. If the process is killed in between,
  the row stays and the file is gone, which the next one to look finds.

SQLite keeps transactions of processes apart. An index that is lost or damaged is made anew from the
files.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kvcache.errors import StoreError

from .outcomes import Deadline, Entry, Key, Label

_VERSION = 1
_LONGEST_WAIT = 10.0
"""Seconds to wait for a transaction of another process, without a deadline."""
_WRITING, _READY = 0, 1
_SCHEMA = """
CREATE TABLE entries (
    key BLOB PRIMARY KEY, nbytes INTEGER NOT NULL, state INTEGER NOT NULL, writer TEXT NOT NULL,
    used REAL NOT NULL, uses INTEGER NOT NULL, layout BLOB NOT NULL, parent BLOB NOT NULL,
    start INTEGER NOT NULL, stop INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX by_use ON entries (state, used);
CREATE TABLE total (entries INTEGER NOT NULL, nbytes INTEGER NOT NULL);
INSERT INTO total VALUES (0, 0);
CREATE TRIGGER added AFTER INSERT ON entries BEGIN
    UPDATE total SET entries = entries + 1, nbytes = nbytes + NEW.nbytes;
END;
CREATE TRIGGER removed AFTER DELETE ON entries BEGIN
    UPDATE total SET entries = entries - 1, nbytes = nbytes - OLD.nbytes;
END;
"""


_COLUMNS = "key, nbytes, layout, parent, start, stop, used, uses"


class File(NamedTuple):
    """A frame in the directory, as its header tells of it."""

    key: Key
    nbytes: int
    label: Label
    used: float


class Index:
    """A connection to the index, for one process; one thread at a time.

    Raises: sqlite3.Error, StoreError.
    """

    def __init__(self, path: Path, deadline: Deadline) -> None:
        self._path = path
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(deadline)
        except BaseException:
            self._connection.close()
            raise
        self._identity = _identity(path)

    def _prepare(self, deadline: Deadline) -> None:
        self._wait_until(deadline)
        # A crash of the machine may undo the last transactions, and damages nothing.
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute("PRAGMA trusted_schema = OFF")
        with self.changing(deadline):
            [version] = self._connection.execute("PRAGMA user_version").fetchone()
            self.is_new = version == 0
            if self.is_new:
                for statement in _statements(_SCHEMA):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {_VERSION}")
            elif version != _VERSION:
                raise StoreError(
                    f"indexes of version {_VERSION} are read; {self._path} has {version}. Use "
                    "another directory."
                )

    def _wait_until(self, deadline: Deadline) -> None:
        milliseconds = int(min(deadline.left, _LONGEST_WAIT) * 1000)
        self._connection.execute(f"PRAGMA busy_timeout = {milliseconds}")

    @property
    def replaced(self) -> bool:
        """Whether another process has made the index anew since it was opened here."""
        return _identity(self._path) != self._identity

    @contextmanager
    def changing(self, deadline: Deadline) -> Iterator[None]:
        """Hold the lock of writers for the block, and undo what it did if it raises."""
        self._wait_until(deadline)
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    # Reads.

    def writer_of(self, key: Key) -> str | None:
        """Return who writes `key`: a name, "" for an entry that is there, None for no entry."""
        row = self._connection.execute(
            "SELECT state, writer FROM entries WHERE key = ?", (key,)
        ).fetchone()
        return None if row is None else "" if row[0] == _READY else row[1]

    def totals(self) -> tuple[int, int]:
        """Return the number of rows, and the bytes of their files."""
        entries, nbytes = self._connection.execute("SELECT entries, nbytes FROM total").fetchone()
        return entries, nbytes

    def oldest(self, limit: int) -> list[tuple[Key, int]]:
        """Return keys and bytes of the entries that were used least recently, the oldest first."""
        return self._connection.execute(
            "SELECT key, nbytes FROM entries WHERE state = ? ORDER BY used LIMIT ?",
            (_READY, limit),
        ).fetchall()

    def used_since(self, moment: float) -> list[Entry]:
        """Return all entries that were put or used at `moment` or later."""
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM entries WHERE state = ? AND used >= ? ORDER BY used",  # noqa: S608
            (_READY, moment),
        )
        return [_entry(row) for row in rows]

    def nbytes_of(self, key: Key) -> int | None:
        """Return the bytes of the file of an entry, None without one."""
        row = self._connection.execute(
            "SELECT nbytes FROM entries WHERE key = ? AND state = ?", (key, _READY)
        ).fetchone()
        return None if row is None else row[0]

    def unfinished_of(self, writer: str) -> list[Key]:
        """Return the keys that a writer has begun to write."""
        rows = self._connection.execute(
            "SELECT key FROM entries WHERE state = ? AND writer = ?", (_WRITING, writer)
        )
        return [key for (key,) in rows]

    def unfinished_writers(self) -> set[str]:
        """Return all writers that have begun something."""
        rows = self._connection.execute(
            "SELECT DISTINCT writer FROM entries WHERE state = ?", (_WRITING,)
        )
        return {writer for (writer,) in rows}

    def keys(self) -> set[Key]:
        """Return the keys of all rows."""
        return {key for (key,) in self._connection.execute("SELECT key FROM entries")}

    def entries_after(self, key: Key, limit: int) -> list[Entry]:
        """Return the entries behind `key`, in the order of keys; `nbytes` are of their files."""
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM entries WHERE key > ? AND state = ? ORDER BY key LIMIT ?",  # noqa: S608
            (key, _READY, limit),
        )
        return [_entry(row) for row in rows]

    # Changes, inside of `changing`.

    def begin(self, key: Key, nbytes: int, label: Label, writer: str) -> None:
        """Add a row for a file that `writer` is about to write."""
        self._insert(File(key, nbytes, label, time.time()), _WRITING, writer)

    def adopt(self, file: File) -> None:
        """Add a row for a file that is there."""
        self._insert(file, _READY, "")

    def _insert(self, file: File, state: int, writer: str) -> None:
        self._connection.execute(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?, 0, ?, ?, ?, ?)",
            (file.key, file.nbytes, state, writer, file.used, *file.label),
        )

    def finish(self, key: Key, writer: str) -> None:
        """Make the row of `writer` an entry."""
        self._connection.execute(
            "UPDATE entries SET state = ?, writer = '' WHERE key = ? AND writer = ?",
            (_READY, key, writer),
        )

    def remove(self, key: Key) -> None:
        """Delete a row. The file goes in the same transaction."""
        self._connection.execute("DELETE FROM entries WHERE key = ?", (key,))

    def touch(self, used: Mapping[Key, tuple[float, int]]) -> None:
        """Note the time of the last use, and a number of uses more, of each key."""
        self._connection.executemany(
            "UPDATE entries SET used = max(used, ?), uses = uses + ? WHERE key = ?",
            [(moment, uses, key) for key, (moment, uses) in used.items()],
        )

    def reconcile(self, present: set[Key], read: Callable[[Key], File | None]) -> None:
        """Make the rows those of the files that are `present`.

        read: gives the file of a key; None if it is none, and to be left out.
        """
        known = self.keys()
        for key in present - known:
            file = read(key)
            if file is not None:
                self.adopt(file)
        for key in known - present:
            self.remove(key)


def _entry(row: tuple[Any, ...]) -> Entry:
    return Entry(row[0], row[1], Label(*row[2:6]), *row[6:])


def _statements(script: str) -> Iterator[str]:
    """Yield the statements of a script; ``executescript`` would commit the transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
