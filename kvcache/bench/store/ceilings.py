"""Ceilings: the same bytes copied in memory, written to and read from plain files, and streamed.

What a read returns is new memory each time, as it is for a store, whose callers keep it.
"""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import numpy as np

from kvcache.bench.harness.contest import Contestant

from .case import FILE, MEMCPY, STREAM, StoreCase

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


class Stream:
    """A connection over loopback, at whose other end a thread sends the value when it is asked."""

    def __init__(self, case: StoreCase) -> None:
        self._value = case.value().data
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self._receiving = socket.create_connection(listening.getsockname())
            self._sending, _ = listening.accept()
        threading.Thread(target=self._serve, daemon=True).start()

    def contestant(self) -> Contestant:
        """Return a receiver of the value as a contestant."""
        return Contestant(STREAM, self.run)

    def run(self, steps: int) -> None:
        """Receive the value as many times."""
        for _ in range(steps):
            self._receiving.sendall(b"?")
            buffer, start = np.empty(self._value.nbytes, np.uint8).data, 0
            while start < buffer.nbytes:
                start += self._receiving.recv_into(buffer[start:])

    def close(self) -> None:
        """End the connection, and the thread with it."""
        self._receiving.close()

    def _serve(self) -> None:
        with self._sending:
            while self._sending.recv(1):
                self._sending.sendall(self._value)
