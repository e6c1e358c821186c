"""Reads of values from a server, many at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from redis.exceptions import InvalidResponse, ResponseError

from kvcache.stores.base import describe
from kvcache.stores.outcomes import (
    Corrupt,
    Deadline,
    GetOutcome,
    Hit,
    Key,
    Miss,
    Unavailable,
)

from .manifest import Manifest, Names, parse
from .servers import Servers
from .wire import Command, Incoming, Reply


class Read:
    """One value on its way in."""

    def __init__(self, key: Key, names: Names) -> None:
        self.key, self._names = key, names
        self._name = names.manifest(key)
        self.manifest_command = Command(self._name, b"GET", self._name)
        self.chunk_commands: list[Command] = []
        self._incoming: list[Incoming] = []
        self._manifest: Manifest | None = None
        self._value = memoryview(b"")
        self.outcome: GetOutcome | None = None
        self.is_broken = False
        """Whether there is an entry that can never be read."""

    def take_manifest(self) -> None:
        """Find out from the manifest what is to be read."""
        reply = self.manifest_command.reply
        if not isinstance(reply, memoryview):
            self._end(_outcome_of(reply))
            return
        manifest = parse(self.key, reply)
        if isinstance(manifest, Corrupt):
            self._end(manifest)
        elif manifest.value is not None:
            self._end(Hit(manifest.value.toreadonly(), manifest.label))
        else:
            self._prepare(manifest)

    def _prepare(self, manifest: Manifest) -> None:
        # Not bytearray, whose zeros are one more pass over the memory.
        self._manifest = manifest
        self._value = np.empty(manifest.nbytes, np.uint8).data
        names = self._names.chunks(self.key, manifest)
        for name, digest, (start, stop) in zip(
            names, manifest.digests, manifest.ranges, strict=True
        ):
            incoming = Incoming(self._value[start:stop], digest)
            self._incoming.append(incoming)
            self.chunk_commands.append(
                Command(self._name, b"GET", name, sink=incoming, nbytes=stop - start)
            )

    def take_chunks(self) -> None:
        """Verify what came."""
        if self.outcome is not None or self._manifest is None:
            return
        troubles = [
            outcome
            for command, incoming in zip(self.chunk_commands, self._incoming, strict=True)
            if (outcome := self._outcome_of_chunk(command.reply, incoming)) is not None
        ]
        # One that did not come says nothing of the others; damage is worse than a gap.
        for kind in (Unavailable, Corrupt, Miss):
            for outcome in troubles:
                if isinstance(outcome, kind):
                    self.is_broken = isinstance(outcome, Miss)  # evicted, or expired
                    self._end(outcome)
                    return
        self._end(Hit(self._value.toreadonly(), self._manifest.label))

    def _outcome_of_chunk(self, reply: Reply, incoming: Incoming) -> GetOutcome | None:
        if reply is None or isinstance(reply, Exception):
            return _outcome_of(reply)
        if incoming.is_right:
            return None
        return Corrupt(f"a chunk of the value of {self.key.hex()} does not match its checksum")

    def _end(self, outcome: GetOutcome) -> None:
        self.outcome = outcome
        self.is_broken = self.is_broken or isinstance(outcome, Corrupt)

    @property
    def names(self) -> list[bytes]:
        """Names of everything of the value, as far as they are known."""
        manifest = self._manifest
        return [self._name, *(self._names.chunks(self.key, manifest) if manifest else [])]


def read(
    servers: Servers,
    names: Names,
    keys: Sequence[Key],
    deadline: Deadline,
    remove: Callable[[Sequence[Read], Deadline], None],
) -> list[GetOutcome]:
    """Return the outcomes of keys; have what is broken removed."""
    reads = [Read(key, names) for key in keys]
    servers.ask([read.manifest_command for read in reads], deadline)
    for one in reads:
        one.take_manifest()
    servers.ask([command for one in reads for command in one.chunk_commands], deadline)
    for one in reads:
        one.take_chunks()
    broken = [one for one in reads if one.is_broken]
    if broken:
        remove(broken, deadline)
    return [one.outcome or Unavailable("no answer") for one in reads]


def _outcome_of(reply: Reply) -> GetOutcome:
    """Return the outcome of a reply that is no value."""
    if reply is None:
        return Miss()
    if isinstance(reply, InvalidResponse):
        return Corrupt(f"the value is foreign: {reply}")
    if isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE"):
        return Corrupt(f"the value is foreign: {reply}")
    if isinstance(reply, Exception):
        return Unavailable(describe(reply))
    return Corrupt("the value is foreign: it is no string of bytes")
