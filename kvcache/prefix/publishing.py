"""Events over ZeroMQ, as vLLM publishes them: for routers that know where a request is warm.

A message has three parts: the topic, the sequence number (8 bytes, big-endian, from 0 on), and a
batch of events in MessagePack, ``[seconds since 1970, [event, ...], data-parallel rank]``. An event
is a map with its ``type`` and fields; fields after the required ones are left out where None.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from dataclasses import fields
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self, SupportsIndex

from kvcache._checks import NO_LIMIT, as_room, as_sizes
from kvcache.errors import BackendNotAvailableError, EndpointError, NotSupportedError

from .arguments import check_text
from .block_hashes import valid_text
from .events import Event, Events
from .wakes import Wakes

if TYPE_CHECKING:
    import zmq

_logger = logging.getLogger("kvcache.prefix")
_BATCH = 256
"""Events of a batch at most."""
_LINGER = 1.0
"""Seconds that closing waits at most for messages on their way."""
_END = (-1).to_bytes(8, "big", signed=True)
"""Sequence number of the message that ends a replay."""
_OPTIONAL = {"extra_keys"}
"""Fields left out where None."""


class ZmqEventPublisher:
    """Publication of the events of one prefix cache, in the form and on the sockets of vLLM 0.32.

    ::

        publisher = ZmqEventPublisher(prefix.events, "tcp://127.0.0.1:5557", topic="kv@host@model")

    A thread encodes and sends what sessions leave in a queue, so that no session waits. Make it
    before the first session: subscribers know of no block that was stored before.

    events: of the prefix cache, which keeps the publisher alive. endpoint: of the PUB socket; it is
    bound, and where the port is ``*`` a free one is taken. Only an address of this machine's
    network lets others connect. connect: connect there instead, to a router whose SUB socket is
    bound. replay_endpoint: of a ROUTER socket, always bound, which sends again what is asked for
    from a sequence number on; None for none. topic: first part of all messages.
    data_parallel_rank: in every batch; ports do not depend on it.
    buffer_steps: batches kept for replays. hwm: messages waiting for each slow subscriber at most;
    later ones do not reach it. max_queue_size: events waiting for the thread at most. If there are
    more they are dropped and counted, and one sequence number is left out.

    Raises: BackendNotAvailableError without the packages pyzmq and msgspec; EndpointError for an
        endpoint that cannot be bound; TypeError, ValueError for other arguments.
    """

    def __init__(
        self,
        events: Events,
        endpoint: str = "tcp://127.0.0.1:5557",
        *,
        connect: bool = False,
        replay_endpoint: str | None = None,
        topic: str = "",
        data_parallel_rank: SupportsIndex = 0,
        buffer_steps: SupportsIndex = 10_000,
        hwm: SupportsIndex = 100_000,
        max_queue_size: SupportsIndex = 100_000,
    ) -> None:
        if not isinstance(events, Events):
            raise TypeError(f"a publisher takes the events of a prefix cache; got {events!r}.")
        for text in (endpoint, topic, "" if replay_endpoint is None else replay_endpoint):
            _check_unicode(text)
        rank = as_room(data_parallel_rank, "data_parallel_rank")
        sizes = {"buffer_steps": buffer_steps, "hwm": hwm, "max_queue_size": max_queue_size}
        as_sizes(**sizes)
        steps, waiting, queued = (as_room(size, name) for name, size in sizes.items())
        sockets = _Sockets(endpoint, replay_endpoint, steps, waiting, connect=connect)
        self._sender = sender = _Sender(sockets, topic.encode(), rank, steps, queued)
        sender.thread.start()
        self._leave = events.subscribe(self._take)
        # Also at the end of the program, so that what is queued is sent. It must not have the
        # events, which keep this object.
        self._finalizer = weakref.finalize(self, sender.stop)

    def __reduce__(self) -> NoReturn:
        raise NotSupportedError("a publisher is not copied or pickled: it owns sockets. Make one.")

    def _take(self, event: Event) -> None:
        self._sender.take(event)

    @property
    def endpoint(self) -> str:
        """Address of the PUB socket, with the port that was taken."""
        return self._sender.sockets.endpoint

    @property
    def replay_endpoint(self) -> str | None:
        """Address of the ROUTER socket, with the port that was taken; None for none."""
        return self._sender.sockets.replay_endpoint

    @property
    def sent(self) -> int:
        """Events sent so far, whether anybody was subscribed or not."""
        return self._sender.sent

    @property
    def dropped(self) -> int:
        """Events dropped so far, as too many waited, or could not be encoded or sent."""
        return self._sender.dropped

    def close(self) -> None:
        """Send what waits, within a second, and close the sockets. Closing again does nothing."""
        self._leave()
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_unicode(text: str) -> None:
    """Raise TypeError, ValueError unless `text` can be sent."""
    check_text(text, "endpoints and topics are text")
    if valid_text(text) != text:
        raise ValueError(f"endpoints and topics are valid Unicode; got {text!r}.")


def as_map(event: Event) -> dict[str, object]:
    """Return an event as the map that is published: its type first, and no optional None."""
    values = ((field.name, getattr(event, field.name)) for field in fields(event))
    told = {name: value for name, value in values if value is not None or name not in _OPTIONAL}
    return {"type": type(event).__name__, **told}


class _Sockets:
    """The sockets of a publisher; only its thread uses them after they were made."""

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str | None,
        buffer_steps: int,
        hwm: int,
        *,
        connect: bool,
    ) -> None:
        try:
            import msgspec
            import zmq
        except ImportError as error:
            raise BackendNotAvailableError(
                "publishing events needs pyzmq and msgspec. Install them: "
                "pip install 'kvcache[events]'."
            ) from error
        self.encode = msgspec.msgpack.Encoder().encode
        self.wakes, self._poller = Wakes(), zmq.Poller()
        self._poller.register(self.wakes.fileno(), zmq.POLLIN)
        # The one of the process, where inproc endpoints meet. It is never ended: others use it.
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self.publish, self.replay = context.socket(zmq.PUB), None
        try:
            self.publish.set_hwm(hwm)
            self.endpoint = _opened(self.publish, endpoint, connect=connect)
            self.replay_endpoint = replay_endpoint
            if replay_endpoint is not None:
                self.replay = context.socket(zmq.ROUTER)
                # A replay is one burst, and what does not fit is dropped.
                self.replay.set_hwm(min(buffer_steps + 1, NO_LIMIT))
                self.replay_endpoint = _opened(self.replay, replay_endpoint, connect=False)
                self._poller.register(self.replay, zmq.POLLIN)
        except BaseException:
            self.close(0)
            raise

    def wait(self) -> None:
        """Wait until somebody wakes the thread, or asks for a replay."""
        self._poller.poll()
        self.wakes.clear()

    def close(self, seconds: float = _LINGER) -> None:
        self.wakes.close()
        for socket in (self.publish, self.replay):
            if socket is not None:
                socket.close(linger=int(seconds * 1000))


def _opened(socket: zmq.Socket[bytes], endpoint: str, *, connect: bool) -> str:
    """Bind or connect a socket; return its address."""
    import zmq

    try:
        (socket.connect if connect else socket.bind)(endpoint)
    except zmq.ZMQError as error:
        raise EndpointError(
            f"an endpoint is an address that ZeroMQ can {'connect to' if connect else 'bind'}, as "
            f"tcp://127.0.0.1:5557; got {endpoint!r}: {error}."
        ) from error
    return endpoint if connect else socket.getsockopt_string(zmq.LAST_ENDPOINT)


class _Sender:
    """The queue of a publisher, and the thread that empties it.

    The thread has this object and not the publisher, which can be dropped while it runs.
    """

    def __init__(
        self, sockets: _Sockets, topic: bytes, rank: int, buffer_steps: int, limit: int
    ) -> None:
        self.sockets, self.sent, self.dropped = sockets, 0, 0
        self._topic, self._rank, self._limit = topic, rank, limit
        # None where events are missing.
        self._queue: deque[tuple[float, Event] | None] = deque()
        self._missing = self._stopping = False
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer_steps)
        self._number = 0
        self.thread = threading.Thread(target=self._run, name="kvcache-events", daemon=True)

    def take(self, event: Event) -> None:
        """Queue an event, or drop it. Called under the lock of the prefix cache."""
        if len(self._queue) >= self._limit:
            self.dropped += 1
            self._missing = True
            return
        if self._missing:
            self._queue.append(None)
            self._missing = False
        self._queue.append((time.time(), event))
        self.sockets.wakes.wake()

    def stop(self) -> None:
        self._stopping = True
        self.sockets.wakes.wake()
        self.thread.join(_LINGER)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self.sockets.wait()
                self._send_queued()
                self._answer_all()
            self._send_queued()
        finally:
            self.sockets.close()

    def _send_queued(self) -> None:
        while self._queue:
            first = self._queue.popleft()
            if first is None:
                self._number += 1
                continue
            batch = [first[1]]
            while self._queue and len(batch) < _BATCH and (queued := self._queue[0]) is not None:
                batch.append(queued[1])
                self._queue.popleft()
            self._send(first[0], batch)

    def _send(self, moment: float, batch: list[Event]) -> None:
        number = self._number
        self._number += 1
        try:
            payload = self.sockets.encode([moment, [as_map(event) for event in batch], self._rank])
            # Before it is sent: whoever hears of the next number can ask for this one.
            self._buffer.append((number, payload))
            self.sockets.publish.send_multipart((self._topic, number.to_bytes(8, "big"), payload))
            self.sent += len(batch)
        except Exception:
            self.dropped += len(batch)
            _logger.exception("%d events could not be published", len(batch))

    def _answer_all(self) -> None:
        """Send again what was asked for."""
        replay = self.sockets.replay
        while replay is not None and replay.poll(0):
            try:
                self._answer(replay)
            except Exception:
                _logger.exception("a replay of events failed")

    def _answer(self, replay: zmq.Socket[bytes]) -> None:
        request = replay.recv_multipart()
        if len(request) != 3:
            _logger.warning("a replay is asked for by a number; got %r", request)
            return
        client, _, first = request
        wanted = int.from_bytes(first, "big")
        for number, payload in self._buffer:
            if number >= wanted:
                part = number.to_bytes(8, "big")
                replay.send_multipart((client, b"", self._topic, part, payload))
        replay.send_multipart((client, b"", b"", _END, b""))
