"""Writers of a directory: who lives, and the partial files of those who do not.

Every process that writes holds a lock on a file of its own, ``writers/<name>.lock``. The system
frees it when the process ends, however it ends. So a writer without a lock is gone, and all that it
left unfinished can be cleared away.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from kvcache._interrupts import uninterrupted
from kvcache.storage.writing import lock_file

_SUFFIX = ".lock"
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


class Writer:
    """This process as a writer of a directory, from its first write until :meth:`close`."""

    def __init__(self, root: Path) -> None:
        self._locks, self._partials = root / "writers", root / "partial"
        self._numbers = count()
        self._pid = os.getpid()
        self._descriptor, self.name = self._register()

    def _register(self) -> tuple[int, str]:
        """Create a lock file, and lock it."""
        for directory in (self._locks, self._partials):
            directory.mkdir(exist_ok=True)
        while True:
            name = uuid.uuid4().hex
            path = self._locks / f"{name}{_SUFFIX}"
            with uninterrupted():
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | _FLAGS, 0o666)
                # Whoever looked before it was locked may have taken it for that of a dead one.
                if lock_file(descriptor) is not False and path.exists():
                    return descriptor, name
                os.close(descriptor)

    @property
    def is_of_this_process(self) -> bool:
        """Whether the object has not come here through a fork, which shares the lock."""
        return self._pid == os.getpid()

    def new_partial(self) -> Path:
        """Return a path for a partial file, which nobody else uses."""
        return self._partials / f"{self.name}-{next(self._numbers)}"

    def close(self) -> None:
        """Free the lock and remove its file; of a fork, which must not, only close it."""
        with uninterrupted():
            if self.is_of_this_process:
                with suppress(OSError):
                    (self._locks / f"{self.name}{_SUFFIX}").unlink()
            with suppress(OSError):
                os.close(self._descriptor)


def others(root: Path, own: str) -> set[str]:
    """Return the names of all writers but `own` that have left something, alive or not."""
    names = {name.removesuffix(_SUFFIX) for name in _names(root / "writers")}
    names |= {name.rpartition("-")[0] for name in _names(root / "partial")}
    return names - {own, ""}


def _names(directory: Path) -> list[str]:
    try:
        return [path.name for path in directory.iterdir()]
    except FileNotFoundError:
        return []


@contextmanager
def gone(root: Path, name: str) -> Iterator[bool]:
    """Give whether a writer is gone, and hold its lock meanwhile, so that one process clears up.

    If it is gone, its partial files and its lock file are removed at the end of the block.
    """
    path = root / "writers" / f"{name}{_SUFFIX}"
    try:
        descriptor = os.open(path, os.O_RDWR | _FLAGS)
    except FileNotFoundError:  # cleared up but for what a crash of the machine brought back
        yield True
        _remove_partials(root, name)
        return
    try:
        locked = lock_file(descriptor) is True
        yield locked
        if locked:
            _remove_partials(root, name)
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _remove_partials(root: Path, name: str) -> None:
    for partial in (root / "partial").glob(f"{name}-*"):
        partial.unlink(missing_ok=True)
