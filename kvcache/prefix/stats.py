"""Statistics of a prefix cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from .index import SpanIndex
from .reasons import Why
from .stored import StoredSnapshot, is_resident
from .tier_stats import TierStats


@dataclass(frozen=True)
class PrefixStats:
    """Totals since the prefix cache was made, and its state now. Sizes are in bytes."""

    sessions: int
    """Sessions begun, in total."""
    active: int
    """Sessions open now."""
    tokens: int
    """Tokens of all prompts, in total."""
    matched: int
    """Prompt tokens reused instead of computed, in total."""
    nbytes: int
    """Bytes stored now, in the memory of a cache or of the host."""
    budget: int | None
    """Upper limit of `nbytes`, None for no limit."""
    pinned: int
    """Part of `nbytes` in use by open sessions."""
    resident: int
    """Part of `nbytes` in the memory of the cache."""
    spans: int
    """Spans stored now."""
    evictions: int
    """Spans evicted, in total."""
    retained_evictions: int
    """Those of them that were retained: nothing else was left to evict, or their salt was above its
    quota."""
    index_nbytes: int = field(compare=False)  # tables of Python grow and shrink on their own
    """Bytes of host memory taken outside the budget: token ids, evicted spans remembered, salts,
    media, what the policy knows, hashes of blocks for subscribers to events, and keys known of a
    store."""
    index_budget: int | None
    """Upper limit of `index_nbytes`, None for no limit; exceeded while sessions use too much.
    Without one, evicted spans are forgotten from 64 MiB on."""
    store: TierStats | None = None
    """Totals of the store behind it, None without one."""
    explained: dict[Why, int] = field(default_factory=dict, hash=False)
    """Tokens not reused by reason, of the sessions that were explained."""

    @classmethod
    def of(
        cls,
        index: SpanIndex[StoredSnapshot],
        sessions: int,
        active: int,
        tokens: int,
        matched: int,
        store: TierStats | None,
        explained: dict[Why, int],
    ) -> Self:
        """Return the statistics of an index, and of the sessions over it."""
        return cls(
            sessions=sessions,
            active=active,
            tokens=tokens,
            matched=matched,
            nbytes=index.nbytes,
            budget=index.budget,
            pinned=sum(span.nbytes for span in index.kept if span.pins),
            resident=sum(span.nbytes for span in index.kept if is_resident(span)),
            spans=len(index.kept),
            evictions=index.evictions,
            retained_evictions=index.retained_evictions,
            index_nbytes=index.index_nbytes,
            index_budget=index.index_budget,
            store=store,
            explained=explained,
        )

    @property
    def usage(self) -> float | None:
        """Share of the budget that is used, 0 to 1, None without a budget."""
        return self.nbytes / self.budget if self.budget else None

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens reused instead of computed, 0 to 1."""
        return self.matched / self.tokens if self.tokens else 0.0
