"""Position-coded data: the bits of every element encode its own position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcache.backends import HOST_DTYPES, HostArray


def coded(shape: Sequence[int], dtype: str, first: int = 0) -> HostArray:
    """Make an array ``[B, heads, tokens, head_dim]`` with the code of ``first + t`` in token t.

    Codes are bit patterns (NaNs among them), so that a conversion on the way shows as well as
    a wrong slot. Any two of several hundred neighbouring positions differ, bool aside.
    """
    host = HOST_DTYPES[dtype]
    batch, head, token, dim = np.indices(tuple(shape), dtype=np.int64)
    # Primes far apart, so that no small step on one axis looks like a step on another.
    code = (first + token + 1) * 131 + batch * 7919 + head * 1543 + dim * 29
    if dtype == "bool":
        # Knuth's multiplicative hash; its low bits would just alternate.
        return np.asarray((code * 2654435761 >> 7) % 2 == 0)
    unsigned = np.dtype(f"u{host.itemsize}")
    return np.asarray(code * 2654435761 >> 5).astype(unsigned).view(host)


def bits(array: HostArray) -> HostArray:
    """Return the bytes of `array`, a view where it is compact: as bytes, a NaN equals itself."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def same(got: HostArray, expected: HostArray) -> None:
    """Raise AssertionError unless shape, dtype and every bit agree."""
    __tracebackhide__ = True  # pytest then shows the line of the caller
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise AssertionError(
            f"expected {expected.dtype}{expected.shape}, got {got.dtype}{got.shape}"
        )
    differ = bits(got) != bits(expected)
    if differ.any():
        item = expected.dtype.itemsize
        elements = np.unravel_index(np.flatnonzero(differ) // item, expected.shape)
        raise AssertionError(
            f"{differ.sum()} bytes differ, first at element "
            f"{tuple(int(axis[0]) for axis in elements)} of {expected.shape}"
        )
