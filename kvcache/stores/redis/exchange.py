"""Commands to several servers at once, over several connections each, within a deadline.

One thread serves all connections: whatever a server does, the others are served, and the call ends
in time. The bytes of a value are copied once, between its place and the socket.
"""

from __future__ import annotations

import selectors
import ssl
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence

from redis.connection import AbstractConnection
from redis.exceptions import ConnectionError as ServerConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as ServerTimeoutError

from kvcache.stores.outcomes import Deadline

from .node import Node, replies_of
from .wire import Command, Reply

_WINDOW = 1 << 21
"""Bytes of commands and expected replies under way on a connection: enough to keep it busy."""
_TURN = 1 << 22
"""Bytes that a connection moves before the others and the deadline are looked at."""
_LARGE = 1 << 16
_SMALL = 1 << 12
"""Pieces smaller than this are joined before they are sent."""
_SILENCE = 0.01
"""Seconds; a deadline that passes sooner says nothing about the server."""
_WOULD_BLOCK = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_TROUBLE = (RedisError, OSError)


class Line:
    """A connection of a server while it serves an exchange."""

    def __init__(self, node: Node, connection: AbstractConnection, queue: deque[Command]) -> None:
        self.node, self.connection = node, connection
        self._parser = replies_of(connection)
        self.socket = self._parser.socket
        self._queue = queue
        self._waiting: deque[Command] = deque()
        self._load = 0
        self._pieces: Iterator[bytes | memoryview] = iter(())
        self._out: list[memoryview] = []
        self._reading: Generator[memoryview, int, Reply] | None = None
        self._wanted = memoryview(b"")
        self._turn = 0
        self.is_blocked = False
        """Whether bytes wait for room in the socket."""
        self.watched = 0
        """Events that the exchange waits for."""
        self.answered = False
        self.followed: list[Command] = []
        """Commands that followed replies, and are queued."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be sent, and no reply is due."""
        return not (self._out or self._waiting)

    def work(self) -> None:
        """Send and receive what can be without waiting, a few MiB at a time.

        Raises: RedisError, OSError.
        """
        self._turn = _TURN
        self.is_blocked = False
        while self._send() and self._receive():
            pass

    @property
    def has_more(self) -> bool:
        """Whether the last turn ended before there was something to wait for."""
        return self._turn <= 0

    def fail(self, error: Exception) -> None:
        """Give up all commands that were begun."""
        for command in self._waiting:
            command.fail(error)
        self._waiting.clear()
        self._out.clear()

    def _send(self) -> bool:
        """Send what can be sent; return False if the turn is over."""
        while self._out or self._next_pieces():
            try:
                count = self._send_pieces()
            except _WOULD_BLOCK:
                self.is_blocked = True
                break
            self._turn -= count
            while self._out and count >= self._out[0].nbytes:
                count -= self._out.pop(0).nbytes
            if count:
                self._out[0] = self._out[0][count:]
            if self._turn <= 0:
                return False
        return True

    def _send_pieces(self) -> int:
        """Send what the socket takes; return the number of bytes."""
        if isinstance(self.socket, ssl.SSLSocket):  # takes one buffer at a time
            return self.socket.send(self._out[0])
        return self.socket.sendmsg(self._out)

    def _next_pieces(self) -> bool:
        """Prepare the next bytes: small pieces joined, and a large one behind them.

        A small piece by itself would be a packet, which wakes the server. Return False if there are
        no bytes.
        """
        small = bytearray()
        while len(small) < _LARGE:
            piece = next(self._pieces, None)
            if piece is None:
                if not self._next_command():
                    break
            elif len(piece) < _SMALL:
                small += piece
            else:
                self._out.append(memoryview(piece))
                break
        if small:
            self._out.insert(0, memoryview(small))
        return bool(self._out)

    def _next_command(self) -> bool:
        if not self._queue or (self._waiting and self._load >= _WINDOW):
            return False
        command = self._queue.popleft()
        self._waiting.append(command)
        self._load += command.nbytes
        self._pieces = command.pieces()
        return True

    def _receive(self) -> bool:
        """Receive what is there; return True if a reply has made room for more commands."""
        while self._waiting:
            if self._reading is None and self._begin_reply():
                continue
            try:
                count = self.socket.recv_into(self._wanted)
            except _WOULD_BLOCK:
                return False
            self.answered = True
            self._turn -= count
            if (self._advance(count) and self._queue) or self._turn <= 0:
                return self._turn > 0
        return False

    def _begin_reply(self) -> bool:
        """Begin to read the next reply; return True if it was all there."""
        command = self._waiting[0]
        self._reading = self._parser.reading(None if command.asking else command.sink)
        return self._advance(None)

    def _advance(self, count: int | None) -> bool:
        """Go on reading a reply; return whether it is complete."""
        reading = self._reading
        if reading is None:
            raise ServerConnectionError("no reply is due")
        try:
            self._wanted = next(reading) if count is None else reading.send(count)
        except StopIteration as end:
            self._reading = None
            self._take_reply(end.value)
            return True
        return False

    def _take_reply(self, reply: Reply) -> None:
        command = self._waiting[0]
        if command.asking:  # that was the reply to ASKING
            command.asking = False
            return
        self._waiting.popleft()
        self._load -= command.nbytes
        following = command.take(reply)
        self._queue.extend(following)
        self.followed += following


def exchange(
    work: Mapping[Node, Sequence[Command]], lines: int, deadline: Deadline, patience: float
) -> list[Command]:
    """Send commands to their servers, and fill in their replies, or the errors that came instead.

    lines: connections for large commands, per server. patience: seconds without a byte after which
        those that have not answered are given up. Returns the commands that followed.
    """
    talk = _Exchange(lines, deadline, patience)
    try:
        for node, commands in work.items():
            talk.begin(node, deque(commands))
        with selectors.DefaultSelector() as selector:
            talk.serve(selector)
    finally:
        talk.settle()
    return [command for line in talk.lines for command in line.followed]


class _Exchange:
    def __init__(self, limit: int, deadline: Deadline, patience: float) -> None:
        self._deadline, self._patience = deadline, patience
        self._started = time.monotonic()
        self._queues: dict[Node, deque[Command]] = {}
        self._limits: dict[Node, int] = {}
        self._limit = limit
        self.lines: list[Line] = []
        self._errors: dict[Node, Exception] = {}

    def begin(self, node: Node, queue: deque[Command]) -> None:
        """Open the first line to a server; if that fails, note the error."""
        if not node.breaker.admits():
            _refuse(queue, ServerConnectionError(f"{node} is left alone: its breaker is open"))
            return
        self._queues[node], self._limits[node] = queue, self._limit
        try:
            self._open(node)
        except _TROUBLE as error:
            self._errors[node] = error

    def _open(self, node: Node) -> Line:
        line = Line(node, node.take(self._deadline, self._patience), self._queues[node])
        self.lines.append(line)
        return line

    def serve(self, selector: selectors.BaseSelector) -> None:
        """Move bytes until all is done, or the deadline passes."""
        due = list(self.lines)
        while True:
            due += self._widen()
            for line in due:
                self._work(selector, line)
            more = [line for line in due if line.has_more]
            more += [line for line in self._waiting_lines() if line.is_idle]
            if not more and all(line.is_idle for line in self.lines):
                return
            ready = selector.select(0 if more else min(self._deadline.left, self._patience))
            if self._deadline.passed or not (ready or more):
                self._give_up()
                return
            due = list(dict.fromkeys([*more, *(key.data for key, _ in ready)]))

    def _waiting_lines(self) -> list[Line]:
        """Return the lines of servers for which commands are queued."""
        return [
            line for line in self.lines if self._queues[line.node] and line.connection.is_connected
        ]

    def _widen(self) -> list[Line]:
        """Open more lines where large commands are queued."""
        opened: list[Line] = []
        for node in {line.node for line in self._waiting_lines()}:
            count = sum(line.node is node for line in self.lines)
            if count >= self._limits[node]:
                continue
            large = sum(command.nbytes > _LARGE for command in self._queues[node])
            try:
                for _ in range(min(self._limits[node], count + large) - count):
                    opened += [self._open(node)]
            except _TROUBLE:  # it may allow fewer connections
                self._limits[node] = 0
        return opened

    def _work(self, selector: selectors.BaseSelector, line: Line) -> None:
        try:
            line.work()
        except _TROUBLE as error:
            _watch(selector, line, 0)
            self._fail(line, error)
            return
        # An idle one is not looked at: its end would wake the others all the time.
        reading = 0 if line.is_idle else selectors.EVENT_READ
        _watch(selector, line, reading | (selectors.EVENT_WRITE if line.is_blocked else 0))

    def _give_up(self) -> None:
        error = TimeoutError("no answer before the deadline")
        for line in self.lines:
            if not line.is_idle:
                self._fail(line, error)

    def _fail(self, line: Line, error: Exception) -> None:
        line.fail(error)
        line.connection.disconnect()
        self._errors.setdefault(line.node, error)

    def settle(self) -> None:
        """Give connections back, fail what is still queued, and report how the servers did."""
        answered = {line.node for line in self.lines if line.answered}
        for line in self.lines:
            if line.is_idle and line.connection.is_connected:
                line.node.give_back(line.connection)
            else:
                line.connection.disconnect()
        for node, queue in self._queues.items():
            error = self._errors.get(node)
            _refuse(queue, error or ServerConnectionError("given up"))
            self._report(node, error, node in answered)

    def _report(self, node: Node, error: Exception | None, answered: bool) -> None:
        late = isinstance(error, (TimeoutError, ServerTimeoutError))
        if answered and (error is None or late):
            node.breaker.succeeded()
        elif error is None or (late and time.monotonic() - self._started < _SILENCE):
            node.breaker.gave_up()
        else:
            node.breaker.failed()


def _refuse(queue: deque[Command], error: Exception) -> None:
    while queue:
        queue.popleft().fail(error)


def _watch(selector: selectors.BaseSelector, line: Line, events: int) -> None:
    """Have the selector wait for events of a line, 0 for none."""
    if events == line.watched:
        return
    if not line.watched:
        selector.register(line.socket, events, line)
    elif events:
        selector.modify(line.socket, events, line)
    else:
        selector.unregister(line.socket)
    line.watched = events
