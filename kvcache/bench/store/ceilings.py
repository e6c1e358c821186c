"""Ceilings: the same bytes copied in memory, written to and read from plain files, and streamed.

What a read returns is new memory each time, as it is for a store, whose callers keep it. A server
that values are put to has memory at hand, because it evicts others, or finds it page by page; so
has the peer of a stream.
"""

from __future__ import annotations

import mmap
import socket
import threading
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from kvcache.bench.harness.contest import Contestant

from .case import FILE, FRESH_STREAM, MEMCPY, STREAM, StoreCase

_PIECE = 1 << 22


def memcpy(case: StoreCase) -> Contestant:
    """Return a copy of the value to new memory."""
    value = case.value()

    def run(steps: int) -> None:
        for _ in range(steps):
            np.empty(case.nbytes, np.uint8)[:] = value

    return Contestant(MEMCPY, run)


class FileWrites:
    """Writes of the value to files that are new, each of which the rewind removes."""

    def __init__(self, case: StoreCase) -> None:
        self._value, self._directory = case.value().data, case.directory
        self._written: list[Path] = []
        self._number = 0

    def contestant(self) -> Contestant:
        """Return these writes as a contestant."""
        return Contestant(FILE, self.run, self.rewind)

    def run(self, steps: int) -> None:
        """Write as many files."""
        for _ in range(steps):
            path = self._directory / f"plain {self._value.nbytes} {self._number}"
            self._number += 1
            with path.open("wb", buffering=0) as file:
                for start in range(0, self._value.nbytes, _PIECE):
                    file.write(self._value[start : start + _PIECE])
            self._written.append(path)

    def rewind(self, _: int) -> None:
        """Remove all files."""
        for path in self._written:
            path.unlink()
        self._written = []


def file_reads(case: StoreCase) -> Contestant:
    """Return reads of a plain file, which the system holds in memory."""
    path = case.directory / f"read {case.nbytes}"
    path.write_bytes(case.value().data)

    def run(steps: int) -> None:
        for _ in range(steps):
            _fill(np.empty(case.nbytes, np.uint8).data, path)

    return Contestant(FILE, run)


def _fill(buffer: memoryview, path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        start = 0
        while start < buffer.nbytes:
            start += file.readinto(buffer[start:]) or 0


class Stream(ABC):
    """A connection over loopback; a thread is the peer."""

    def __init__(self, case: StoreCase) -> None:
        self._value = case.value().data
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self._own = socket.create_connection(listening.getsockname())
            self._peer, _ = listening.accept()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """End the connection, and the thread with it."""
        self._own.close()

    @abstractmethod
    def contestant(self) -> Contestant:
        """Return transfers of the value as a contestant."""

    @abstractmethod
    def _serve(self) -> None:
        """Do what the peer does, until the connection ends."""


class IncomingStream(Stream):
    """The value comes when it is asked for."""

    def contestant(self) -> Contestant:
        return Contestant(STREAM, self._run)

    def _run(self, steps: int) -> None:
        for _ in range(steps):
            self._own.sendall(b"?")
            _receive(self._own, np.empty(self._value.nbytes, np.uint8).data)

    def _serve(self) -> None:
        with self._peer:
            while self._peer.recv(1):
                self._peer.sendall(self._value)


class OutgoingStream(Stream):
    """The value goes to the peer, which says when it has all of it.

    fresh: whether the peer keeps every value, until the rewind, in memory that the system has to
        find for it; else all values come to one place.
    """

    def __init__(self, case: StoreCase, fresh: bool) -> None:
        self._fresh = fresh
        self._place = np.empty(case.nbytes, np.uint8).data
        self._kept: list[memoryview] = []
        super().__init__(case)

    def contestant(self) -> Contestant:
        if self._fresh:
            return Contestant(FRESH_STREAM, self._run, self._rewind)
        return Contestant(STREAM, self._run)

    def _run(self, steps: int) -> None:
        for _ in range(steps):
            self._own.sendall(self._value)
            self._own.recv(1)

    def _rewind(self, _: int) -> None:
        self._kept.clear()

    def _serve(self) -> None:
        with self._peer:
            while _receive(self._peer, place := self._next_place()):
                if self._fresh:
                    self._kept.append(place)
                self._peer.sendall(b"!")

    def _next_place(self) -> memoryview:
        return _fresh_memory(self._value.nbytes) if self._fresh else self._place


def _fresh_memory(nbytes: int) -> memoryview:
    """Return memory without pages, which come one by one as it is written to."""
    # Private: of memory that could be shared with other processes, a page takes twice as long.
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # on Linux: servers turn huge pages off
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memoryview(memory)


def _receive(connection: socket.socket, buffer: memoryview) -> bool:
    """Fill a buffer; return False if the connection ends before."""
    start = 0
    while start < buffer.nbytes:
        count = connection.recv_into(buffer[start:])
        if not count:
            return False
        start += count
    return True
