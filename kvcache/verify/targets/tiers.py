"""Host memory and a store as the last tiers of a prefix cache under test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from kvcache.prefix import PrefixCache
from kvcache.stores import NEVER, MemoryStore, Store
from kvcache.verify.target import Trial

MakeStore: TypeAlias = Callable[[], Store]
"""Makes the empty store of one trial."""
PAGE_TOKENS = 4
"""Tokens of a page: small, so that short conversations have several."""


class TieredTrial(Trial):
    """Sessions of one prefix cache, which has a store as its last tier, or none for a cold run.

    make: makes the prefix cache, with these options.
    """

    def __init__(
        self, make: Callable[..., PrefixCache], make_store: MakeStore | None = MemoryStore
    ) -> None:
        self.store = None if make_store is None else make_store()
        options: dict[str, Any] = {}
        if self.store is not None:
            options = {"store": self.store, "namespace": "verify", "page_tokens": PAGE_TOKENS}
        self.prefix = make(**options)

    def evict(self, tier: str) -> None:
        """Push what no session uses out of memory, whence it comes back from the store, or of that.

        What is evicted from memory stays known there.
        """
        self.settle()
        if tier == "host":
            self.prefix.trim(0)
        elif tier == "store" and self.store is not None:
            self.store.delete([entry.key for entry in self.store.entries()])
        else:
            super().evict(tier)

    def settle(self) -> None:
        """Wait until the store has what sessions stored, so that no run depends on a thread."""
        self.prefix.flush(NEVER)

    def close(self) -> None:
        self.prefix.close()
        if self.store is not None:
            self.store.close()
