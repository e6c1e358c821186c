"""Reads of values from a server, many at a time."""

from __future__ import annotations

from redis.exceptions import InvalidResponse

from kvcache.stores.base import describe
from kvcache.stores.buffers import buffer_of
from kvcache.stores.outcomes import (
    Corrupt,
    GetOutcome,
    Hit,
    Key,
    Miss,
    Unavailable,
)

from .manifest import Manifest, Names, parse
from .removing import Removal, is_of_another_type
from .wire import Command, Incoming, Reply


class Read:
    """One value on its way in."""

    def __init__(self, key: Key, names: Names) -> None:
        self._key, self._names = key, names
        self._name = names.manifest(key)
        self._manifest_command = Command(self._name, b"GET", self._name, follow=self._go_on)
        self._chunk_commands: list[Command] = []
        self._incoming: list[Incoming] = []
        self._manifest: Manifest | None = None
        self._value = memoryview(b"")
        self._left = 0
        self._outcome: GetOutcome | None = None

    def commands(self) -> list[Command]:
        """Return what is to be asked at first."""
        return [self._manifest_command]

    @property
    def outcome(self) -> GetOutcome:
        """The outcome, once all is asked."""
        if self._outcome is not None:
            return self._outcome
        for command in (self._manifest_command, *self._chunk_commands):
            if isinstance(command.reply, Exception):
                return Unavailable(describe(command.reply))
        return Unavailable("no answer")

    def _go_on(self) -> list[Command]:
        """Ask for the chunks that the manifest names."""
        reply = self._manifest_command.reply
        if not isinstance(reply, memoryview):
            return self._end(_outcome_of(reply))
        manifest = parse(self._key, reply)
        if isinstance(manifest, Corrupt):
            return self._end(manifest)
        if manifest.value is not None:
            return self._end(Hit(manifest.value.toreadonly(), manifest.label))
        return self._ask_for_chunks(manifest)

    def _ask_for_chunks(self, manifest: Manifest) -> list[Command]:
        try:
            self._value = buffer_of(manifest.nbytes)
        except MemoryError as error:
            return self._end(Unavailable(describe(error)))
        self._manifest, self._left = manifest, manifest.chunks
        names = self._names.chunks(self._key, manifest)
        for name, digest, (start, stop) in zip(
            names, manifest.digests, manifest.ranges, strict=True
        ):
            incoming = Incoming(self._value[start:stop], digest)
            command = Command(
                self._name,
                b"GET",
                name,
                sink=incoming,
                nbytes=stop - start,
                follow=self._take_chunk,
            )
            self._incoming.append(incoming)
            self._chunk_commands.append(command)
        return list(self._chunk_commands)

    def _take_chunk(self) -> list[Command]:
        """Verify the value when its last chunk is there."""
        self._left -= 1
        if self._left or self._manifest is None:
            return []
        troubles = [
            outcome
            for command, incoming in zip(self._chunk_commands, self._incoming, strict=True)
            if (outcome := self._outcome_of_chunk(command.reply, incoming)) is not None
        ]
        # One that did not come says nothing of the others; damage is worse than a gap.
        for kind in (Unavailable, Corrupt, Miss):
            for outcome in troubles:
                if isinstance(outcome, kind):
                    return self._end(outcome)
        return self._end(Hit(self._value.toreadonly(), self._manifest.label))

    def _outcome_of_chunk(self, reply: Reply, incoming: Incoming) -> GetOutcome | None:
        if not isinstance(reply, memoryview):
            return _outcome_of(reply)
        if incoming.is_right:
            return None
        return Corrupt(f"a chunk of the value of {self._key.hex()} does not match its checksum")

    def _end(self, outcome: GetOutcome) -> list[Command]:
        """Take the outcome, and have an entry removed that can never be read."""
        self._outcome = outcome
        incomplete = isinstance(outcome, Miss) and self._manifest is not None  # evicted, expired
        if not (incomplete or isinstance(outcome, Corrupt)):
            return []
        chunks = self._names.chunks(self._key, self._manifest) if self._manifest else []
        return Removal(self._key, self._names, chunks).commands()


def _outcome_of(reply: Reply) -> GetOutcome:
    """Return the outcome of a reply that is no value."""
    if reply is None:
        return Miss()
    if isinstance(reply, Exception) and not (
        isinstance(reply, InvalidResponse) or is_of_another_type(reply)
    ):
        return Unavailable(describe(reply))
    return Corrupt(f"what lies there is foreign: {reply!r}")
