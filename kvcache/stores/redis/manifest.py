"""The form of a value on a Redis server: a manifest, and chunks that it names.

::

    PREFIX{KEY}               the manifest, written last
    PREFIX{KEY}:NONCE:INDEX   a chunk, a part of the value and nothing else

KEY is hexadecimal; the braces put all names of a value into one slot of a cluster. The nonce is of
one writer, so that two writers of a key, or a writer and a reader, never meet in one chunk. The
manifest is a frame (:mod:`kvcache.stores.frames`) of a head, and of the checksums of the chunks in
their order, or of the value itself if it is small. So it tells chunks that are damaged, swapped, or
of another value.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

from kvcache.errors import PageError
from kvcache.stores.frames import HEADER_NBYTES, OVERHEAD, checked, framed, read_header
from kvcache.stores.outcomes import Buffer, Corrupt, Item, Key, Label

SMALL_NBYTES = 1 << 16
"""Values up to this size lie in their manifests."""
CHUNK_NBYTES = (1 << 20) - 64
"""Not 1 MiB: with its head such a string would take 1.25 MiB of the server, whose allocator
(jemalloc) has four sizes between powers of two."""
MAX_CHUNK_NBYTES = 1 << 22
_HEAD = struct.Struct("<QII16s")
_DIGEST_NBYTES = 16
PREVIEW_NBYTES = HEADER_NBYTES + _HEAD.size
"""Bytes at the beginning of a manifest that tell everything but checksums."""


class Names:
    """Names of keys on the server."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.encode()

    @property
    def pattern(self) -> bytes:
        """Pattern of the names of manifests."""
        escaped = b"".join(
            b"\\" + bytes([byte]) if byte in b"*?[]\\^-" else bytes([byte]) for byte in self._prefix
        )
        return escaped + b"{" + b"?" * 64 + b"}"

    def manifest(self, key: Key) -> bytes:
        """Return the name of the manifest of a key."""
        return b"%b{%b}" % (self._prefix, key.hex().encode())

    def chunks(self, key: Key, manifest: Manifest) -> list[bytes]:
        """Return the names of the chunks of a value."""
        name, nonce = self.manifest(key), manifest.nonce.hex().encode()
        return [b"%b:%b:%d" % (name, nonce, index) for index in range(manifest.chunks)]

    def key(self, name: bytes) -> Key | None:
        """Return the key of the manifest of a name, None for other names."""
        digits = name[len(self._prefix) + 1 : -1]
        try:
            key = bytes.fromhex(digits.decode())
        except ValueError:
            return None
        return key if self.manifest(key) == name else None


class Manifest(NamedTuple):
    """A value as its manifest describes it.

    digests: checksum of each chunk, empty if only the beginning of the manifest was read. value: of
        a small one, whose manifest was read.
    """

    nbytes: int
    chunk_nbytes: int
    nonce: bytes
    label: Label
    digests: Sequence[bytes] = ()
    value: memoryview | None = None

    @classmethod
    def of(cls, item: Item, chunk_nbytes: int) -> Self:
        """Return the manifest of a value to be written, with a nonce of its own."""
        nbytes = item.nbytes
        small = nbytes <= min(SMALL_NBYTES, chunk_nbytes)
        nonce = secrets.token_bytes(16)
        return cls(nbytes, 0 if small else chunk_nbytes, nonce, item.label)

    @property
    def is_small(self) -> bool:
        """Whether the value lies in the manifest."""
        return not self.chunk_nbytes

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return 0 if self.is_small else -(-self.nbytes // self.chunk_nbytes)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Bytes of the value in each chunk, as ``[start, stop)``."""
        return [
            (start, min(start + self.chunk_nbytes, self.nbytes))
            for start in range(0, self.nbytes, self.chunk_nbytes)
        ]

    def pack(self, item: Item) -> bytes:
        """Return the bytes of the manifest."""
        head = _HEAD.pack(self.nbytes, self.chunk_nbytes, 0, self.nonce)
        rest: Sequence[Buffer] = item.buffers if self.is_small else self.digests
        return b"".join(framed(Item(item.key, [head, *rest], self.label)))


def parse(key: Key, data: memoryview) -> Manifest | Corrupt:
    """Return the manifest in all its bytes, or the reason why there is none."""
    outcome = checked(key, data)
    if isinstance(outcome, Corrupt):
        return outcome
    if outcome.value.nbytes < _HEAD.size:
        return Corrupt(f"the manifest of {key.hex()} has no head")
    manifest, rest = _head(outcome.value, outcome.label), outcome.value[_HEAD.size :]
    if manifest.is_small:
        if rest.nbytes != manifest.nbytes:
            return Corrupt(f"the manifest of {key.hex()} is not of its value")
        return manifest._replace(value=rest)
    if manifest.chunk_nbytes > MAX_CHUNK_NBYTES or rest.nbytes != manifest.chunks * _DIGEST_NBYTES:
        return Corrupt(f"the manifest of {key.hex()} is not of its chunks")
    starts = range(0, rest.nbytes, _DIGEST_NBYTES)
    digests = [bytes(rest[start : start + _DIGEST_NBYTES]) for start in starts]
    return manifest._replace(digests=digests)


def preview(key: Key, beginning: memoryview, nbytes: int) -> Manifest | None:
    """Return a manifest of so many bytes without its checksums; None if it cannot be one."""
    try:
        label = read_header(beginning, key, nbytes)
    except PageError:
        return None
    if beginning.nbytes < PREVIEW_NBYTES:
        return None
    manifest = _head(beginning[HEADER_NBYTES:], label)
    payload = manifest.nbytes if manifest.is_small else manifest.chunks * _DIGEST_NBYTES
    return manifest if nbytes == OVERHEAD + _HEAD.size + payload else None


def _head(data: memoryview, label: Label) -> Manifest:
    nbytes, chunk_nbytes, _, nonce = _HEAD.unpack_from(data)
    return Manifest(nbytes, chunk_nbytes, nonce, label)


def split(buffers: Sequence[Buffer], nbytes: int) -> Iterator[list[memoryview]]:
    """Yield the views that make up each chunk of so many bytes; the last one may be smaller."""
    views: list[memoryview] = []
    room = nbytes
    for buffer in buffers:
        rest = memoryview(buffer)
        while rest:
            views.append(rest[:room])
            rest, room = rest[room:], room - views[-1].nbytes
            if not room:
                yield views
                views, room = [], nbytes
    if views:
        yield views
