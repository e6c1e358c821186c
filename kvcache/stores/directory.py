"""A directory of frames with its index: shared by the processes of one machine.

::

    objects/ab/abcd...      frames, by the hexadecimal digits of their keys
    index.sqlite            sizes, labels and uses of all
    partial/                files that are being written
    writers/                a locked file for each process that writes

A value is written to a partial file, which then takes its name; so a file under a name is whole,
and a reader needs no index. Nothing is forced to the disk: after a crash of the machine a file may
have holes, which its checksum tells.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvcache._locks import Lock
from kvcache.errors import PageError

from . import writers
from .frames import HEADER_NBYTES, PIECE_NBYTES, framed, read_header
from .index import File, Index
from .outcomes import Deadline, Item, Key
from .unlinking import READ_FLAGS

_CREATE_FLAGS = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
_MAX_PIECES = 512
"""Buffers of one call; systems take 1024."""
_FOREVER = 1e6
"""Seconds; a lock takes no infinity."""
_INHERITED: list[object] = []
"""Connections that came here through a fork: SQLite allows neither their use nor their end."""


class Directory:
    """Files of values, each with a row in the index, as one process sees them.

    Threads take turns at the index and write files side by side.
    """

    def __init__(self, path: Path, warn: Callable[[str, str], None]) -> None:
        self.path = path
        self._warn = warn
        self._objects = path / "objects"
        self._index: Index | None = None
        self._writer: writers.Writer | None = None
        self._damaged = False
        self._active: set[Key] = set()  # being written by threads of this process
        self._lock = Lock()

    def path_of(self, key: Key) -> Path:
        """Return the path of the file of a key."""
        name = key.hex()
        return self._objects / name[:2] / name

    @property
    def writer(self) -> str:
        """Name of this process as a writer, once the index is open."""
        if self._writer is None:
            raise RuntimeError("a directory is opened before it is written to.")
        return self._writer.name

    @property
    def is_open(self) -> bool:
        """Whether this process is a writer of the directory, until it closes it."""
        return self._writer is not None

    @contextmanager
    def writing(self, key: Key) -> Iterator[bool]:
        """Give whether no other thread of this process writes a key, and keep others from it."""
        own = False
        try:
            with self._lock:
                if key not in self._active:
                    own = True
                    self._active.add(key)
            yield own
        finally:
            if own:
                self._active.discard(key)

    def write(self, item: Item, deadline: Deadline) -> None:
        """Write the file of an item that has a row, whole or not at all.

        Raises: OSError; TimeoutError is one.
        """
        if self._writer is None:
            raise RuntimeError("a directory is opened before it is written to.")
        partial, path = self._writer.new_partial(), self.path_of(item.key)
        try:
            _write_frame(partial, item, deadline)
            try:
                partial.replace(path)
            except FileNotFoundError:  # the first file of its folder
                path.parent.mkdir(parents=True, exist_ok=True)
                partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    # The index, opened when it is needed.

    @contextmanager
    def changing(self, deadline: Deadline) -> Iterator[Index]:
        """Give the index for a change, with everything settled that this process is done with."""
        with self.opened(deadline) as index, index.changing(deadline):
            self._settle(index, self.writer, self._active)
            yield index

    @contextmanager
    def opened(self, deadline: Deadline) -> Iterator[Index]:
        """Give the index, for this thread alone."""
        if not self._lock.acquire(timeout=min(deadline.left, _FOREVER)):
            raise TimeoutError("the deadline has passed")
        try:
            yield self._current(deadline)
        except sqlite3.DatabaseError as error:
            # Subclasses stand for a full disk, a lock, a value; this one for damage.
            if type(error) is sqlite3.DatabaseError:
                self.close()
                self._damaged = True
            raise
        finally:
            self._lock.release()

    def _current(self, deadline: Deadline) -> Index:
        index, writer = self._index, self._writer
        if index is not None and writer is not None:
            if writer.is_of_this_process and not index.replaced:
                return index
            self.close()
        return self._open(deadline)

    def _open(self, deadline: Deadline) -> Index:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts are private
        self._objects.mkdir(exist_ok=True)
        self._writer = writers.Writer(self.path)
        try:
            self._index = index = self._open_index(deadline)
            with index.changing(deadline):
                # While others write, their files and rows may differ; in a new index none do.
                if self.reclaim_all(index) or index.is_new:
                    index.reconcile(self.stored_keys(), self._adoptable)
        except BaseException:
            self.close()
            raise
        return index

    def _open_index(self, deadline: Deadline) -> Index:
        path = self.path / "index.sqlite"
        try:
            if not self._damaged:
                return Index(path, deadline)
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:
                raise
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        self._damaged = False
        self._warn("its index is damaged", "it is made anew from the files")
        return Index(path, deadline)

    def close(self) -> None:
        """Close index and writer, or leave those of the process that this one was forked from.

        The next call opens them again.
        """
        index, writer = self._index, self._writer
        self._index = self._writer = None
        if writer is None:
            return
        if index is not None:
            if writer.is_of_this_process:
                index.close()
            else:
                _INHERITED.append(index)
                self._active.clear()
        writer.close()

    def _settle(self, index: Index, writer: str, active: set[Key]) -> None:
        """Make what a writer has begun and no longer works on an entry, or nothing."""
        for key in index.unfinished_of(writer):
            if key not in active:
                if os.path.lexists(self.path_of(key)):
                    index.finish(key, writer)
                else:
                    index.remove(key)

    def settle(self, index: Index, key: Key) -> None:
        """Settle what this process has begun, also `key`, which the caller is about to write."""
        self._settle(index, self.writer, self._active - {key})

    def reclaim(self, index: Index, writer: str) -> bool:
        """Clear up behind another writer if it is gone; return whether it is."""
        with writers.gone(self.path, writer) as gone:
            if gone:
                self._settle(index, writer, set())
        return gone

    def reclaim_all(self, index: Index) -> bool:
        """Clear up behind all writers that are gone; return whether all others are."""
        names = writers.others(self.path, self.writer)
        names |= index.unfinished_writers() - {self.writer}
        gone = [self.reclaim(index, name) for name in names]  # each of them, whatever the others
        return all(gone)

    # The files.

    def stored_keys(self) -> set[Key]:
        """Return the keys of all files."""
        keys = set()
        for folder in _listed(self._objects):
            for name in _listed(self._objects / folder):
                with suppress(ValueError):  # not ours
                    key = bytes.fromhex(name)
                    if self.path_of(key) == self._objects / folder / name:
                        keys.add(key)
        return keys

    def file(self, key: Key) -> File | None:
        """Return a file as its header tells of it; None if that is none."""
        try:
            descriptor = os.open(self.path_of(key), READ_FLAGS)
            try:
                status = os.fstat(descriptor)
                label = read_header(os.read(descriptor, HEADER_NBYTES), key, status.st_size)
            finally:
                os.close(descriptor)
        except (OSError, PageError):
            return None
        return File(key, status.st_size, label, status.st_mtime)

    def _adoptable(self, key: Key) -> File | None:
        """Return a file without a row, to get one; remove it if it is none of ours."""
        file = self.file(key)
        if file is None:
            with suppress(OSError):
                self.path_of(key).unlink()
        return file


def _listed(directory: Path) -> list[str]:
    try:
        return [path.name for path in directory.iterdir()]
    except OSError:
        return []


def _write_frame(path: Path, item: Item, deadline: Deadline) -> None:
    descriptor = os.open(path, _CREATE_FLAGS, 0o666)
    try:
        for pieces in _batches(framed(item)):
            _write_all(descriptor, pieces)
            deadline.check()
    finally:
        os.close(descriptor)


def _batches(pieces: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """Yield pieces in lists of some megabytes.

    Pieces end within pages of the file, and a call for each would write these pages twice.
    """
    batch: list[memoryview] = []
    nbytes = 0
    for piece in pieces:
        batch.append(piece)
        nbytes += piece.nbytes
        if nbytes >= PIECE_NBYTES or len(batch) == _MAX_PIECES:
            yield batch
            batch, nbytes = [], 0
    yield batch


def _write_all(descriptor: int, pieces: list[memoryview]) -> None:
    written = os.writev(descriptor, pieces)
    for piece in pieces:
        rest = piece[written:]
        written = max(0, written - piece.nbytes)
        while rest.nbytes:  # the system took less than all
            rest = rest[os.write(descriptor, rest) :]
