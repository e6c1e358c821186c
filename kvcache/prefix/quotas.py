"""Quotas: bytes that the spans of one salt may take, which evict their own for more."""

from __future__ import annotations

from collections.abc import Callable
from sys import getsizeof
from typing import Any, Generic, SupportsIndex, TypeAlias

from kvcache._checks import as_index

from .policies.base import Queue
from .radix import RadixTree
from .spans import P, Span

QuotaOf: TypeAlias = Callable[[str], int | None]
"""Bytes that a salt may take at most; None for no limit of its own."""


def by_level(span: Span[Any]) -> tuple[int, float]:
    """Return the key of candidates: least retained first, then least recently used."""
    return span.level, span.used


EMPTY_QUEUE = Queue(by_level).nbytes
"""Bytes of memory of the tables of a queue without candidates."""


class LimitedTree(RadixTree[Span[P]]):
    """The spans of a salt with a quota.

    nbytes: bytes of all its payloads. quota: at most; exceeded only while all candidates are in
    use. candidates: those of its spans that may be evicted.
    """

    __slots__ = ("candidates", "nbytes", "quota")

    def __init__(self, salt: str, quota: int) -> None:
        super().__init__(salt)
        self.nbytes, self.quota = 0, quota
        self.candidates: Queue[Span[P], tuple[int, float]] = Queue(by_level)


class Quotas(Generic[P]):
    """Quotas of the trees of an index. quota_of: asked when a salt stores its first tokens."""

    def __init__(self, quota_of: QuotaOf | None) -> None:
        self._quota_of = quota_of
        self.exceeded: dict[LimitedTree[P], None] = {}
        """Trees that take more than their quota."""
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the entries of candidates, and of the table."""
        return self._nbytes + getsizeof(self.exceeded)

    def new_tree(self, salt: str) -> RadixTree[Span[P]]:
        """Return an empty tree for a salt. Raises: what the function of quotas raises."""
        quota = None if self._quota_of is None else self._quota_of(salt)
        return RadixTree(salt) if quota is None else LimitedTree(salt, quota)

    def forget(self, tree: RadixTree[Span[P]]) -> None:
        """Take note that a tree has lost its last span."""
        if isinstance(tree, LimitedTree):
            self._nbytes -= tree.candidates.nbytes - EMPTY_QUEUE

    def count(self, tree: LimitedTree[P], change: int) -> None:
        """Add `change` to the bytes of a tree."""
        tree.nbytes += change
        if tree.nbytes > tree.quota:
            self.exceeded[tree] = None
        else:
            self.exceeded.pop(tree, None)

    def offer(self, span: Span[P], tree: LimitedTree[P]) -> None:
        """Add a span of `tree` to its candidates."""
        self._nbytes -= tree.candidates.nbytes
        tree.candidates.add(span)
        self._nbytes += tree.candidates.nbytes

    def withdraw(self, span: Span[P], tree: LimitedTree[P]) -> None:
        """Take a span of `tree` out of its candidates."""
        self._nbytes -= tree.candidates.nbytes
        tree.candidates.withdraw(span)
        self._nbytes += tree.candidates.nbytes

    def victim(self, tree: LimitedTree[P]) -> Span[P] | None:
        """Return the span of `tree` to evict next, None if all are in use."""
        self._nbytes -= tree.candidates.nbytes
        span = tree.candidates.first()
        self._nbytes += tree.candidates.nbytes
        return span


def as_quotas(quota: int | QuotaOf | None) -> QuotaOf | None:
    """Return the quota of each salt; None where no salt has one.

    Raises: TypeError, ValueError, also later if a function returns no quota.
    """
    if quota is None:
        return None
    if not callable(quota):
        same = _as_quota(quota)
        return lambda _: same

    def quota_of(salt: str) -> int | None:
        own = quota(salt)
        return None if own is None else _as_quota(own)

    return quota_of


def _as_quota(value: SupportsIndex) -> int:
    if isinstance(value, bool):
        raise TypeError(f"a quota must be an integer; got {value}. Give bytes, or None.")
    nbytes = as_index(value, "a quota")
    if nbytes < 0:
        raise ValueError(f"a quota is bytes >= 0 for a salt, or None for no limit; got {nbytes}.")
    return nbytes
