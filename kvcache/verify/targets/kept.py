"""Reuse where a library leaves it to its users: caches are kept, copied and cut."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from kvcache.verify.target import Trial

C = TypeVar("C")


class KeptTrial(Trial, Generic[C]):
    """Caches of conversations that ended, for others that begin alike."""

    def __init__(self) -> None:
        self._kept: list[tuple[tuple[int, ...], C]] = []

    def keep(self, ids: Sequence[int], cache: C) -> None:
        """Keep the cache of a conversation that has ended."""
        self._kept.append((tuple(ids), cache))

    def nearest(self, ids: Sequence[int]) -> tuple[C | None, int]:
        """Return a cache with as many of the first `ids` as possible, and their number.

        One token at least is left to compute. None and 0 if there is no such cache.
        """
        limit = len(ids) - 1
        common = [
            (min(limit, common_length(known, ids)), n) for n, (known, _) in enumerate(self._kept)
        ]
        for length, number in sorted(common, key=lambda item: (-item[0], item[1])):
            known, cache = self._kept[number]
            if length and (shorter := self.cut(cache, len(known) - length)) is not None:
                return shorter, length
        return None, 0

    @abstractmethod
    def cut(self, kept: C, count: int) -> C | None:
        """Return a copy of a cache without its last `count` tokens; None if it cannot do that."""


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens with which both begin."""
    pairs = zip(one, other, strict=False)  # of any two lengths
    shorter = min(len(one), len(other))
    return next((n for n, (first, second) in enumerate(pairs) if first != second), shorter)
