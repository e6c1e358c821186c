"""The form of a value outside of this process: a header, the bytes, a checksum.

::

    128 bytes   magic, version, length of the value, key, layout, parent, start, stop
    n bytes     the value
    16 bytes    XXH3-128 of all bytes before

All numbers are little-endian. The key in the header tells a value that lies under the name of
another one, the checksum tells damage. The checksum comes last, so that a writer computes it while
it writes. It is no signature: whoever can write to a store can write a frame that passes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import xxhash

from kvcache.errors import PageError

from .buffers import buffer_of
from .outcomes import Corrupt, Hit, Item, Key, Label

VERSION = 1
_MAGIC = b"KVCSTORE"
_HEADER = struct.Struct("<8sIIQ32s32s32sII")
_SUM_NBYTES = 16
OVERHEAD = _HEADER.size + _SUM_NBYTES
"""Bytes of a frame beside its value."""
HEADER_NBYTES = _HEADER.size
PIECE_NBYTES = 1 << 22
"""Bytes of a piece at most: enough that the calls that move pieces cost little."""


def framed(item: Item) -> Iterator[memoryview]:
    """Yield the pieces of a frame: its header, the buffers in pieces, the checksum.

    Pieces are views of the buffers, and hashed when they are yielded.
    """
    checksum = xxhash.xxh3_128()
    header = memoryview(_header(item))
    checksum.update(header)
    yield header
    for buffer in item.buffers:
        flat = memoryview(buffer)
        for start in range(0, flat.nbytes, PIECE_NBYTES):
            piece = flat[start : start + PIECE_NBYTES]
            checksum.update(piece)
            yield piece
    yield memoryview(checksum.digest())


def _header(item: Item) -> bytes:
    label = item.label
    return _HEADER.pack(
        _MAGIC,
        VERSION,
        0,  # reserved
        item.nbytes,
        item.key,
        label.layout,
        label.parent,
        label.start,
        label.stop,
    )


def read_header(header: bytes | memoryview, key: Key, nbytes: int) -> Label:
    """Return the label in the header of a frame of so many bytes.

    Raises: PageError unless the header is one of the value of `key`, and of such a frame. Its
        bytes are verified by no checksum yet.
    """
    if len(header) < HEADER_NBYTES or nbytes < OVERHEAD:
        raise PageError(f"a frame has {OVERHEAD} bytes or more; got {nbytes}")
    magic, version, reserved, length, own_key, layout, parent, start, stop = _HEADER.unpack_from(
        header
    )
    if magic != _MAGIC:
        raise PageError(f"a frame begins with {_MAGIC!r}; got {magic!r}")
    if version != VERSION or reserved:
        raise PageError(f"frames of version {VERSION} are read; got {version}, {reserved}")
    if own_key != key:
        raise PageError(f"the value of {key.hex()} was asked for; got that of {own_key.hex()}")
    if length != nbytes - OVERHEAD:
        raise PageError(f"the frame of {length} bytes has {length + OVERHEAD}; got {nbytes}")
    if start > stop:
        raise PageError(f"positions of a label are a range; got [{start}, {stop})")
    return Label(layout, parent, start, stop)


class IncomingFrame:
    """A frame on its way in: a buffer to be filled from its beginning, verified meanwhile.

    nbytes: of the frame, as the store knows it, not as the frame says. buffer: writable, of so many
    bytes, with arbitrary content.

    Raises: MemoryError.
    """

    def __init__(self, key: Key, nbytes: int) -> None:
        self._key, self._nbytes = key, nbytes
        self.buffer: memoryview = buffer_of(nbytes)
        self._checksum = xxhash.xxh3_128()
        self._filled = 0

    def received(self, nbytes: int) -> None:
        """Take note that the next `nbytes` bytes of the buffer are filled."""
        stop = self._filled + nbytes
        covered = min(stop, self._nbytes - _SUM_NBYTES)
        if covered > self._filled:
            self._checksum.update(self.buffer[self._filled : covered])
        self._filled = stop

    def finish(self) -> Hit | Corrupt:
        """Return the value, or the reason why there is none."""
        if self._filled < self._nbytes:
            return Corrupt(f"{self._filled} of {self._nbytes} bytes came")
        try:
            label = read_header(self.buffer[:HEADER_NBYTES], self._key, self._nbytes)
        except PageError as error:
            return Corrupt(str(error))
        if self._checksum.digest() != bytes(self.buffer[-_SUM_NBYTES:]):
            return Corrupt(f"the value of {self._key.hex()} does not match its checksum")
        return Hit(self.buffer[HEADER_NBYTES:-_SUM_NBYTES].toreadonly(), label)


def checked(key: Key, frame: memoryview) -> Hit | Corrupt:
    """Return the value in a whole frame, uncopied, or the reason why there is none."""
    try:
        label = read_header(frame, key, frame.nbytes)
    except PageError as error:
        return Corrupt(str(error))
    if xxhash.xxh3_128_digest(frame[:-_SUM_NBYTES]) != bytes(frame[-_SUM_NBYTES:]):
        return Corrupt(f"the value of {key.hex()} does not match its checksum")
    return Hit(frame[HEADER_NBYTES:-_SUM_NBYTES].toreadonly(), label)
