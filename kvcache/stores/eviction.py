"""Entries as candidates of an eviction policy, one of those of prefix caches or another one.

The policies know spans of sequences. An entry of a store is one to them: the positions are those of
its label. So a store takes policies without knowing prefix caches.
"""

from __future__ import annotations

import time
from typing import Protocol

from .outcomes import Entry, Key

_MAX_USES = 3
"""Uses of one entry told at a time, of those that other processes made; no policy counts more."""


class Candidate:
    """An entry as a policy sees it. `payload` is None once it is evicted."""

    __slots__ = (
        "key",
        "nbytes",
        "offered",
        "payload",
        "policy_data",
        "start",
        "stop",
        "told",
        "used",
        "uses",
    )

    complete = False  # an entry goes as a whole

    def __init__(self, entry: Entry) -> None:
        self.key, self.nbytes = entry.key, entry.nbytes
        self.start, self.stop = entry.label.start, entry.label.stop
        self.used, self.uses = entry.used, 0
        self.told = -1
        self.offered = False
        self.payload: object | None = entry.key
        self.policy_data: object = None


class Policy(Protocol):
    """The calls of ``kvcache.prefix.policies.EvictionPolicy`` that stores make."""

    def use(self, span: Candidate, now: float) -> None:
        """Take note of a request for `span`; its `uses` and `used` do not count it yet."""

    def offer(self, span: Candidate) -> None:
        """Add `span` to the candidates."""

    def withdraw(self, span: Candidate) -> None:
        """Remove `span` from the candidates."""

    def victim(self, now: float) -> object | None:
        """Return the candidate to evict next, None if there are none."""

    def evict(self, span: Candidate, now: float) -> None:
        """Take note of the eviction of `span`, a candidate until now."""


class Candidates:
    """All entries of a store that its policy knows of.

    policy: serves this store alone.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._candidates: dict[Key, Candidate] = {}
        self._now = 0.0
        self.latest = 0.0
        """Time of the last use that the policy has been told of."""

    def note(self, entry: Entry) -> None:
        """Tell the policy of an entry, or of its uses since; putting it was the first one."""
        candidate = self._candidates.get(entry.key)
        if candidate is None:
            candidate = Candidate(entry)
        for _ in range(min(_MAX_USES, entry.uses - candidate.told)):
            self._policy.use(candidate, self._clock(entry.used))
            candidate.uses += 1
        candidate.told, candidate.used = entry.uses, max(candidate.used, entry.used)
        self.latest = max(self.latest, entry.used)
        if not candidate.offered:
            self._policy.offer(candidate)
            candidate.offered = True
            self._candidates[entry.key] = candidate

    def evict(self) -> Key | None:
        """Return the key of the entry to evict, which is no candidate any more; None without any.

        Raises: TypeError if the policy chooses what it was not offered.
        """
        now = self._clock(time.time())
        chosen = self._policy.victim(now)
        if chosen is None:
            return None
        if not isinstance(chosen, Candidate) or self._candidates.get(chosen.key) is not chosen:
            raise TypeError(f"a policy chooses among the candidates; got {chosen!r}")
        self._policy.evict(chosen, now)
        self._forget(chosen)
        return chosen.key

    def remove(self, key: Key) -> None:
        """Take an entry that is gone from the candidates."""
        candidate = self._candidates.get(key)
        if candidate is not None:
            self._policy.withdraw(candidate)
            self._forget(candidate)

    def _forget(self, candidate: Candidate) -> None:
        candidate.offered, candidate.payload = False, None
        del self._candidates[candidate.key]

    def _clock(self, moment: float) -> float:
        """Return a time that never goes backwards."""
        self._now = max(self._now, moment)
        return self._now
