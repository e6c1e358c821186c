"""The store on servers: :class:`RedisStore`."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Iterator, Sequence
from typing import SupportsIndex

from redis.exceptions import ConnectionError as ServerConnectionError
from redis.exceptions import TimeoutError as ServerTimeoutError

from kvcache.errors import StoreError
from kvcache.stores.base import Store, describe
from kvcache.stores.outcomes import (
    ContainsOutcome,
    Deadline,
    DeleteOutcome,
    Entry,
    GetOutcome,
    Item,
    Key,
    Miss,
    Present,
    PutOutcome,
    Unavailable,
    Usage,
)

from .manifest import CHUNK_NBYTES, MAX_CHUNK_NBYTES, PREVIEW_NBYTES, Names, preview
from .node import Node
from .reading import Read
from .removing import Removal
from .servers import Cluster, Servers, SingleServer
from .wire import Command, Reply
from .writing import Write

_CLUSTER = "+cluster://"
_WEEK = 7 * 24 * 3600.0
_LISTED = 1000


class RedisStore(Store):
    """Values on a Redis or Valkey server (6.2 or later), or on a cluster of them.

    url: ``redis://``, ``rediss://`` (TLS) or ``unix://`` as the client `redis` takes them, or
        ``redis+cluster://host:port,host:port`` (``rediss+cluster://``), any of the servers of a
        cluster. With TLS a server needs a certificate for its name, signed by an authority that
        the system trusts, or by one in ``?ssl_ca_certs=/path/ca.pem``.
    ttl: seconds that an entry lives after it was put, or put again; None for no end, where chunks
        of writers that are killed still go after ten minutes.
    connections: for large values, per server. chunk_nbytes: of the strings that a large value is
        cut into, 4 MiB at most. timeout: seconds without an answer after which a server is given
        up, whatever the deadline. prefix: of all names on the server.

    The server's ``maxmemory`` is the budget; its policy decides what goes. An entry that lost a
    chunk is missing, and the rest of it is removed by the read that finds out. Nothing is connected
    before the first call. After three calls in a row without an answer, a server is asked only
    now and then, until it answers.

    Raises: StoreError for a wrong URL, ValueError for a wrong option.
    """

    def __init__(
        self,
        url: str = "redis://127.0.0.1:6379",
        *,
        ttl: float | None = _WEEK,
        connections: SupportsIndex = 2,
        chunk_nbytes: SupportsIndex = CHUNK_NBYTES,
        timeout: float = 5.0,
        prefix: str = "kvcache:",
    ) -> None:
        super().__init__()
        if ttl is not None:
            _check_seconds("ttl", ttl)
        _check_seconds("timeout", timeout)
        if "{" in prefix or "}" in prefix:
            raise ValueError(f"a prefix has no braces, which choose a slot; got {prefix!r}.")
        lines, self._chunk_nbytes = _as_positive(connections), _as_positive(chunk_nbytes)
        if self._chunk_nbytes > MAX_CHUNK_NBYTES:
            raise ValueError(
                f"chunk_nbytes is at most {MAX_CHUNK_NBYTES}; got {self._chunk_nbytes}."
            )
        self._ttl = ttl
        self._names = Names(prefix)
        self._servers: Servers
        if _CLUSTER in url:
            self._servers = Cluster(_urls_of_cluster(url), lines, timeout)
        else:
            self._servers = SingleServer(url, lines, timeout)

    def __repr__(self) -> str:
        return f"<RedisStore {self._servers!r}>"  # without a password

    def _get(self, keys: Sequence[Key], deadline: Deadline) -> list[GetOutcome]:
        reads = [Read(key, self._names) for key in keys]
        self._begin(reads, deadline)
        return [read.outcome for read in reads]

    def _put(self, items: Sequence[Item], deadline: Deadline) -> list[PutOutcome]:
        writes = [Write(item, self._names, self._chunk_nbytes, self._ttl) for item in items]
        self._begin(writes, deadline)
        return [write.outcome for write in writes]

    def _begin(self, calls: Sequence[Read | Write | Removal], deadline: Deadline) -> None:
        """Ask all that calls ask for, each going on by itself: none waits for the others."""
        self._ask([command for call in calls for command in call.commands()], deadline)

    def _contains(self, keys: Sequence[Key], deadline: Deadline) -> list[ContainsOutcome]:
        names = [self._names.manifest(key) for key in keys]
        replies = self._ask([Command(name, b"EXISTS", name) for name in names], deadline)
        return [_unavailable(reply) or (Present() if reply == 1 else Miss()) for reply in replies]

    def _delete(self, keys: Sequence[Key], deadline: Deadline) -> list[DeleteOutcome]:
        removals = [Removal(key, self._names) for key in keys]
        self._begin(removals, deadline)
        return [removal.outcome for removal in removals]

    def _ask(self, commands: Sequence[Command], deadline: Deadline) -> list[Reply]:
        self._servers.ask(commands, deadline)
        return [command.reply for command in commands]

    # The whole of it.

    def _entries(self, deadline: Deadline) -> Iterator[Entry]:
        for node in self._servers.masters(deadline):
            for keys in self._listed(node, deadline):
                yield from self._described(node, keys, deadline)

    def _listed(self, node: Node, deadline: Deadline) -> Iterator[list[Key]]:
        """Yield the keys on a server, some at a time, none of them twice."""
        seen: set[Key] = set()
        cursor = b"0"
        while True:
            question = (b"SCAN", cursor, b"MATCH", self._names.pattern, b"COUNT", _LISTED)
            [reply] = self._ask_node(node, [Command(b"", *question)], deadline)
            if not (isinstance(reply, list) and len(reply) == 2 and isinstance(reply[1], list)):
                raise StoreError(f"{node} does not list its keys: {reply!r}")
            cursor, names = _bulk(reply[0]), map(_bulk, reply[1])
            found = dict.fromkeys(key for key in map(self._names.key, names) if key is not None)
            fresh = [key for key in found if key not in seen]
            seen.update(fresh)
            yield fresh
            if cursor in {b"0", b""}:
                return

    def _described(self, node: Node, keys: Sequence[Key], deadline: Deadline) -> Iterator[Entry]:
        commands = []
        for key in keys:
            name = self._names.manifest(key)
            commands += [
                Command(name, b"OBJECT", b"IDLETIME", name),  # before a read makes it 0
                Command(name, b"STRLEN", name),
                Command(name, b"GETRANGE", name, 0, PREVIEW_NBYTES - 1),
            ]
        replies = iter(self._ask_node(node, commands, deadline))
        now = time.time()
        for key, idle, nbytes, beginning in zip(keys, replies, replies, replies, strict=True):
            if isinstance(nbytes, int) and isinstance(beginning, memoryview):
                manifest = preview(key, beginning, nbytes)
                if manifest is not None:
                    # A server that counts uses instead (LFU) does not tell the time.
                    used = now - idle if isinstance(idle, int) else 0.0
                    yield Entry(key, manifest.nbytes, manifest.label, used)

    def _ask_node(self, node: Node, commands: Sequence[Command], deadline: Deadline) -> list[Reply]:
        """Return replies of one server.

        Raises: the error that ended the connection.
        """
        if commands:
            self._servers.ask_node(node, commands, deadline)
        for command in commands:
            if isinstance(command.reply, (OSError, ServerConnectionError, ServerTimeoutError)):
                raise command.reply
        return [command.reply for command in commands]

    def _usage(self, deadline: Deadline) -> Usage:
        """Count entries, and take bytes and their limit from the servers."""
        nodes = self._servers.masters(deadline)
        entries = sum(len(keys) for node in nodes for keys in self._listed(node, deadline))
        used = limit = 0
        limited = True
        for node in nodes:
            memory = self._memory(node, deadline)
            used += memory.get("used_memory", 0)
            limit += memory.get("maxmemory", 0)
            limited = limited and bool(memory.get("maxmemory"))
        return Usage(entries, used, limit if limited else None)

    def _memory(self, node: Node, deadline: Deadline) -> dict[str, int]:
        [reply] = self._ask_node(node, [Command(b"", b"INFO", b"memory")], deadline)
        if not isinstance(reply, memoryview):
            raise StoreError(f"{node} does not tell its memory: {reply!r}")
        lines = bytes(reply).decode("utf-8", "replace").splitlines()
        pairs = (line.partition(":") for line in lines)
        return {name: int(value) for name, _, value in pairs if value.isdecimal()}

    def _close(self) -> None:
        self._servers.close()


def _bulk(reply: Reply) -> bytes:
    return bytes(reply) if isinstance(reply, memoryview) else b""


def _unavailable(reply: Reply) -> Unavailable | None:
    return Unavailable(describe(reply)) if isinstance(reply, Exception) else None


def _urls_of_cluster(url: str) -> list[str]:
    """Return the URLs of the servers that a URL of a cluster names."""
    scheme, _, rest = url.partition(_CLUSTER)
    end = next((index for index, letter in enumerate(rest) if letter in "/?"), len(rest))
    user, at, hosts = rest[:end].rpartition("@")
    return [f"{scheme}://{user}{at}{host}{rest[end:]}" for host in hosts.split(",")]


def _check_seconds(name: str, seconds: float) -> None:
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"{name} is a number of seconds above 0; got {seconds!r}.")


def _as_positive(value: SupportsIndex) -> int:
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"connections and chunk_nbytes are at least 1; got {number}.")
    return number
