"""Removal of values from a server."""

from __future__ import annotations

from collections.abc import Sequence

from redis.exceptions import ResponseError

from kvcache.stores.base import describe
from kvcache.stores.outcomes import Deleted, DeleteOutcome, Key, Miss, Unavailable

from .manifest import PREVIEW_NBYTES, Names, preview
from .wire import Command, Reply


class Removal:
    """One value on its way to nowhere: the manifest first, and what it names.

    chunks: names that go too, whatever the manifest says.
    """

    def __init__(self, key: Key, names: Names, chunks: Sequence[bytes] = ()) -> None:
        self._key, self._names, self._chunks = key, names, chunks
        self._name = names.manifest(key)
        # Taken out at once: a manifest that is put meanwhile would lose its chunks.
        self._taken = Command(self._name, b"GETDEL", self._name, follow=self._rest)
        self._unlinked: Command | None = None

    def commands(self) -> list[Command]:
        """Return what is to be asked at first."""
        return [self._taken]

    def _rest(self) -> list[Command]:
        reply = self._taken.reply
        names = list(self._chunks)
        if isinstance(reply, memoryview):
            manifest = preview(self._key, reply[:PREVIEW_NBYTES], reply.nbytes)
            names += self._names.chunks(self._key, manifest) if manifest else []
        elif is_of_another_type(reply):
            self._unlinked = Command(self._name, b"UNLINK", self._name)
        commands = [Command(self._name, b"UNLINK", name) for name in names]
        return [self._unlinked, *commands] if self._unlinked else commands

    @property
    def outcome(self) -> DeleteOutcome:
        """The outcome, once all is asked."""
        reply = self._unlinked.reply if self._unlinked else self._taken.reply
        if isinstance(reply, Exception):
            return Unavailable(describe(reply))
        return Miss() if reply in (None, 0) else Deleted()


def is_of_another_type(reply: Reply) -> bool:
    """Return whether a name on the server is one of a list, say, which this library never makes."""
    return isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE")
