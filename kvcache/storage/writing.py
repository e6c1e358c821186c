"""Replacing files: whole or not at all, durable, and without litter of writers that were killed.

The content goes to a partial file beside the target, which then takes its name. A writer holds a
lock on its partial file. So a partial file without a lock is that of a writer that is gone, on this
machine or, where the file system shares locks, on another one.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

from kvcache._interrupts import uninterrupted
from kvcache.errors import FileAccessError

from .reading import resolve_target

if sys.platform != "win32":  # elsewhere nothing tells whether a writer is gone
    import fcntl

_LOCKS = sys.platform != "win32"

_LONGEST_STEM = 200
"""Bytes of a target's name within the name of a partial file; most systems allow 255 in all."""
_PROBED = 8
"""Numbers looked at for partial files left behind: so many writers of one file at a time."""


def replace_file(path: str | os.PathLike[str], chunks: Iterable[bytes | memoryview[int]]) -> None:
    """Make `chunks`, one after the other, the content of the file at `path`, whole or not at all.

    Once this returns, the content survives a crash of the machine, as far as the platform can
    promise that. A file that exists keeps its permissions, a new one gets those of the umask; a
    symbolic link is followed. A hard link to the old file keeps the old content.

    Raises: FileNotFoundError if the directory is missing; FileAccessError if `path` leads to
        something else than a regular file, or the directory may not be written to; OSError of the
        system, such as for a full disk. The file is as it was then, and nothing is left beside it.
    """
    target, existing = resolve_target(path)
    partial = _Partial(target)
    try:
        # Private while it is written if there are permissions to take over, which may be narrow.
        partial.open(0o666 if existing is None else 0o600)
        for chunk in chunks:
            partial.file.write(chunk)
        partial.finish(existing)
    finally:
        partial.close()


class _Partial:
    """The partial file of one writer, from its creation to its end under the target's name."""

    file: BinaryIO

    def __init__(self, target: Path) -> None:
        self._target = target
        self._path: Path | None = None

    def open(self, mode: int) -> None:
        """Create the file, locked; remove those of writers that are gone."""
        with uninterrupted():  # a file that this object does not know of would be left behind
            free = _free_paths(self._target)
            while self._path is None:
                self._create(next(free), mode)
        _reclaim_others(self._target, self._path)

    def _create(self, path: Path, mode: int) -> None:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode)
        except FileExistsError:  # another writer was faster
            return
        except PermissionError as error:
            raise FileAccessError(
                f"{self._target} cannot be saved: {error.strerror} in {path.parent}. Check the "
                "permissions of the directory."
            ) from error
        except OSError as error:  # in terms of what was asked for
            raise type(error)(error.errno, error.strerror, str(self._target)) from error
        self._path = path  # to be removed, whatever comes
        try:
            self.file = os.fdopen(descriptor, "wb")
        except BaseException:
            os.close(descriptor)
            raise
        # Whoever looked for partial files before the lock was taken may have removed this one.
        if lock_file(descriptor) is False or not _is_at(descriptor, path):
            self.file.close()
            self._path = None

    def finish(self, existing: os.stat_result | None) -> None:
        """Put the file, complete and on the disk, in place of the `existing` one."""
        self.file.flush()
        if existing is not None:
            _take_over_permissions(self._existing_path, existing)
        # On disk before the rename: else a crash could leave the name with an incomplete file.
        os.fsync(self.file.fileno())
        if not _LOCKS:
            self.file.close()  # Windows renames no open file
        with uninterrupted():
            self._existing_path.replace(self._target)
            self._path = None
        _sync_directory(self._target.parent)

    @property
    def _existing_path(self) -> Path:
        if self._path is None:
            raise RuntimeError("a partial file is opened before it is finished.")
        return self._path

    def close(self) -> None:
        """Close the file, and remove it unless it took the target's name."""
        with uninterrupted():
            if self._path is not None:
                self._path.unlink(missing_ok=True)  # while locked, so it is this one for certain
                self._path = None
            if hasattr(self, "file"):
                with suppress(OSError):  # of a full disk, again, for what is given up
                    self.file.close()


def _take_over_permissions(path: Path, existing: os.stat_result) -> None:
    """Give the file at `path` owner and permissions of an `existing` one."""
    own = path.stat()
    if (own.st_uid, own.st_gid) != (existing.st_uid, existing.st_gid):
        with suppress(OSError):  # only root may give files away
            os.chown(path, existing.st_uid, existing.st_gid)
    # After the owner, whose change takes some of them away.
    path.chmod(stat.S_IMODE(existing.st_mode))


def _stem(target: Path) -> str:
    """Return what the names of all partial files of `target` begin with."""
    name = os.fsencode(target.name)
    short = target.name if len(name) <= _LONGEST_STEM else hashlib.sha256(name).hexdigest()
    return f".{short}"


def _numbered(target: Path, number: int) -> Path:
    return target.with_name(f"{_stem(target)}.{number}.partial")


def _free_paths(target: Path) -> Iterator[Path]:
    """Yield paths for a partial file that no writer has, the lowest number first.

    Numbers, not random names, so that partial files left behind are found without a look through
    the whole directory, which may hold many files.
    """
    if not _LOCKS:
        yield target.with_name(f"{_stem(target)}.{uuid.uuid4().hex}.partial")
        return
    for number in count():
        path = _numbered(target, number)
        if not _exists(path) or _reclaim(path):
            yield path


def _reclaim_others(target: Path, own: Path) -> None:
    """Remove partial files left behind by writers of `target` that are gone."""
    if _LOCKS:
        for number in range(_PROBED):
            path = _numbered(target, number)
            if path != own and _exists(path):
                _reclaim(path)


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _reclaim(path: Path) -> bool:
    """Remove a partial file if its writer is gone; return whether its name is free."""
    try:
        # Neither through links nor waiting for FIFOs, which somebody may have put there.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        # Whoever removes or renames a partial file has its lock, so this one stays at its path.
        removed = bool(lock_file(descriptor)) and _is_at(descriptor, path)
        if removed:
            path.unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return removed


def lock_file(descriptor: int) -> bool | None:
    """Lock a file for as long as it is open. Return False if it is locked, None without locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that knows no locks: then nothing is cleared away
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _sync_directory(directory: Path) -> None:
    """Write a rename to the disk, where directories can be synchronised."""
    # The file has its name already, so a failure here must not look like one of saving.
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
