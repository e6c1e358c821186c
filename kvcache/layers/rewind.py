"""Notes of per-layer caches on tokens taken back, for an owner that keeps records of them."""

from __future__ import annotations

from typing import NamedTuple


class Rewind(NamedTuple):
    """A change of what a cache holds, other than by tokens appended.

    length: tokens from the beginning that stayed. refilled: whether others were copied in behind
    them, which no update computed here.
    """

    length: int
    refilled: bool = False

    @classmethod
    def after(cls, earlier: Rewind | None, length: int, offset: int) -> Rewind | None:
        """Return what to note when a cache goes back from `offset` to `length`, after `earlier`."""
        if length >= offset or (earlier is not None and length > earlier.length):
            return earlier
        return cls(length)
