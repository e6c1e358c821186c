"""The hashes of blocks, by a slow recipe: every value by the package cbor2, every block anew."""

import hashlib

import pytest

cbor2 = pytest.importorskip("cbor2")


def digest(value):
    return hashlib.sha256(cbor2.dumps(value, canonical=True)).digest()


def hashes(ids, salt="", namespace="", size=16, media=(), adapter=()):
    """Of all full blocks. media: (start, stop, identifier). adapter: name and path."""
    names, parent = [], digest(namespace or "vllm-none-hash")
    for at in range(0, len(ids) - size + 1, size):
        keys = [("lora", *adapter)] if adapter else []
        keys += [("mm", name, a - at) for a, b, name in sorted(media) if a < at + size and at < b]
        keys += [("cache_salt", salt)] if salt and not at else []
        parent = digest((parent, tuple(map(int, ids[at : at + size])), tuple(keys) or None))
        names.append(parent)
    return names
