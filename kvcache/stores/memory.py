"""A store in host memory, of one process."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, SupportsIndex

import numpy as np

from kvcache._checks import as_budget
from kvcache._locks import Lock

from .base import Store
from .eviction import Candidates, Policy
from .outcomes import (
    Buffer,
    ContainsOutcome,
    Deadline,
    Deleted,
    DeleteOutcome,
    Entry,
    GetOutcome,
    Hit,
    Item,
    Key,
    Label,
    Miss,
    Present,
    PutOutcome,
    Refused,
    Stored,
    Usage,
)


class _Held(NamedTuple):
    value: memoryview
    label: Label
    used: float
    uses: int


class MemoryStore(Store):
    """Values in host memory, within a budget.

    budget: bytes of values, None for no limit. policy: chooses what to give up, such as a new
    ``kvcache.prefix.policies.Cost()``; None for the least recently used.

    A value is copied once, when it is put; all reads share that copy, read-only, which lives as
    long as one of them.
    """

    def __init__(self, budget: SupportsIndex | None = None, policy: Policy | None = None) -> None:
        super().__init__()
        self._budget = as_budget(budget, "bytes of values")
        self._held: OrderedDict[Key, _Held] = OrderedDict()  # the least recently used first
        self._nbytes = 0
        self._candidates = None if policy is None else Candidates(policy)
        self._lock = Lock()

    def __repr__(self) -> str:
        return f"<MemoryStore, {len(self._held)} entries, {self._nbytes} bytes>"

    def _get(self, keys: Sequence[Key], deadline: Deadline) -> list[GetOutcome]:
        return [self._get_one(key) for key in keys]

    def _get_one(self, key: Key) -> GetOutcome:
        with self._lock:
            held = self._held.get(key)
            if held is None:
                return Miss()
            self._held[key] = held = held._replace(used=time.time(), uses=held.uses + 1)
            self._held.move_to_end(key)
            self._note(key, held)
        return Hit(held.value, held.label)

    def _put(self, items: Sequence[Item], deadline: Deadline) -> list[PutOutcome]:
        return [self._put_one(item) for item in items]

    def _put_one(self, item: Item) -> PutOutcome:
        nbytes = item.nbytes
        if self._budget is not None and nbytes > self._budget:
            return Refused(f"a value of {nbytes} bytes is larger than the budget, {self._budget}")
        with self._lock:
            if item.key in self._held:
                self._held.move_to_end(item.key)
                return Stored()
        value = _joined(item.buffers, nbytes)  # outside of the lock: it takes milliseconds
        with self._lock:
            self._remove(item.key)  # of a thread that was faster
            self._evict(nbytes)
            self._held[item.key] = held = _Held(value, item.label, time.time(), 0)
            self._nbytes += nbytes
            self._note(item.key, held)
        return Stored()

    def _evict(self, incoming: int) -> None:
        """Remove entries until there is room for so many bytes."""
        while self._budget is not None and self._nbytes + incoming > self._budget:
            chosen = None if self._candidates is None else self._candidates.evict()
            self._remove(next(iter(self._held)) if chosen is None else chosen)
            self._evicted(1)

    def _remove(self, key: Key) -> bool:
        held = self._held.pop(key, None)
        if held is None:
            return False
        self._nbytes -= held.value.nbytes
        if self._candidates is not None:
            self._candidates.remove(key)
        return True

    def _note(self, key: Key, held: _Held) -> None:
        if self._candidates is not None:
            self._candidates.note(Entry(key, held.value.nbytes, held.label, held.used, held.uses))

    def _contains(self, keys: Sequence[Key], deadline: Deadline) -> list[ContainsOutcome]:
        with self._lock:
            return [Present() if key in self._held else Miss() for key in keys]

    def _delete(self, keys: Sequence[Key], deadline: Deadline) -> list[DeleteOutcome]:
        with self._lock:
            return [Deleted() if self._remove(key) else Miss() for key in keys]

    def _entries(self, deadline: Deadline) -> Iterator[Entry]:
        with self._lock:
            held = list(self._held.items())
        for key, (value, label, used, uses) in held:
            yield Entry(key, value.nbytes, label, used, uses)

    def _usage(self, deadline: Deadline) -> Usage:
        with self._lock:
            return Usage(len(self._held), self._nbytes, self._budget)

    def _close(self) -> None:
        with self._lock:
            self._held.clear()
            self._nbytes = 0


def _joined(buffers: Sequence[Buffer], nbytes: int) -> memoryview:
    """Return a read-only copy of all buffers, one after the other."""
    # Not b"".join, which is as fast, but bytearray and bytes are not aligned for arrays.
    joined = np.empty(nbytes, np.uint8)
    start = 0
    for buffer in buffers:
        joined[start : start + len(buffer)] = memoryview(buffer)
        start += len(buffer)
    return joined.data.toreadonly()
