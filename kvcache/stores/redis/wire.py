"""Commands to a Redis server and its replies, without copies of what is large.

The client `redis` makes connections and knows their addresses, passwords, encryption and errors.
Its own parsers copy a reply several times, in pieces of 32 KiB; a parser of this module, which a
connection takes as its ``parser_class``, receives bulk replies where they stay.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import xxhash
from redis._parsers import BaseParser
from redis.connection import AbstractConnection
from redis.exceptions import AskError, InvalidResponse
from redis.exceptions import ConnectionError as ServerConnectionError

from kvcache.stores.outcomes import NEVER, Deadline

Reply: TypeAlias = "memoryview | bytes | int | list[Reply] | Exception | None"
"""Bulks come as a memoryview, simple strings as bytes, errors as exceptions, arrays as lists."""

Follow: TypeAlias = "Callable[[], Sequence[Command]]"

_ROOM_NBYTES = 1 << 16
"""Bytes received at a time where no large reply is under way; lines are shorter."""
_PIECE_NBYTES = 1 << 19
"""Bytes received, sent and hashed at a time: the processor still has them in its cache."""
_MAX_UNASKED_NBYTES = 1 << 26
"""Larger replies, except those that a sink receives, are foreign and are thrown away."""
_MAX_ITEMS = 1 << 20


_NO_REPLY = ServerConnectionError("no answer")


class Sink(Protocol):
    """Receiver of a bulk reply."""

    def begin(self, nbytes: int) -> memoryview | None:
        """Return the place for a reply of so many bytes, None for one that cannot be right."""

    def received(self, piece: memoryview) -> None:
        """Take note of the next piece of the reply, a part of that place."""


class Payload:
    """An argument of many bytes, given as views, of which the checksum is known once it is sent."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = views
        self.nbytes = sum(view.nbytes for view in views)
        self.digest = b""

    def pieces(self) -> Iterator[memoryview]:
        """Yield the bytes, each piece hashed when it is due."""
        checksum = xxhash.xxh3_128()
        for view in self._views:
            for start in range(0, view.nbytes, _PIECE_NBYTES):
                piece = view[start : start + _PIECE_NBYTES]
                checksum.update(piece)
                yield piece
        self.digest = checksum.digest()


class Incoming:
    """A bulk reply of known length and checksum, received into a part of a larger buffer."""

    def __init__(self, place: memoryview, digest: bytes) -> None:
        self._place, self._digest = place, digest
        self._checksum = xxhash.xxh3_128()

    def begin(self, nbytes: int) -> memoryview | None:
        self._checksum.reset()
        return self._place if nbytes == self._place.nbytes else None

    def received(self, piece: memoryview) -> None:
        self._checksum.update(piece)

    @property
    def is_right(self) -> bool:
        """Whether what came has the checksum that was announced."""
        return self._checksum.digest() == self._digest


class Command:
    """A command about one key, and its reply, or the error that came instead.

    key: bytes of the key that chooses the server. nbytes: of the payload or the expected reply.
    follow: called when the server has replied; returns commands to be sent then, of the same key.
    """

    __slots__ = ("arguments", "asking", "follow", "key", "nbytes", "reply", "sink")

    def __init__(
        self,
        key: bytes,
        *arguments: bytes | int | Payload,
        sink: Sink | None = None,
        nbytes: int = 0,
        follow: Follow | None = None,
    ) -> None:
        self.key, self.arguments, self.sink, self.follow = key, arguments, sink, follow
        self.nbytes = nbytes + 256
        self.reply: Reply = _NO_REPLY
        self.asking = False

    def take(self, reply: Reply) -> Sequence[Command]:
        """Take the reply of a server, and return the commands that follow."""
        self.reply = reply
        if isinstance(reply, AskError):  # MovedError is one: another server is asked
            return ()
        # `follow` refers to a call, which refers to its commands. In such a cycle a value would
        # stay in memory until the collector comes.
        follow, self.follow = self.follow, None
        return () if follow is None else follow()

    def fail(self, error: Exception) -> None:
        """Take the error that came instead of a reply."""
        self.reply, self.follow = error, None
        # Frames of tracebacks refer to the call: cycles again.
        link: BaseException | None = error
        while link is not None:
            link.__traceback__ = None
            link = link.__context__

    def pieces(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes of the command."""
        # Not the packer of the client, for which an argument is one buffer.
        head = bytearray(b"*1\r\n$6\r\nASKING\r\n" if self.asking else b"")
        head += b"*%d\r\n" % len(self.arguments)
        for argument in self.arguments:
            if isinstance(argument, Payload):
                yield bytes(head + b"$%d\r\n" % argument.nbytes)
                yield from argument.pieces()
                head = bytearray(b"\r\n")
            else:
                text = b"%d" % argument if isinstance(argument, int) else argument
                head += b"$%d\r\n%b\r\n" % (len(text), text)
        yield bytes(head)


class Replies(BaseParser):
    """Parser of the replies of a connection, for its handshake and for exchanges."""

    def __init__(self, socket_read_size: int) -> None:
        self._room = bytearray(_ROOM_NBYTES)
        self._view = memoryview(self._room)
        self._start = self._stop = 0
        self._socket: socket.socket | None = None
        self.deadline: Deadline = NEVER
        """Of the handshake, which blocks."""

    # What the client calls.

    def on_connect(self, connection: AbstractConnection) -> None:
        self._socket = connection._sock  # where the client's own parsers take it
        self._start = self._stop = 0

    def on_disconnect(self) -> None:
        self._socket = None

    def can_read(self, timeout: float = 0) -> bool:
        return self._start < self._stop

    def read_response(self, disable_decoding: bool = False, timeout: object = None) -> Reply:
        """Return the next reply, at the deadline at the latest.

        Raises: TimeoutError, other OSErrors; RedisError if the server ends the connection or
            refuses it.
        """
        reading = self.reading(None)
        try:
            wanted = next(reading)
            while True:
                self.socket.settimeout(max(min(self.deadline.left, 1e6), 1e-3))
                wanted = reading.send(self.socket.recv_into(wanted))
        except StopIteration as end:
            reply: Reply = end.value
        if isinstance(reply, ServerConnectionError):
            raise reply
        return reply

    # What exchanges call.

    @property
    def socket(self) -> socket.socket:
        """The socket of the connection.

        Raises: ConnectionError of the client if there is none.
        """
        if self._socket is None:
            raise ServerConnectionError("not connected")
        return self._socket

    def reading(self, sink: Sink | None) -> Generator[memoryview, int, Reply]:
        """Read one reply: yield places for bytes, take the number received, return the reply.

        Raises: RedisError for a connection that has ended, or for what is no reply.
        """
        try:
            return (yield from self._reply(sink))
        except ValueError as error:  # a length that is no number
            raise InvalidResponse(f"no reply of a Redis server: {error}") from error

    def _reply(self, sink: Sink | None) -> Generator[memoryview, int, Reply]:
        line = yield from self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            return (yield from self._bulk(int(rest), sink))
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        if kind == b"-":
            return _error(rest)
        if kind == b"*":
            return (yield from self._array(int(rest)))
        raise InvalidResponse(f"no reply of a Redis server: {line[:64]!r}")

    def _array(self, count: int) -> Generator[memoryview, int, Reply]:
        if count < 0:
            return None
        if count > _MAX_ITEMS:
            raise InvalidResponse(f"an array of {count} items")
        items: list[Reply] = []
        for _ in range(count):
            items.append((yield from self._reply(None)))  # noqa: PERF401 - no yield in those
        return items

    def _bulk(self, nbytes: int, sink: Sink | None) -> Generator[memoryview, int, Reply]:
        if nbytes < 0:
            return None
        fits = nbytes <= _MAX_UNASKED_NBYTES
        place = sink.begin(nbytes) if sink else np.empty(nbytes, np.uint8).data if fits else None
        if place is None:
            yield from self._discard(nbytes)
        else:
            yield from self._fill(place, sink)
        if (yield from self._line()):
            raise InvalidResponse("a bulk reply is longer than it says")
        return InvalidResponse(f"a string of {nbytes} bytes") if place is None else place

    def _fill(self, place: memoryview, sink: Sink | None) -> Generator[memoryview, int, None]:
        filled = min(self._stop - self._start, place.nbytes)
        place[:filled] = self._view[self._start : self._start + filled]
        self._start += filled
        if sink and filled:
            sink.received(place[:filled])
        while filled < place.nbytes:
            count = _checked((yield place[filled : filled + _PIECE_NBYTES]))
            if sink:
                sink.received(place[filled : filled + count])
            filled += count

    def _discard(self, nbytes: int) -> Generator[memoryview, int, None]:
        while nbytes:
            if self._start == self._stop:
                yield from self._more()
            gone = min(nbytes, self._stop - self._start)
            self._start += gone
            nbytes -= gone

    def _line(self) -> Generator[memoryview, int, bytes]:
        while (end := self._room.find(b"\r\n", self._start, self._stop)) < 0:
            yield from self._more()
        line = bytes(self._view[self._start : end])
        self._start = end + 2
        return line

    def _more(self) -> Generator[memoryview, int, None]:
        """Receive bytes into the room, behind those that are there."""
        left = self._stop - self._start
        if left == _ROOM_NBYTES:
            raise InvalidResponse(f"a line of more than {left} bytes")
        if self._start:
            self._room[:left] = self._room[self._start : self._stop]
            self._start, self._stop = 0, left
        self._stop += _checked((yield self._view[self._stop :]))


def _checked(count: int) -> int:
    if not count:
        raise ServerConnectionError("the server closed the connection")
    return count


def _error(text: bytes) -> Exception:
    error: Exception = BaseParser.parse_error(text.decode("utf-8", "replace"))
    return error
