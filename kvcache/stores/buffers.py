"""Memory of values on their way.

It is used again, since to map fresh pages takes longer than to fill them, and aligned, since the
system copies at half the speed to the addresses of large arrays of NumPy, 16 bytes behind a page.
"""

from __future__ import annotations

import threading

import numpy as np

_LEAST = 1 << 16
"""Bytes of a buffer that is used again; smaller ones come out of the heap anyway."""
_MOST = 1 << 26
"""Bytes kept while nobody uses them, at most."""
_PAGE = 1 << 12
_ALIGNMENT = 64


def buffer_of(nbytes: int) -> memoryview:
    """Return a writable buffer of arbitrary content, which is its holders' while there are any.

    Raises: MemoryError.
    """
    if nbytes < _LEAST:
        return np.empty(nbytes, np.uint8).data
    block = _Lent.unused.take(-(-nbytes // _PAGE) * _PAGE + _ALIGNMENT)
    start = -block.ctypes.data % _ALIGNMENT
    # Cut as a memoryview: an array cut out of the block would give it back as well.
    return block.view(_Lent).data[start : start + nbytes]


class _Unused:
    """Blocks that nobody uses.

    Nothing waits for the lock, since destructors run anywhere, also in its holder: who does not get
    it does without.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[int, list[np.ndarray]] = {}  # by size
        self._nbytes = 0

    def take(self, nbytes: int) -> np.ndarray:
        if self._lock.acquire(blocking=False):
            try:
                if blocks := self._blocks.get(nbytes):
                    self._nbytes -= nbytes
                    return blocks.pop()  # the latest, which caches of the processor still have
            finally:
                self._lock.release()
        return np.empty(nbytes, np.uint8)

    def give(self, block: np.ndarray) -> None:
        if block.nbytes <= _MOST and self._lock.acquire(blocking=False):
            try:
                kept = self._blocks.setdefault(block.nbytes, [])
                if self._nbytes + block.nbytes > _MOST:  # perhaps of sizes that nobody wants now
                    self._blocks = {block.nbytes: kept}
                    self._nbytes = len(kept) * block.nbytes
                if self._nbytes + block.nbytes <= _MOST:
                    kept.append(block)
                    self._nbytes += block.nbytes
            finally:
                self._lock.release()


class _Lent(np.ndarray):
    """A view of a block, which gives it back with the last reference to its memory."""

    unused = _Unused()

    def __del__(self) -> None:
        if isinstance(self.base, np.ndarray):
            self.unused.give(self.base)
