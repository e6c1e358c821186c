"""Index of kept spans of token sequences, within a budget: radix trees with an eviction policy.

Every node of a tree is a span: the tokens between two places where sequences part, or where one
ended. All tokens of a span have the same history, so a policy decides about spans. An evicted span
leaves its tokens behind for a while, a ghost, so that a policy can learn from what comes back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from sys import getsizeof

from kvcache._checks import as_index
from kvcache.storage.lengths import ceil_div

from .footprint import ENTRY, ORDERED_ENTRY
from .policies import EvictionPolicy
from .quotas import LimitedTree, QuotaOf
from .radix import RadixTree, Tokens
from .residency import Residency
from .retention import Retention
from .spans import EvictedBy, P, Span
from .superseded import reducible_before
from .trees import SpanTrees

_ROOM = 4_000
"""Bytes of tables without entries, rounded up."""


class SpanIndex(SpanTrees[P]):
    """Spans of one budget, over any number of trees (one per tenant, say).

    budget: bytes of all payloads together at most, None for no limit; exceeded only while all
    candidates are pinned. grain: fewest tokens taken at once from a span that can be cut anywhere.
    index_budget: bytes of everything else at most, None for no limit: the oldest ghosts are
    forgotten first, then spans are evicted. ghost_budget: the same where there is no index_budget,
    and no span is evicted for it. quota_of: bytes of the payloads of a salt at most, in trees of
    :meth:`new_tree`. on_evict: called with a span about to be evicted. on_empty: called with a tree
    that has lost its last span. on_join: called with spans that are part of the one behind them
    from now on. others: returns bytes to be counted as well.
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        budget: int | None = None,
        *,
        grain: int = 64,
        index_budget: int | None = 1 << 26,
        ghost_budget: int | None = None,
        quota_of: QuotaOf | None = None,
        on_evict: Callable[[Span[P]], None] = lambda _: None,
        on_empty: Callable[[RadixTree[Span[P]]], object] = lambda _: None,
        on_join: Callable[[Sequence[Span[P]]], None] = lambda _: None,
        others: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(policy, quota_of, on_empty, on_join)
        self.budget = budget
        self.index_budget, self.ghost_budget = index_budget, ghost_budget
        self.evictions = 0
        """Spans evicted so far."""
        self.retained_evictions = 0
        """Those of them that were retained, and went for want of room, or for their quota."""
        self.residency: Residency | None = None
        """Times of spans, None where nobody wants to know."""
        self._grain = grain
        self._on_evict, self._others = on_evict, others

    def use(self, spans: Sequence[Span[P]], now: float) -> None:
        """Count a request for `spans`, given in the order of their tokens."""
        use, residency = self.policy.use, self.residency
        for span in spans:
            if residency is not None:
                residency.use(span, now)
            # The policy first: to it, uses and used are still those of earlier requests.
            use(span, now)
            span.uses += 1
            span.used = now
            self._superseded.use(span)

    def retain(self, spans: Sequence[Span[P]], priority: int, seconds: float, now: float) -> None:
        """Let `spans` go after all that are not retained, and after those retained less.

        Ghosts are left out. What a span has already stays if that protects it more: by its
        effective priority, or for longer at the same.

        priority: 1 to 100; it falls to 0 in steps of one within `seconds` from `now`, and never
        for ``math.inf``.
        """
        self._lower(now)
        retention = Retention(priority, seconds, 0.0 if math.isinf(seconds) else now)
        for span in spans:
            if span.payload is not None and retention.outranks(span.retention, now):
                self._retain(span, retention)

    # Dropping.

    def trim(self, now: float) -> None:
        """Evict until the quotas and the budgets hold, or all candidates are in use.

        Where a sequence goes on behind a payload, what of it serves its own end alone goes first,
        and for the index its being a span of its own. Spans that serve nobody go in any case.

        Raises: KVCacheError if the policy chooses a span it was not offered.
        """
        self._lower(now)
        self._evict_deserted(now)
        for tree in list(self._quotas.exceeded):
            self._trim_tree(tree, now)
        while self.budget is not None and self.nbytes > self.budget:
            if self._reduce_superseded():
                continue
            span = self._candidates.victim(now)
            if span is None:
                break
            if not (span.level and self._reduce_before(span, now)):
                self._shrink(span, self.nbytes - self.budget, now)
        self._trim_index(now)

    def _trim_index(self, now: float) -> None:
        """Do :meth:`trim` for everything but payloads."""
        limit = self.ghost_budget if self.index_budget is None else self.index_budget
        while limit is not None and self._reserved > limit:
            if self._ghosts:
                self._remove(next(iter(self._ghosts)))
                continue
            if self.index_budget is None:
                break
            if self._fold_superseded():
                continue
            span = self._candidates.victim(now)
            if span is None:
                break
            if not (span.level and self._fold_before(span, now)):
                self.evict(span, now, "retention" if span.level else "policy")

    def _trim_tree(self, tree: LimitedTree[P], now: float) -> None:
        """Evict spans of one salt until its quota holds, or all its candidates are in use."""
        while tree.nbytes > tree.quota:
            span = self._quotas.victim(tree)
            if span is None:
                break
            if not self._reduce_before(span, now):
                self._shrink(span, tree.nbytes - tree.quota, now, "quota")

    def evict(self, span: Span[P], now: float, by: EvictedBy = "policy") -> None:
        """Make an offered span a ghost, and those before it that are of use to it alone."""
        evicted: Span[P] | None = span
        while evicted is not None and evicted.payload is not None:
            evicted = self._evict_one(evicted, evicted.payload, now, by)

    def _evict_one(self, span: Span[P], payload: P, now: float, by: EvictedBy) -> Span[P] | None:
        """Do :meth:`evict` for one span; return the one before it if that is of no use now."""
        # First, while the span still has its payload and its place in the tree.
        self._on_evict(span)
        if self.residency is not None:
            self.residency.evict(span, now)
        retention = span.retention
        if retention is None and not isinstance(span.tree, LimitedTree):  # nearly all
            self.policy.evict(span, now)
        else:
            self._candidates.evict(span, now)
        self.evictions += 1
        if retention is not None:
            self._assign(span, None)
            self.retained_evictions += by in ("retention", "quota")
        self._put(span, None)
        span.offered, span.evicted, span.evicted_by = False, now, by
        payload.close()
        del self.kept[span]
        node, parent = span.node, span.node.parent
        if node.children:
            self._join_ghosts(span)
        else:
            self._ghosts[span] = None
        if parent is None or parent.value is None:
            return None
        parent.value.children -= 1
        self._reconsider(parent.value)
        return parent.value if parent.value.useless else None

    def drop_branch(
        self, tree: RadixTree[Span[P]], tokens: Tokens, position: int, now: float
    ) -> None:
        """Evict what is kept of `tokens` from `position` on, for their sake alone.

        What sessions use stays, and what sequences build on that part from `tokens` behind it.
        """
        spans, length = self.follow(tree, tokens)
        dead: list[Span[P]] = []
        for span in reversed(spans):
            behind = 1 if dead and dead[-1].parent is span else 0
            # Of a ghost in which the tokens end nothing is kept.
            longer = span.stop > length and span.payload is not None
            if span.stop <= position or longer or span.pins or span.children > behind:
                break
            if span.payload is not None:
                dead.append(span)
        if dead and dead[-1].start < position:
            self._split(dead[-1], position - dead[-1].start)
        for span in dead:
            self.evict(span, now, "drop_branch")

    def forget_ghosts(self) -> None:
        """Remove all ghosts with nothing kept behind them, except pinned ones."""
        while self._ghosts:
            self._remove(next(iter(self._ghosts)))

    # Bytes outside the budget.

    @property
    def index_nbytes(self) -> int:
        """Bytes of host memory outside the budget: trees, ghosts, media, and the policy's."""
        containers = getsizeof(self.kept) + getsizeof(self._ghosts) + self._superseded.nbytes
        return self._tracked + containers + self._unowned

    @property
    def _reserved(self) -> int:
        """Upper bound of :attr:`index_nbytes` that falls with every span that goes.

        Tables of Python keep their size when entries go, until they grow again.
        """
        entries = _ROOM + ENTRY * len(self.kept)
        entries += ORDERED_ENTRY * (len(self._ghosts) + len(self._superseded))
        return self._tracked + entries + self._unowned

    @property
    def _unowned(self) -> int:
        return self._candidates.nbytes + self._spans * self.policy.data_nbytes + self._others()

    # Parts of it.

    def _evict_deserted(self, now: float) -> None:
        """Evict the spans in which nobody can resume, and behind which nothing is kept."""
        while self._deserted:
            span, _ = self._deserted.popitem()
            if span.useless:
                self.evict(span, now)

    def _reduce_superseded(self) -> bool:
        """Release rows that serve the end of a superseded span alone; return False if none do."""
        popped = self._superseded.pop_reducible()
        if popped is not None:
            self._reduce(*popped)
        return popped is not None

    def _reduce_before(self, span: Span[P], now: float) -> bool:
        """Do the same for a span before `span`, which would go otherwise, retained no more."""
        reducible = reducible_before(span, now)
        if reducible is not None:
            self._reduce(*reducible)
        return reducible is not None

    def _reduce(self, span: Span[P], reduced: P) -> None:
        """Keep the `reduced` payload of a superseded span only."""
        child = span.only_child
        self._replace(span, reduced)
        # Rows on the host are copied to be joined: not many for a few, each turn anew.
        if child is not None and reduced.nbytes <= child.nbytes and self._are_alike(span, child):
            self._join([span, child])

    def _shrink(self, span: Span[P], excess: int, now: float, by: EvictedBy | None = None) -> None:
        """Evict `span`, or if less of it will do only as much of its end as `excess` bytes.

        Where requests can resume at some places only, these give way before the last of them, and
        the end goes back to one. by: None for the policy, or for the least priority if it is
        retained.
        """
        tokens, by = span.stop - span.start, by or ("retention" if span.level else "policy")
        if span.complete and span.nbytes:
            surplus = ceil_div(excess * tokens, span.nbytes)  # rounded up
            if by == "policy":
                surplus = min(surplus, as_index(self.policy.tail(span), "the tail of a span"))
            surplus = max(self._grain, surplus)  # or many calls would take a token each
            if surplus < tokens:
                self._split(span, tokens - surplus)
        elif span.payload is not None and span.nbytes:
            thinned = span.payload.thinned(excess)
            if thinned is not None:
                self._replace(span, thinned)
                self._offer_anew(span)
                return
            kept = span.payload.cut(excess)
            if kept is not None:
                self._split(span, kept)
        self.evict(span, now, by)

    def _replace(self, span: Span[P], payload: P) -> None:
        """Keep `payload`, which is less, in place of the present one of `span`."""
        previous = span.payload
        self._put(span, payload)
        if previous is not None:
            previous.close()

    def _offer_anew(self, span: Span[P]) -> None:
        """Tell of a candidate again: on its size, its place among them may depend."""
        span.offered = False
        self._candidates.withdraw(span)
        self._reconsider(span)

    # Retention.

    def _retain(self, span: Span[P], retention: Retention | None) -> None:
        """Set the retention of a span, and file the span anew."""
        if span.offered:
            span.offered = False
            self._candidates.withdraw(span)
        self._assign(span, retention)
        self._reconsider(span)

    def _lower(self, now: float) -> None:
        """Let the levels of retained spans fall to those of `now`."""
        candidates = self._candidates
        candidates.now = max(candidates.now, now)
        if now < candidates.steps.next:
            return
        for span, retention in candidates.steps.due(now):
            level = retention.level(now)
            if not level:
                self._retain(span, None)
                continue
            candidates.steps.renew(span, retention, level)
            if span.offered:
                candidates.lower(span, level)
