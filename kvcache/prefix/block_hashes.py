"""Hashes of blocks of tokens by the recipe of vLLM 0.32 (``sha256_cbor``).

The hash of a block is the SHA-256 of the canonical CBOR (RFC 8949, 4.2) of the hash of the block
before it, its token ids and its extra keys. Before the first block comes the hash of a seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from .media import Placement, as_text
from .radix import Tokens

SEED = "vllm-none-hash"
"""vLLM's own, where PYTHONHASHSEED is not set."""
ExtraKey: TypeAlias = str | tuple[str, int]
"""Of an event: the name of an adapter, a medium with its offset in the block, or a salt."""
_HashKey: TypeAlias = tuple[str | int, ...]
_UNSIGNED, _NEGATIVE, _TEXT, _ARRAY = 0x00, 0x20, 0x60, 0x80
"""Major types of CBOR, as the high bits of the first byte."""
_NULL = b"\xf6"
_ADAPTER = "\0lora"  # first field of a salt that names one
_SEPARATOR = "\0"


def adapter_salt(name: str, path: str = "", salt: str = "") -> str:
    """Return the salt of requests that run under a LoRA adapter.

    Requests under another adapter or none share nothing with them, and events have the name of the
    adapter. name, path: of the adapter; both are part of the hashes. salt: of the tenant.

    Raises: TypeError for anything but text, ValueError for an empty name or a zero character.
    """
    for field in (name, path, salt):
        if not isinstance(field, str):
            raise TypeError(f"name, path and salt of an adapter are str; got {field!r}.")
    if not name or _SEPARATOR in name + path:
        raise ValueError(
            "the name of an adapter is text, and neither it nor its path has a zero character; "
            f"got {name!r}, {path!r}."
        )
    return _SEPARATOR.join([_ADAPTER, name, path, salt])


class Tenant(NamedTuple):
    """A salt, taken apart. adapter: its name, None for none. path: of the adapter."""

    salt: str
    adapter: str | None = None
    path: str = ""

    @classmethod
    def of(cls, salt: str) -> Tenant:
        """Take the salt of a request apart, one of :func:`adapter_salt` or any other."""
        begin, _, rest = salt.partition(_ADAPTER + _SEPARATOR)
        if begin or rest.count(_SEPARATOR) < 2:
            return cls(valid_text(salt))
        name, path, own = rest.split(_SEPARATOR, 2)
        return cls(valid_text(own), valid_text(name), valid_text(path))


def valid_text(text: str) -> str:
    """Return `text`, or the hexadecimal digits of its bytes if it is no valid Unicode."""
    return as_text(text.encode(errors="surrogatepass"))


class BlockKeys(NamedTuple):
    """Extra keys of one block, in the order of vLLM: adapter, media, salt.

    hashed: as they go into its hash, tagged with what they are. told: as events have them.
    """

    hashed: tuple[_HashKey, ...]
    told: tuple[ExtraKey, ...]


def keys_of_blocks(
    tenant: Tenant, media: Sequence[Placement], start: int, blocks: int, block_size: int
) -> list[BlockKeys | None]:
    """Return the extra keys of each of as many `blocks` from position `start` on, None for none.

    media: at their positions in the sequence, by position; others than those in the blocks do no
        harm.
    """
    if not media and tenant.adapter is None and not (tenant.salt and start == 0):
        return [None] * blocks
    inside: list[list[Placement]] = [[] for _ in range(blocks)]
    for placement in media:
        first = max(0, placement.start - start) // block_size
        behind = max(0, placement.stop - start + block_size - 1) // block_size
        for block_media in inside[first:behind]:
            block_media.append(placement)
    return [
        _keys_of(tenant, block_media, start + block * block_size)
        for block, block_media in enumerate(inside)
    ]


def _keys_of(tenant: Tenant, media: Sequence[Placement], start: int) -> BlockKeys | None:
    hashed: list[_HashKey] = []
    told: list[ExtraKey] = []
    if tenant.adapter is not None:
        hashed.append(("lora", tenant.adapter, tenant.path))
        told.append(tenant.adapter)
    for placement in media:
        name, offset = placement.identifier, placement.start - start
        hashed.append(("mm", name, offset))
        told.append((name, offset))
    if tenant.salt and start == 0:
        hashed.append(("cache_salt", tenant.salt))
        told.append(tenant.salt)
    return BlockKeys(tuple(hashed), tuple(told)) if hashed else None


def seed_hash(seed: str) -> bytes:
    """Return the hash that stands before the first block."""
    return hashlib.sha256(_text(seed)).digest()


def chained_hashes(
    parent: bytes, ids: Tokens, keys: Sequence[BlockKeys | None], block_size: int
) -> Iterator[bytes]:
    """Yield the hash of each block, from the hash of the block before the first.

    ids: int32 [blocks * block_size], `keys`: one for each block.
    """
    # Thousands of ids at once: the package cbor2 takes six times as long for the same bytes.
    encoded, stops = _integers(ids)
    bounds = [0, *stops[block_size - 1 :: block_size].tolist()]
    tokens = _head(_ARRAY, block_size)
    for block, block_keys in enumerate(keys):
        extra = _NULL if block_keys is None else _keys(block_keys.hashed)
        content = encoded[bounds[block] : bounds[block + 1]]
        # An array of three: the hash of 32 bytes, the ids, the extra keys.
        parent = hashlib.sha256(b"\x83\x58\x20" + parent + tokens + content + extra).digest()
        yield parent


def _integers(values: Tokens) -> tuple[bytes, npt.NDArray[np.int64]]:
    """Return all `values` in CBOR, and where each of them ends."""
    negative = values < 0
    size = np.where(negative, -1 - values, values).astype(np.uint32)
    long = [size >= 24, size >= 1 << 8, size >= 1 << 16]  # the bytes behind the first: 1, 2, 4
    cells = np.empty((values.size, 5), np.uint8)
    cells[:, 0] = np.where(long[0], 23 + long[0] + long[1] + long[2], size)
    cells[:, 0] += np.where(negative, np.uint8(_NEGATIVE), np.uint8(_UNSIGNED))
    cells[:, 1:] = size.astype(">u4").view(np.uint8).reshape(-1, 4)
    first = np.ones_like(negative)
    used = np.stack([first, long[2], long[2], long[1], long[0]], axis=1)
    return cells[used].tobytes(), used.sum(axis=1).cumsum()


def _head(major: int, count: int) -> bytes:
    """Return the beginning of a value: its major type, and an integer in the fewest bytes."""
    if count < 24:
        return bytes([major + count])
    for code, size in ((24, 1), (25, 2), (26, 4)):
        if count < 1 << 8 * size:
            return bytes([major + code]) + count.to_bytes(size, "big")
    return bytes([major + 27]) + count.to_bytes(8, "big")


def _text(value: str) -> bytes:
    data = value.encode()
    return _head(_TEXT, len(data)) + data


def _keys(keys: Sequence[_HashKey]) -> bytes:
    return _head(_ARRAY, len(keys)) + b"".join(
        _head(_ARRAY, len(key)) + b"".join(map(_key_part, key)) for key in keys
    )


def _key_part(value: str | int) -> bytes:
    if isinstance(value, str):
        return _text(value)
    return _head(_UNSIGNED, value) if value >= 0 else _head(_NEGATIVE, -1 - value)
