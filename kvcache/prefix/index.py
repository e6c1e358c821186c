"""Index of kept spans of token sequences, within a budget: radix trees with an eviction policy.

Every node of a tree is a span: the tokens between two places where sequences part, or where one
ended. All tokens of a span have the same history, so a policy decides about spans. An evicted span
leaves its tokens behind for a while, a ghost, so that a policy can learn from what comes back.

Looking something up changes no tree. Spans are split where something is stored, and joined again
when nobody needs to tell their parts apart.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from sys import getsizeof
from typing import Generic

from kvcache.storage.lengths import ceil_div

from .footprint import ENTRY, ORDERED_ENTRY, of_span, of_tree
from .media import Placement, within
from .policies import EvictionPolicy
from .radix import RadixTree, Tokens
from .residency import Residency
from .spans import P, Prefix, Span, alike, as_offered, file_span, last_eviction
from .superseded import Superseded

_ROOM = 4_000
"""Bytes of tables without entries, rounded up."""
_MIN_JOINED = 4
"""Spans joined at once at least: joining rows on the host copies them."""


class SpanIndex(Generic[P]):
    """Spans of one budget, over any number of trees (one per tenant, say).

    budget: bytes of all payloads together at most, None for no limit; exceeded only while all
    candidates are pinned. grain: fewest tokens taken at once from a span that can be cut anywhere.
    index_budget: bytes of everything else at most, None for no limit: the oldest ghosts are
    forgotten first, then spans are evicted. on_evict: called with a span about to be evicted.
    on_empty: called with a tree that has lost its last span. others: returns bytes to be counted
    as well.
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        budget: int | None = None,
        *,
        grain: int = 64,
        index_budget: int | None = 1 << 26,
        on_evict: Callable[[Span[P]], None] = lambda _: None,
        on_empty: Callable[[RadixTree[Span[P]]], object] = lambda _: None,
        others: Callable[[], int] = lambda: 0,
    ) -> None:
        self.policy = policy
        self.budget = budget
        self.index_budget = index_budget
        self.nbytes = 0
        """Bytes of all payloads together."""
        self.evictions = 0
        """Spans evicted so far."""
        self.kept: dict[Span[P], None] = {}
        """Spans with a payload, in the order in which they came; there may be far more ghosts."""
        self.residency: Residency | None = None
        """Times of spans, None where nobody wants to know."""
        self._grain = grain
        self._on_evict, self._on_empty, self._others = on_evict, on_empty, others
        # Ghosts without spans behind them and without pins, the oldest first: to be forgotten.
        self._ghosts: OrderedDict[Span[P], None] = OrderedDict()
        self._superseded: Superseded[P] = Superseded()
        self._spans = 0
        self._tracked = 0  # bytes of trees, nodes, spans and the overhead of payloads

    # Looking up.

    def follow(self, tree: RadixTree[Span[P]], tokens: Tokens) -> Prefix[P]:
        """Return the spans at the beginning of `tokens`, ghosts among them. Nothing changes."""
        length, node, inside = tree.match(tokens)
        if inside is not None and length > node.depth:
            node = inside
        span = node.value
        return Prefix(span.path if span is not None else [], length)

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

    def pin(self, span: Span[P], pins: int = 1) -> None:
        """Protect `span` and all spans before it from eviction; pins=-1 ends one protection."""
        path = span.path
        for pinned in path:
            pinned.pins += pins
        for pinned in path:  # last, because the policy may raise
            self._reconsider(pinned)

    # Storing.

    def extend(
        self, tree: RadixTree[Span[P]], tokens: Tokens, media: Sequence[Placement] = ()
    ) -> list[Span[P]]:
        """Return the spans of all `tokens`; the last may be new, a ghost.

        The last known one is split where `tokens` leave it. Fill or pin a new one before
        :meth:`trim`, which may forget ghosts. media: of `tokens`.
        """
        spans, length = self.follow(tree, tokens)
        if spans and length < spans[-1].stop:
            spans[-1] = self._split(spans[-1], length - spans[-1].start)
        if length < tokens.size:
            spans.append(self._attach(tree, spans[-1] if spans else None, tokens, media))
        return spans

    def fill(self, span: Span[P], payload: P) -> None:
        """Keep `payload` for `span` in place of its present one. The index takes ownership."""
        added = span.payload is None
        self._put(span, payload)
        if added:
            self._ghosts.pop(span, None)
            self.kept[span] = None
            span.born = span.used
            if span.parent is not None:
                span.parent.children += 1
            # Last, because the policy may raise.
            self._reconsider(span)
            if span.parent is not None:
                self._reconsider(span.parent)

    # Dropping.

    def trim(self, now: float) -> None:
        """Evict until the budgets hold, or all candidates are in use.

        Where a sequence goes on behind a payload, what of it serves its own end alone goes first.

        Raises: KVCacheError if the policy chooses a span it was not offered.
        """
        while self.budget is not None and self.nbytes > self.budget:
            if self._reduce_superseded():
                continue
            span = self.victim(now)
            if span is None:
                break
            self._shrink(span, self.nbytes - self.budget, now)
        while self.index_budget is not None and self._reserved > self.index_budget:
            if self._ghosts:
                self._remove(next(iter(self._ghosts)))
                continue
            span = self.victim(now)
            if span is None:
                break
            self.evict(span, now)

    def victim(self, now: float) -> Span[P] | None:
        """Ask the policy for the span to evict next; None if it was offered none.

        Raises: KVCacheError if the policy chooses a span it was not offered.
        """
        span = self.policy.victim(now)
        return None if span is None else as_offered(span, self.policy)

    def evict(self, span: Span[P], now: float) -> None:
        """Make an offered span a ghost, and those before it that are of use to it alone."""
        evicted: Span[P] | None = span
        while evicted is not None and evicted.payload is not None:
            evicted = self._evict_one(evicted, evicted.payload, now)

    def _evict_one(self, span: Span[P], payload: P, now: float) -> Span[P] | None:
        """Do :meth:`evict` for one span; return the one before it if that is of no use now."""
        # First, while the span still has its payload and its place in the tree.
        self._on_evict(span)
        if self.residency is not None:
            self.residency.evict(span, now)
        self.policy.evict(span, now)
        self.evictions += 1
        self.nbytes -= payload.nbytes
        self._tracked -= payload.overhead
        span.payload, span.offered, span.evicted = None, False, now
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

    def forget_ghosts(self) -> None:
        """Remove all ghosts with nothing kept behind them, except pinned ones."""
        while self._ghosts:
            self._remove(next(iter(self._ghosts)))

    def settle(self, span: Span[P]) -> None:
        """Join the spans up to `span` that nobody tells apart any more, where there are several."""
        run: list[Span[P]] = []
        for next_span in [*span.path, None]:
            if run and (next_span is None or not self._are_alike(run[-1], next_span)):
                if len(run) >= _MIN_JOINED:
                    self._join(run)
                run = []
            if next_span is not None:
                run.append(next_span)

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
        return self.policy.nbytes + self._spans * self.policy.data_nbytes + self._others()

    # Changes of the trees.

    def _put(self, span: Span[P], payload: P | None) -> None:
        """Set the payload of `span`, and count its bytes instead of those of the present one."""
        if span.payload is not None:
            self.nbytes -= span.payload.nbytes
            self._tracked -= span.payload.overhead
        if payload is not None:
            self.nbytes += payload.nbytes
            self._tracked += payload.overhead
        span.payload = payload

    def _attach(
        self,
        tree: RadixTree[Span[P]],
        parent: Span[P] | None,
        tokens: Tokens,
        media: Sequence[Placement],
    ) -> Span[P]:
        """Return a new span, a ghost, for the `tokens` behind `parent`."""
        node = parent.node if parent is not None else tree.root
        if not node.children and parent is None:
            self._tracked += of_tree(tree)
        children = getsizeof(node.children) if node.children or parent is not None else 0
        start = node.depth
        new = RadixTree.attach(node, tokens[start:])
        new.value = span = Span(tree, new, within(media, start, tokens.size) if media else ())
        self._spans += 1
        self._tracked += of_span(span) + getsizeof(node.children) - children
        self._ghosts[span] = None
        if parent is not None:
            self._ghosts.pop(parent, None)
            self._superseded.drop(parent)
        return span

    def _split(self, lower: Span[P], tokens: int) -> Span[P]:
        """Return a new span for the first `tokens` of `lower`; the others stay in `lower`."""
        # First, as it may raise.
        parts = None if lower.payload is None else lower.payload.split(tokens)
        self._tracked -= of_span(lower)
        node = RadixTree.split(lower.node, tokens)
        node.value = upper = Span(lower.tree, node)
        if lower.media:
            upper.media = within(lower.media, upper.start, upper.stop)
            lower.media = within(lower.media, lower.start, lower.stop)
        upper.pins, upper.uses = lower.pins, lower.uses
        upper.used, upper.born, upper.evicted = lower.used, lower.born, lower.evicted
        upper.policy_data = lower.policy_data
        self._spans += 1
        self._tracked += of_span(lower) + of_span(upper)
        if parts is not None:
            self._put(upper, parts[0])
            self._put(lower, parts[1])
            # Not offered: with a child, it is no candidate, whether `lower` is one or not.
            upper.children = 1
            self.kept[upper] = None
            self._reconsider(upper)
        return upper

    def _remove(self, span: Span[P]) -> None:
        """Take a ghost without children out of its tree, and the tree with its last span."""
        node, parent = span.node, span.node.parent
        if parent is None:
            return  # the root, which has no span
        self._tracked -= of_span(span)
        self._spans -= 1
        del self._ghosts[span]
        RadixTree.detach(node)
        node.value = None  # a span and its node refer to each other: free both at once
        if parent.value is not None:
            self._reconsider(parent.value)
            if parent.value in self._ghosts:
                # It is no younger than what was behind it.
                self._ghosts.move_to_end(parent.value, last=False)
            elif parent.value.payload is None:
                self._join_ghosts(parent.value)
        elif not parent.children:
            self._tracked -= of_tree(span.tree) + getsizeof(parent.children)
            parent.children = {}
            self._on_empty(span.tree)

    # Spans whose parts nobody tells apart any more.

    def _are_alike(self, upper: Span[P], lower: Span[P]) -> bool:
        return alike(upper, lower, self._ghosts) and self.policy.alike(upper, lower)

    def _join_ghosts(self, upper: Span[P]) -> None:
        """Join a ghost and the only one right behind it, if they are alike."""
        lower = upper.only_child
        if lower is not None and self._are_alike(upper, lower):
            self._join([upper, lower])

    def _join(self, run: Sequence[Span[P]]) -> None:
        """Let the last of contiguous spans that are alike be all of them."""
        *uppers, last = run
        payloads = [span.payload for span in run if span.payload is not None]
        joined = payloads[0].join(payloads[1:]) if payloads else None
        if payloads and joined is None:
            return  # they serve as well apart
        for upper, lower in zip(uppers, run[1:], strict=True):
            for node in list(upper.node.children.values()):
                if node.value is not None and node.value is not lower:
                    self._remove(node.value)
        if last.offered:  # its size changes, on which its place among the candidates may depend
            self.policy.withdraw(last)
            last.offered = False
        self._tracked -= sum(map(of_span, run))
        RadixTree.join([span.node for span in run])
        last.media = tuple(dict.fromkeys(placement for span in run for placement in span.media))
        for upper in uppers:
            self._put(upper, None)
            upper.node.value = None
            self.kept.pop(upper, None)
            self._ghosts.pop(upper, None)
            self._superseded.drop(upper)
        self._put(last, joined)
        last.evicted, self._spans = last_eviction(run), self._spans - len(uppers)
        self._tracked += of_span(last)
        self._ghosts.pop(last, None)
        self._reconsider(last)

    def _reduce_superseded(self) -> bool:
        """Release rows that serve the end of a superseded span alone; return False if none do."""
        popped = self._superseded.pop_reducible()
        if popped is None:
            return False
        span, reduced = popped
        previous, child = span.payload, span.only_child
        self._put(span, reduced)
        if previous is not None:
            previous.close()
        # Rows on the host are copied to be joined: not many for a few, each turn anew.
        if child is not None and reduced.nbytes <= child.nbytes and self._are_alike(span, child):
            self._join([span, child])
        return True

    def _shrink(self, span: Span[P], excess: int, now: float) -> None:
        """Evict `span`, or if it can be cut anywhere only as much of its end as `excess` bytes."""
        tokens = span.stop - span.start
        if span.complete and span.nbytes:
            # Rounded up; and no less than the grain, or many calls would take a token each.
            needed = min(ceil_div(excess * tokens, span.nbytes), self.policy.tail(span))
            surplus = max(self._grain, needed)
            if surplus < tokens:
                self._split(span, tokens - surplus)
        self.evict(span, now)

    def _reconsider(self, span: Span[P]) -> None:
        """File `span` where it belongs: among the candidates, superseded spans, or idle ghosts.

        Leaf first: a span is not offered while spans behind it are kept, which build on it.
        """
        payload, pinned = span.payload, span.pins
        if payload is None:
            file_span(span, self._ghosts, not pinned and not span.node.children)
        elif not payload.resumable_anywhere:
            self._superseded.file(span)
        offered = payload is not None and not pinned and not span.children
        if offered == span.offered:
            return
        # A policy that raises leaves a span that it was not offered.
        span.offered = False
        (self.policy.offer if offered else self.policy.withdraw)(span)
        span.offered = offered
