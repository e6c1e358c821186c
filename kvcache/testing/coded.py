"""Data that tells where it belongs: every element encodes its own position, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcache.backends import HOST_DTYPES, HostArray

TOKENS = 2


def coded(shape: Sequence[int], dtype: str, first: int = 0) -> HostArray:
    """An array ``[B, heads, tokens, head_dim]`` whose token t holds the code of ``first + t``.

    Codes are bit patterns (NaNs among them), so that a conversion on the way shows as well as
    a wrong slot. Any two of several hundred neighbouring positions differ, bool aside.
    """
    host = HOST_DTYPES[dtype]
    batch, head, token, dim = np.indices(tuple(shape), dtype=np.int64)
    code = (first + token + 1) * 131 + batch * 7919 + head * 1543 + dim * 29
    if dtype == "bool":
        return np.asarray((code * 2654435761 >> 7) % 2 == 0)
    unsigned = np.dtype(f"u{host.itemsize}")
    return np.asarray(code * 2654435761 >> 5).astype(unsigned).view(host)


def bits(array: HostArray) -> HostArray:
    """The bytes of `array`, so that NaNs compare equal to themselves."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def same(got: HostArray, expected: HostArray) -> None:
    """Raise AssertionError unless shape, dtype and every bit agree."""
    __tracebackhide__ = True
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise AssertionError(
            f"expected {expected.dtype}{expected.shape}, got {got.dtype}{got.shape}"
        )
    differ = bits(got) != bits(expected)
    if differ.any():
        item = expected.dtype.itemsize
        where = np.unravel_index(np.flatnonzero(differ) // item, expected.shape)
        raise AssertionError(
            f"{differ.sum()} bytes differ, first at element "
            f"{tuple(int(axis[0]) for axis in where)} of {expected.shape}"
        )
