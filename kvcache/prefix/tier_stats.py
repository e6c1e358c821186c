"""Totals of the store behind a prefix cache, and warnings of its trouble."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from kvcache._locks import Lock
from kvcache.stores.base import Store
from kvcache.stores.outcomes import StoreStats

from .costs import CostGate
from .known_keys import KnownKeys
from .paging import Forms

_logger = logging.getLogger("kvcache.prefix")


@dataclass
class TierStats:
    """Totals of the store of a prefix cache, since that was made. Pages include states."""

    written: int = 0
    """Pages the store has taken."""
    dropped: int = 0
    """Pages not put, as too many waited, or the store did not take them."""
    fetched: int = 0
    """Pages read, decoded and checked."""
    fetched_tokens: int = 0
    """Prompt tokens restored from these."""
    missed: int = 0
    """Sessions for which the store had nothing behind the hit in memory."""
    failed: int = 0
    """Pages of the store that were damaged, or belonged to other caches."""
    late: int = 0
    """Sessions that began without an answer of the store: gone, or not before the deadline."""
    gated: int = 0
    """Sessions for which computing was estimated to be faster than fetching."""
    bytes_per_second: float | None = None
    """Measured speed of the store; None before the first read."""
    seconds_per_token: float | None = None
    """Measured time to compute a prompt token; None before the first prompt."""
    store: StoreStats | None = None
    """Counts of the store object, which others may use as well."""


class TierRecord:
    """Everything that writers and readers of one store note: totals, costs, and known keys."""

    def __init__(self, store: Store, keys: KnownKeys) -> None:
        self.gate, self.keys = CostGate(), keys
        self._store, self._stats, self._lock = store, TierStats(), Lock()
        self._warned: set[str] = set()
        self.forms: Forms = []
        """Forms of the arrays of the caches here, as far as their sessions have shown them."""

    @property
    def stats(self) -> TierStats:
        """A copy of the totals so far."""
        costs = self.gate.costs
        with self._lock:
            return replace(
                self._stats,
                bytes_per_second=costs.bytes_per_second,
                seconds_per_token=costs.seconds_per_token,
                store=self._store.stats,
            )

    def count(self, field: str, number: int = 1) -> None:
        """Add to one of the totals."""
        with self._lock:
            setattr(self._stats, field, getattr(self._stats, field) + number)

    def note_forms(self, forms: Forms) -> None:
        """Learn from what a session of these caches stores."""
        known = self.forms or [{}] * len(forms)
        self.forms = [new or old for new, old in zip(forms, known, strict=True)]

    def failed(self, reason: str) -> None:
        """Count a page that was damaged, or of other caches."""
        self.count("failed")
        self.warn("a page is damaged, or of other caches", reason)

    def warn(self, trouble: str, reason: str) -> None:
        """Log a kind of trouble the first time."""
        with self._lock:
            first = trouble not in self._warned
            self._warned.add(trouble)
        if first:
            _logger.warning(
                "%r behind a prefix cache: %s: %s. Further cases are only counted.",
                self._store,
                trouble,
                reason,
            )
