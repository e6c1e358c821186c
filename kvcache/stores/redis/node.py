"""A server: its connections, and whether it answers."""

from __future__ import annotations

import os
import select
import ssl
from collections.abc import Mapping
from typing import Any

from redis.connection import AbstractConnection, Connection, SSLConnection, parse_url
from redis.exceptions import RedisError

from kvcache._locks import Lock
from kvcache.errors import StoreError
from kvcache.stores.outcomes import Deadline

from .breaker import Breaker
from .wire import Replies

_POOL_OPTIONS = ("max_connections", "timeout")
"""Options of URLs that are about the client's own pools."""
_OWN_OPTIONS = {
    "parser_class": Replies,
    "protocol": 2,
    "decode_responses": False,
    "driver_info": None,  # or each connection would begin with two more commands
    "retry": None,
    "retry_on_timeout": False,
    "health_check_interval": 0,
}
"""Whatever the URL says."""
_IDLE = 16
"""Connections kept for later calls, per server."""


class Address:
    """All that a URL tells of connections: to its server, and to the others of a cluster.

    Raises: StoreError for what is no URL of a server, or names certificates that cannot be read.
    """

    def __init__(self, url: str) -> None:
        try:
            self._options: dict[str, Any] = parse_url(url)
            for name in _POOL_OPTIONS:
                self._options.pop(name, None)
            self._kind: type[AbstractConnection] = self._options.pop("connection_class", Connection)
            self._options |= _OWN_OPTIONS
            self.new_connection()
        except Exception as error:  # whatever the client and its options raise
            # Without the URL, which may hold a password.
            raise StoreError(
                f"the client redis refuses the URL: {error}. "
                "Give redis://[user:password@]host:port/database."
            ) from error
        if self._is_encrypted:
            _check_certificates(self._options)

    @property
    def _is_encrypted(self) -> bool:
        return issubclass(self._kind, SSLConnection)

    @property
    def scheme(self) -> str:
        """Beginning of the URL, without what follows a plus sign."""
        return "unix" if "path" in self._options else "rediss" if self._is_encrypted else "redis"

    @property
    def host(self) -> str:
        """Name of the host, or path of the socket."""
        return str(self._options.get("path") or self._options.get("host", "localhost"))

    @property
    def port(self) -> int:
        """Number of the port, 0 for a path."""
        return 0 if "path" in self._options else int(self._options.get("port", 6379))

    def new_connection(self, host: str | None = None, port: int = 0) -> AbstractConnection:
        """Return a connection that is not connected, to another host with the same options."""
        elsewhere = {} if host is None else {"host": host, "port": port}
        return self._kind(**(self._options | elsewhere))


def _check_certificates(options: Mapping[str, Any]) -> None:
    """Read the certificates and the key that a URL names, as each connection will do.

    Raises: StoreError. In the outcomes of calls a wrong path would look like a server that is gone.
    """
    files = {name: options.get(f"ssl_{name}") for name in ("ca_certs", "ca_path", "certfile")}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if files["ca_certs"] or files["ca_path"]:
            context.load_verify_locations(files["ca_certs"], files["ca_path"])
        if files["certfile"]:
            # Not None, with which OpenSSL asks the terminal for the password of an encrypted key.
            password = options.get("ssl_password") or ""
            context.load_cert_chain(files["certfile"], options.get("ssl_keyfile"), password)
    except OSError as error:
        named = ", ".join(f"ssl_{name}={path}" for name, path in files.items() if path)
        raise StoreError(
            f"certificates of the URL cannot be read: {error}; got {named}."
        ) from error


class Node:
    """A server, at the address of the URL or at another one. All calls are thread-safe."""

    def __init__(self, address: Address, host: str | None = None, port: int = 0) -> None:
        self._address = address
        self._elsewhere = (host, port)
        self.host = host or address.host
        self.port = port or address.port
        self.breaker = Breaker()
        self._idle: list[AbstractConnection] = []
        self._closed = False
        self._process = os.getpid()
        self._lock = Lock()

    def __repr__(self) -> str:
        return f"{self.host}:{self.port}" if self.port else self.host

    def take(self, deadline: Deadline, patience: float) -> AbstractConnection:
        """Return a connection, ready for commands and not blocking.

        Raises: RedisError, OSError.
        """
        while (connection := self._pop()) is not None:
            if _is_quiet(connection):
                return connection
            connection.disconnect()
        return self._connected(deadline, patience)

    def give_back(self, connection: AbstractConnection) -> None:
        """Take a connection back that waits for no reply."""
        with self._lock:
            own = connection.pid == os.getpid()
            if own and len(self._idle) < _IDLE and not self._closed:
                self._idle.append(connection)
                return
        connection.disconnect()

    def close(self) -> None:
        """End the connections, those in use when they are given back."""
        self._closed = True
        while (connection := self._pop()) is not None:
            connection.disconnect()

    def _pop(self) -> AbstractConnection | None:
        with self._lock:
            if self._process != os.getpid():  # forked: the connections are the parent's
                self._idle, self._process = [], os.getpid()
            return self._idle.pop() if self._idle else None

    def _connected(self, deadline: Deadline, patience: float) -> AbstractConnection:
        connection = self._address.new_connection(*self._elsewhere)
        # Half of the time that is left: others of a cluster may still answer meanwhile.
        seconds = max(min(deadline.left / 2, patience), 1e-3)
        parser = replies_of(connection)
        parser.deadline = Deadline.after(seconds)
        connection.socket_connect_timeout = connection.socket_timeout = seconds
        try:
            connection.connect()
            parser.socket.setblocking(False)
        except BaseException:
            connection.disconnect()
            raise
        return connection


def replies_of(connection: AbstractConnection) -> Replies:
    """Return the parser of a connection."""
    parser = connection._parser  # the client gives it back by no other name
    if not isinstance(parser, Replies):
        raise RedisError(f"the client reads its replies by {type(parser).__name__}")
    return parser


def _is_quiet(connection: AbstractConnection) -> bool:
    """Return whether nothing came on an idle connection, which is what its end looks like."""
    try:
        parser = replies_of(connection)
        poll = select.poll()
        poll.register(parser.socket, select.POLLIN)
        return not (parser.can_read() or poll.poll(0))
    except (OSError, RedisError, ValueError):
        return False
