"""Writes of values to a server: chunks first, the manifest last."""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.stores.base import describe
from kvcache.stores.outcomes import Deadline, Item, PutOutcome, Stored, Unavailable

from .manifest import PREVIEW_NBYTES, Manifest, Names, preview, split
from .servers import Servers
from .wire import Command, Payload, Reply

_UNFINISHED_SECONDS = 600
"""Lifetime of chunks whose manifest is not written yet, and of those that never get one."""
_MARGIN_SECONDS = 60
"""Time that chunks live on after their manifest, for those who read them then."""


class Write:
    """One value on its way out.

    seconds: lifetime, None for no end.
    """

    def __init__(self, item: Item, names: Names, chunk_nbytes: int, seconds: float | None) -> None:
        self._item, self._names, self._seconds = item, names, seconds
        self._name = names.manifest(item.key)
        self._manifest = Manifest.of(item, chunk_nbytes)
        self._chunk_names = names.chunks(item.key, self._manifest)
        self._payloads: list[Payload] = []
        self._commands: list[Command] = []
        self._is_foreign = False
        self._old_names: list[bytes] = []
        self.outcome: PutOutcome | None = None

    def _command(self, *arguments: bytes | int | Payload, nbytes: int = 0) -> Command:
        command = Command(self._name, *arguments, nbytes=nbytes)
        self._commands.append(command)
        return command

    def _take_replies(self) -> list[Reply]:
        """Return the replies of this step; the first error ends the write."""
        replies = [command.reply for command in self._commands]
        self._commands = []
        for reply in replies:
            if isinstance(reply, Exception):
                self.outcome = self.outcome or Unavailable(describe(reply))
        return replies

    # The steps: each gives commands, and takes the replies of those before.

    def look(self) -> list[Command]:
        """Ask for an entry that may be there."""
        if not self._manifest.is_small:  # a small one is written in as many steps as asked for
            self._command(b"STRLEN", self._name)
            self._command(b"GETRANGE", self._name, 0, PREVIEW_NBYTES - 1)
        return self._commands

    def renew(self) -> list[Command]:
        """Renew the lifetime of the entry that is there, and see that it is whole."""
        match self._take_replies():
            case [int(nbytes), memoryview() as beginning] if nbytes:
                there = preview(self._item.key, beginning, nbytes)
                self._is_foreign = there is None
                self._old_names = self._names.chunks(self._item.key, there) if there else []
                self._renew(self._old_names)
        return self._commands

    def _renew(self, chunks: Sequence[bytes]) -> None:
        for name, margin in [*((name, _MARGIN_SECONDS) for name in chunks), (self._name, 0)]:
            if self._seconds is None:
                self._command(b"EXISTS", name)
            else:
                self._command(b"PEXPIRE", name, _milliseconds(self._seconds + margin))

    def replace(self) -> list[Command]:
        """Give up an entry that is not whole."""
        replies = self._take_replies()
        if replies and self.outcome is None:
            if not self._is_foreign and all(reply == 1 for reply in replies):
                self.outcome = Stored()
            else:
                self._unlink([self._name, *self._old_names])
        return self._commands

    def send_chunks(self) -> list[Command]:
        """Write the chunks, each with a lifetime: a writer may end at any time."""
        self._take_replies()
        if self.outcome is None and not self._manifest.is_small:
            lifetime = self._seconds
            seconds = _UNFINISHED_SECONDS if lifetime is None else lifetime + _MARGIN_SECONDS
            chunks = split(self._item.buffers, self._manifest.chunk_nbytes)
            for name, views in zip(self._chunk_names, chunks, strict=True):
                payload = Payload(views)
                self._payloads.append(payload)
                arguments = (b"SET", name, payload, b"PX", _milliseconds(seconds))
                self._command(*arguments, nbytes=payload.nbytes)
        return self._commands

    def send_manifest(self) -> list[Command]:
        """Write the manifest, unless another writer was faster."""
        self._take_replies()
        if self.outcome is None:
            digests = [payload.digest for payload in self._payloads]
            data = self._manifest._replace(digests=digests).pack(self._item)
            lifetime = self._seconds
            px = () if lifetime is None else (b"PX", _milliseconds(lifetime))
            self._command(b"SET", self._name, data, b"NX", *px, nbytes=len(data))
        elif self._payloads:
            self._unlink(self._chunk_names)
        return self._commands

    def settle(self) -> list[Command]:
        """Keep the chunks, or remove those of a writer who came too late."""
        failed = self.outcome is not None
        replies = self._take_replies()
        if failed or self.outcome is not None:
            return []
        self.outcome = Stored()
        if replies != [None]:
            if self._seconds is None:
                for name in self._chunk_names:
                    self._command(b"PERSIST", name)
        elif self._manifest.is_small:
            self._renew([])
        else:
            self._unlink(self._chunk_names)
        return self._commands

    def _unlink(self, names: Sequence[bytes]) -> None:
        for name in names:
            self._command(b"UNLINK", name)


def write(servers: Servers, writes: Sequence[Write], deadline: Deadline) -> list[PutOutcome]:
    """Do all steps of writes, those of one kind together, and return the outcomes."""
    for step in (
        Write.look,
        Write.renew,
        Write.replace,
        Write.send_chunks,
        Write.send_manifest,
        Write.settle,
    ):
        servers.ask([command for one in writes for command in step(one)], deadline)
    return [one.outcome or Unavailable("no answer") for one in writes]


def _milliseconds(seconds: float) -> int:
    return max(1, round(1000 * seconds))
