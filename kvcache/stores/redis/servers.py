"""Which server has which key: one server, or the masters of a cluster."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError
from redis.exceptions import ConnectionError as ServerConnectionError

from kvcache._locks import Lock
from kvcache.stores.outcomes import Deadline

from .exchange import exchange
from .node import Address, Node
from .wire import Command, Reply

_SLOTS = 16384
_MAX_REDIRECTIONS = 6
_REFRESH_SECONDS = 0.2
"""Time between two questions for the masters of a cluster."""
_ASK_SECONDS = 1.0
"""Time for one server to tell the masters, before the next one is asked."""


class Servers(Protocol):
    """The servers of a store."""

    def ask(self, commands: Sequence[Command], deadline: Deadline) -> None:
        """Fill in the replies of commands, or the errors that came instead. It raises none."""

    def masters(self, deadline: Deadline) -> list[Node]:
        """Return the servers that have all keys together."""

    def ask_node(self, node: Node, commands: Sequence[Command], deadline: Deadline) -> None:
        """Send commands to one server, whatever their keys are."""

    def close(self) -> None:
        """End all connections."""


class SingleServer:
    """One server, with all keys."""

    def __init__(self, url: str, connections: int, patience: float) -> None:
        address = Address(url)
        self._node, self._scheme = Node(address), address.scheme
        self._connections, self._patience = connections, patience

    def __repr__(self) -> str:
        return f"{self._scheme}://{self._node!r}"

    def ask(self, commands: Sequence[Command], deadline: Deadline) -> None:
        if commands:
            exchange({self._node: commands}, self._connections, deadline, self._patience)

    def masters(self, deadline: Deadline) -> list[Node]:
        return [self._node]

    def ask_node(self, node: Node, commands: Sequence[Command], deadline: Deadline) -> None:
        self.ask(commands, deadline)

    def close(self) -> None:
        self._node.close()


class Cluster:
    """The masters of a cluster, each with the keys of some slots.

    Not the cluster client of `redis`, which asks one server after the other, each as long as its
    timeout: here they are asked at once, and none for longer than the deadline.
    """

    def __init__(self, urls: Sequence[str], connections: int, patience: float) -> None:
        addresses = [Address(url) for url in urls]
        self._address = addresses[0]
        self._connections, self._patience = connections, patience
        self._nodes: dict[tuple[str, int], Node] = {}
        self._seeds = [self._node(address.host, address.port) for address in addresses]
        self._masters: list[Node | None] = []
        """By slot; empty until a server has told them."""
        self._outdated = True
        self._asked = 0.0
        self._lock = Lock()

    def __repr__(self) -> str:
        return f"{self._address.scheme}+cluster://" + ",".join(map(repr, self._seeds))

    def ask(self, commands: Sequence[Command], deadline: Deadline) -> None:
        elsewhere: dict[Command, Node] = {}
        due = list(commands)
        for _ in range(1 + _MAX_REDIRECTIONS):
            if not due:
                return
            self._refresh(deadline)
            work = self._by_node(due, elsewhere)
            due += exchange(work, self._connections, deadline, self._patience)
            due = [command for command in due if self._redirected(command, elsewhere)]

    def masters(self, deadline: Deadline) -> list[Node]:
        self._refresh(deadline)
        masters = [node for node in dict.fromkeys(self._masters) if node is not None]
        if not masters:
            raise ServerConnectionError(f"no server of {self!r} tells its masters")
        return masters

    def ask_node(self, node: Node, commands: Sequence[Command], deadline: Deadline) -> None:
        exchange({node: commands}, self._connections, deadline, self._patience)

    def close(self) -> None:
        for node in list(self._nodes.values()):
            node.close()

    def _node(self, host: str, port: int) -> Node:
        node = self._nodes.get((host, port))
        if node is None:
            node = self._nodes.setdefault((host, port), Node(self._address, host, port))
        return node

    def _by_node(
        self, commands: Iterable[Command], elsewhere: dict[Command, Node]
    ) -> dict[Node, list[Command]]:
        work: dict[Node, list[Command]] = {}
        for command in commands:
            slot = key_slot(command.key)
            node = elsewhere.pop(command, None) or self._master(slot)
            if node is None:
                command.fail(ServerConnectionError(f"no server has slot {slot} of {self!r}"))
                self._outdated = True
            else:
                work.setdefault(node, []).append(command)
        return work

    def _redirected(self, command: Command, elsewhere: dict[Command, Node]) -> bool:
        """Return whether a command is to be sent again, to another server."""
        error = command.reply
        if isinstance(error, AskError):  # MovedError is one
            asked = self._master(key_slot(command.key))
            host = error.host or (asked.host if asked else self._address.host)
            elsewhere[command] = self._node(host, error.port)
            command.asking = not isinstance(error, MovedError)
            self._outdated |= not command.asking
            return True
        if isinstance(error, (ServerConnectionError, ClusterDownError, OSError)):
            self._outdated = True
        return False

    # The masters.

    def _master(self, slot: int) -> Node | None:
        masters = self._masters
        return masters[slot] if masters else None

    def _refresh(self, deadline: Deadline) -> None:
        """Ask for the masters if they may have changed, though not all the time."""
        if not self._outdated:
            return
        # Threads that know the masters of before go on with these.
        seconds = 0.0 if any(self._masters) else min(deadline.left, 1e6)
        if not self._lock.acquire(timeout=seconds):
            return
        try:
            due = self._asked + _REFRESH_SECONDS <= time.monotonic()
            if due or not self._masters:
                self._ask_for_masters(deadline)
                self._asked = time.monotonic()
        finally:
            self._lock.release()

    def _ask_for_masters(self, deadline: Deadline) -> None:
        nodes = [*dict.fromkeys(node for node in self._masters if node is not None), *self._seeds]
        for node in sorted(dict.fromkeys(nodes), key=lambda node: node.breaker.failures):
            if deadline.passed:
                return
            question = Command(b"", b"CLUSTER", b"SLOTS")
            seconds = min(deadline.left / 2, _ASK_SECONDS)
            exchange({node: [question]}, 1, Deadline.after(seconds), self._patience)
            masters = self._parsed(question.reply, node)
            if masters:
                self._masters, self._outdated = masters, False
                return

    def _parsed(self, reply: Reply, asked: Node) -> list[Node | None]:
        """Return the master of each slot; an empty list for what is no such reply."""
        masters: list[Node | None] = [None] * _SLOTS
        if not isinstance(reply, list):
            return []
        for entry in reply:
            match entry:
                case [int(start), int(stop), [host, int(port), *_], *_]:
                    name = bytes(host).decode() if isinstance(host, (bytes, memoryview)) else ""
                    # A server that does not know its own name gives none, or a question mark.
                    node = self._node(asked.host if name in ("", "?") else name, port)
                    masters[start : stop + 1] = [node] * (stop + 1 - start)
                case _:
                    return []
        return masters if any(masters) and len(masters) == _SLOTS else []
