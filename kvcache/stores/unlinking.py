"""Removal of files in two steps: their names at once, their bytes beside other work.

A system takes about a quarter of the time that it took to write a file to free its bytes. It does
so when the name is gone and the last descriptor is closed, and by itself where a process is killed
in between.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Self

from kvcache._interrupts import uninterrupted

READ_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)  # names in the directory lead nowhere else
    | getattr(os, "O_NONBLOCK", 0)  # opening a FIFO would wait for its writer
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_LARGE_NBYTES = 1 << 20
_MAX_HELD = 16
"""Files whose bytes wait at most; a process may open some hundreds."""


class Unlinking:
    """Files that lose their names during a block. Their bytes are freed behind it, by a thread."""

    def __init__(self) -> None:
        self._descriptors: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if not self._descriptors:
            return
        with uninterrupted():
            try:
                Thread(target=self._free).start()
            except RuntimeError:  # the system has no room for a thread, or Python is ending
                self._free()

    def unlink(self, path: Path, nbytes: int) -> None:
        """Remove the name of a file of so many bytes, if there is one.

        Raises: OSError.
        """
        if nbytes >= _LARGE_NBYTES and len(self._descriptors) < _MAX_HELD:
            # Without a file, or with something else under its name, there is nothing to hold.
            with uninterrupted(), suppress(OSError):
                self._descriptors.append(os.open(path, READ_FLAGS))
        path.unlink(missing_ok=True)

    def _free(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
