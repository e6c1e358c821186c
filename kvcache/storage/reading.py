"""Opening files that others wrote: regular files only, opened once, without waiting."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from kvcache.errors import FileAccessError

# Opening a FIFO for reading waits for a writer without it; to regular files it makes no difference.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; a symbolic link is followed. The caller closes it.

    All reads of one opening are of one file, also while a writer replaces it under its name.

    Raises: FileNotFoundError; FileAccessError, at once, for a directory, FIFO, socket or device,
        and for a file that this process may not open.
    """
    try:
        # Before opening, which would have effects on some devices; and again after, in case the
        # name leads elsewhere by then.
        _check_regular(path, Path(path).stat())
        file = os.fdopen(os.open(path, _FLAGS), "rb")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise _named(path, error) from error
    try:
        _check_regular(path, os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """Return the content of a regular file, read in one go.

    Raises: as :func:`open_regular`.
    """
    with open_regular(path) as file:
        return file.read()


def resolve_target(path: str | os.PathLike[str]) -> tuple[Path, os.stat_result | None]:
    """Return the path that saving to `path` replaces, links followed, and the file there, if any.

    Raises: FileAccessError for a directory, FIFO, socket, device, or a loop of symbolic links.
    """
    try:
        target = Path(os.path.realpath(path))
        existing = target.lstat()
    except FileNotFoundError:
        return target, None
    except (OSError, ValueError) as error:
        raise _named(path, error) from error
    _check_regular(path, existing)
    return target, existing


def _named(path: str | os.PathLike[str], error: OSError | ValueError) -> FileAccessError:
    """Return the error for a path that cannot be opened; one that is named already stays."""
    if isinstance(error, FileAccessError):
        return error
    reason = getattr(error, "strerror", None) or error
    return FileAccessError(
        f"{path} cannot be opened: {reason}. Check the path and its permissions."
    )


def _check_regular(path: str | os.PathLike[str], found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise FileAccessError(
            f"files are read from and saved to regular files; {path} is {_kind(found.st_mode)}. "
            "Name a file."
        )


def _kind(mode: int) -> str:
    """Return what a path leads to, in words."""
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFLNK: "a loop of symbolic links",  # others are followed before
    }
    return kinds.get(stat.S_IFMT(mode), "a device")
