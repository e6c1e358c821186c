"""A way to wake a thread that waits for sockets."""

from __future__ import annotations

import socket
from contextlib import suppress


class Wakes:
    """A pair of connected sockets: one thread polls, any other wakes it.

    A socket of ZeroMQ belongs to one thread, and a queue of Python cannot be polled beside it.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._awake = False

    def fileno(self) -> int:
        """Return the number of the socket to poll for reading."""
        return self._reader.fileno()

    def wake(self) -> None:
        """Wake the thread that polls, now or when it polls next. Does nothing after the end."""
        if not self._awake:
            self._awake = True
            with suppress(OSError):  # closed by the thread
                self._writer.send(b"\0")

    def clear(self) -> None:
        """Take note of all wakes so far; call it before looking for what they were for."""
        with suppress(OSError):  # none is there, as the thread was woken by something else
            self._reader.recv(64)  # more are never on their way
        # Last: a wake while this is True sends nothing, and what it is for is looked for next.
        self._awake = False

    def close(self) -> None:
        """Close both sockets."""
        self._reader.close()
        self._writer.close()
