"""Writes of values to a server: chunks first, the manifest last."""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.stores.base import describe
from kvcache.stores.outcomes import Item, PutOutcome, Stored, Unavailable

from .manifest import PREVIEW_NBYTES, Manifest, Names, preview, split
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
        self._outcome: PutOutcome | None = None
        self._left = 0
        """Replies that are due before the next step."""
        # Not methods of this object, which would refer to it: see Command.take.
        self._steps = iter(
            (
                Write._look,
                Write._renew_old,
                Write._replace_old,
                Write._send_chunks,
                Write._send_manifest,
                Write._settle,
            )
        )

    def commands(self) -> list[Command]:
        """Return what is to be asked at first."""
        return self._go_on()

    @property
    def outcome(self) -> PutOutcome:
        """The outcome, once all is asked."""
        if self._outcome is not None:
            return self._outcome
        for command in self._commands:
            if isinstance(command.reply, Exception):
                return Unavailable(describe(command.reply))
        return Unavailable("no answer")

    def _go_on(self) -> list[Command]:
        """Return the commands of the next step that has some, with the replies of the last one."""
        if self._left > 1:
            self._left -= 1
            return []
        self._left = 0
        for step in self._steps:
            replies, self._commands = [command.reply for command in self._commands], []
            step(self, replies)
            if self._commands:
                self._left = len(self._commands)
                return self._commands
        return []

    def _command(self, *arguments: bytes | int | Payload, nbytes: int = 0) -> None:
        command = Command(self._name, *arguments, nbytes=nbytes, follow=self._go_on)
        self._commands.append(command)

    def _ended(self, replies: Sequence[Reply]) -> bool:
        """Return whether there is an outcome; the first error among replies is one."""
        for reply in replies:
            if isinstance(reply, Exception) and self._outcome is None:
                self._outcome = Unavailable(describe(reply))
        return self._outcome is not None

    # The steps: each takes the replies of the one before.

    def _look(self, _: Sequence[Reply]) -> None:
        """Ask for an entry that may be there."""
        if not self._manifest.is_small:  # a small one is written in as many steps as asked for
            self._command(b"STRLEN", self._name)
            self._command(b"GETRANGE", self._name, 0, PREVIEW_NBYTES - 1)

    def _renew_old(self, replies: Sequence[Reply]) -> None:
        """Renew the lifetime of the entry that is there, and see that it is whole."""
        if self._ended(replies):
            return
        match replies:
            case [int(nbytes), memoryview() as beginning] if nbytes:
                old = preview(self._item.key, beginning, nbytes)
                self._is_foreign = old is None
                self._old_names = self._names.chunks(self._item.key, old) if old else []
                self._renew(self._old_names)

    def _renew(self, chunks: Sequence[bytes]) -> None:
        for name, margin in [*((name, _MARGIN_SECONDS) for name in chunks), (self._name, 0)]:
            if self._seconds is None:
                self._command(b"EXISTS", name)
            else:
                self._command(b"PEXPIRE", name, _milliseconds(self._seconds + margin))

    def _replace_old(self, replies: Sequence[Reply]) -> None:
        """Give up an entry that is not whole."""
        if replies and not self._ended(replies):
            if not self._is_foreign and all(reply == 1 for reply in replies):
                self._outcome = Stored()
            else:
                self._unlink([self._name, *self._old_names])

    def _send_chunks(self, replies: Sequence[Reply]) -> None:
        """Write the chunks, each with a lifetime: a writer may end at any time."""
        if self._ended(replies) or self._manifest.is_small:
            return
        lifetime = self._seconds
        seconds = _UNFINISHED_SECONDS if lifetime is None else lifetime + _MARGIN_SECONDS
        chunks = split(self._item.buffers, self._manifest.chunk_nbytes)
        for name, views in zip(self._chunk_names, chunks, strict=True):
            payload = Payload(views)
            self._payloads.append(payload)
            arguments = (b"SET", name, payload, b"PX", _milliseconds(seconds))
            self._command(*arguments, nbytes=payload.nbytes)

    def _send_manifest(self, replies: Sequence[Reply]) -> None:
        """Write the manifest, unless another writer was faster."""
        if not self._ended(replies):
            digests = [payload.digest for payload in self._payloads]
            data = self._manifest._replace(digests=digests).pack(self._item)
            lifetime = self._seconds
            px = () if lifetime is None else (b"PX", _milliseconds(lifetime))
            self._command(b"SET", self._name, data, b"NX", *px, nbytes=len(data))
        elif self._payloads:
            self._unlink(self._chunk_names)

    def _settle(self, replies: Sequence[Reply]) -> None:
        """Keep the chunks, or remove those of a writer who came too late."""
        if self._outcome is not None:
            return
        if self._ended(replies):
            self._unlink(self._chunk_names)
            return
        self._outcome = Stored()
        if replies == [None]:
            if self._manifest.is_small:
                self._renew([])
            else:
                self._unlink(self._chunk_names)
        elif self._seconds is None:
            for name in self._chunk_names:
                self._command(b"PERSIST", name)

    def _unlink(self, names: Sequence[bytes]) -> None:
        for name in names:
            self._command(b"UNLINK", name)


def _milliseconds(seconds: float) -> int:
    return max(1, round(1000 * seconds))
