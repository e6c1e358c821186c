"""Index of kept spans of token sequences, within a budget: radix trees with an eviction policy.

Every node of a tree is a span: the tokens between two places where sequences part, or where one
ended. All tokens of a span have the same history, so a policy decides about spans. An evicted span
leaves its tokens behind for a while, a ghost, so that a policy can learn from what comes back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, Self, TypeVar

from kvcache.errors import KVCacheError
from kvcache.storage.lengths import ceil_div

from .policies import EvictionPolicy
from .radix import Node, RadixTree, Tokens


class Payload(Protocol):
    """Data kept for a span."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes of the budget."""

    @property
    def resumable_anywhere(self) -> bool:
        """True if its first part is of use without the second, wherever it is split."""

    def split(self, tokens: int) -> tuple[Self, Self]:
        """Return the data of the first `tokens` of its span, and of the others, to replace it."""

    def close(self) -> None:
        """Release everything it holds."""


P = TypeVar("P", bound=Payload)


class Span(Generic[P]):
    """A node of the tree, with a payload for its tokens, or without one: a ghost.

    uses: requests for it so far. used: time of the last, in seconds. pins: sessions that use it
    or a span behind it. children: kept spans right behind it. offered: whether the policy may
    choose it. policy_data: owned by the policy; both parts of a span that is split have it.
    """

    __slots__ = ("children", "node", "offered", "payload", "pins", "policy_data", "used", "uses")

    def __init__(self, node: Node[Span[P]]) -> None:
        self.node = node
        self.payload: P | None = None
        self.pins = self.children = self.uses = 0
        self.used = 0.0
        self.offered = False
        self.policy_data: object = None

    @property
    def start(self) -> int:
        """Position of its first token."""
        return self.node.parent.depth if self.node.parent is not None else 0

    @property
    def stop(self) -> int:
        """Position after its last token."""
        return self.node.depth

    @property
    def nbytes(self) -> int:
        """Bytes its payload takes of the budget, 0 for a ghost."""
        return self.payload.nbytes if self.payload is not None else 0

    @property
    def parent(self) -> Span[P] | None:
        """Span right before it, None for the first of a sequence."""
        return self.node.parent.value if self.node.parent is not None else None

    @property
    def path(self) -> list[Span[P]]:
        """Spans from position 0 to this one, itself the last."""
        spans: list[Span[P]] = []
        span: Span[P] | None = self
        while span is not None:
            spans.append(span)
            span = span.parent
        return spans[::-1]


class SpanIndex(Generic[P]):
    """Spans of one budget, over any number of trees (one per tenant, say).

    budget: bytes of all payloads together at most, None for no limit; exceeded only while all
    candidates are pinned. grain: fewest tokens taken at once from a span that can be cut anywhere.
    ghosts: evicted spans remembered at most. on_evict: called with a span about to be evicted.
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        budget: int | None = None,
        *,
        grain: int = 64,
        ghosts: int = 100_000,
        on_evict: Callable[[Span[P]], None] = lambda _: None,
    ) -> None:
        self.policy = policy
        self.budget = budget
        self.nbytes = 0
        """Bytes of all payloads together."""
        self.evictions = 0
        """Spans evicted so far."""
        self.kept: dict[Span[P], None] = {}
        """Spans with a payload, in the order in which they came; there may be far more ghosts."""
        self._grain, self._max_ghosts, self._on_evict = grain, ghosts, on_evict
        self._ghosts: OrderedDict[Span[P], None] = OrderedDict()

    def follow(self, tree: RadixTree[Span[P]], tokens: Tokens) -> list[Span[P]]:
        """Return the spans at the beginning of `tokens`, ghosts among them.

        The last is split where `tokens` leave it.
        """
        length, node, inside = tree.match(tokens)
        if inside is not None and inside.value is not None and length > node.depth:
            return self._split(inside.value, length - node.depth).path
        return node.value.path if node.value is not None else []

    def extend(self, tree: RadixTree[Span[P]], tokens: Tokens) -> list[Span[P]]:
        """Return the spans of all `tokens`; the last may be new, a ghost.

        Fill or pin a new one before :meth:`trim`, which may forget ghosts.
        """
        spans = self.follow(tree, tokens)
        if tokens.size > (spans[-1].stop if spans else 0):
            node = tree.insert(tokens)
            node.value = Span(node)
            self._ghosts[node.value] = None
            spans.append(node.value)
        return spans

    def use(self, spans: list[Span[P]], now: float) -> None:
        """Count a request for `spans`, given in the order of their tokens."""
        for span in spans:
            # The policy first: to it, uses and used are still those of earlier requests.
            self.policy.use(span, now)
            span.uses += 1
            span.used = now

    def fill(self, span: Span[P], payload: P) -> None:
        """Keep `payload` for `span` in place of its present one. The index takes ownership."""
        previous, self.nbytes = span.payload, self.nbytes + payload.nbytes - span.nbytes
        span.payload = payload
        if previous is None:
            self._ghosts.pop(span, None)
            self.kept[span] = None
            if span.parent is not None:
                span.parent.children += 1
            # Last, because the policy may raise.
            self._reconsider(span)
            if span.parent is not None:
                self._reconsider(span.parent)

    def pin(self, span: Span[P], pins: int = 1) -> None:
        """Protect `span` and all spans before it from eviction; pins=-1 ends one protection."""
        path = span.path
        for pinned in path:
            pinned.pins += pins
        for pinned in path:  # last, because the policy may raise
            self._reconsider(pinned)

    def trim(self, now: float) -> None:
        """Evict until the budget holds, or all candidates are in use.

        Raises: KVCacheError if the policy chooses a span it was not offered.
        """
        while self.budget is not None and self.nbytes > self.budget:
            span = self.victim(now)
            if span is None:
                break
            self._shrink(span, self.nbytes - self.budget, now)
        self._forget()

    def victim(self, now: float) -> Span[P] | None:
        """Ask the policy for the span to evict next; None if it was offered none.

        Raises: KVCacheError if the policy chooses a span it was not offered.
        """
        span = self.policy.victim(now)
        if span is None:
            return None
        if not isinstance(span, Span) or not span.offered:
            chosen = f"[{span.start}, {span.stop})" if isinstance(span, Span) else repr(span)
            raise KVCacheError(
                "a policy chooses among the spans it was offered; "
                f"{type(self.policy).__name__} chose {chosen}, which it was not, or not any more."
            )
        return span

    def evict(self, span: Span[P], now: float) -> None:
        """Close the payload of an offered span and make it a ghost. Ghosts stay as they are."""
        payload = span.payload
        if payload is None:
            return
        # First, while the span still has its payload and its place in the tree.
        self._on_evict(span)
        self.policy.evict(span, now)
        self.nbytes -= payload.nbytes
        self.evictions += 1
        span.payload, span.offered = None, False
        payload.close()
        del self.kept[span]
        self._ghosts[span] = None
        self._count_children(span.parent, -1)

    def drop_ghosts(self) -> None:
        """Forget all ghosts. Their nodes stay: for trees given up as a whole."""
        self._ghosts.clear()

    def _shrink(self, span: Span[P], excess: int, now: float) -> None:
        """Evict `span`, or if it can be cut anywhere only as much of its end as `excess` bytes."""
        tokens = span.stop - span.start
        if span.payload is not None and span.payload.resumable_anywhere and span.nbytes:
            # Rounded up; and no less than the grain, or many calls would take a token each.
            surplus = max(self._grain, ceil_div(excess * tokens, span.nbytes))
            if surplus < tokens:
                self._split(span, tokens - surplus)
        self.evict(span, now)

    def _split(self, lower: Span[P], tokens: int) -> Span[P]:
        """Return a new span for the first `tokens` of `lower`; the others stay in `lower`."""
        node = RadixTree.split(lower.node, tokens)
        node.value = upper = Span(node)
        upper.pins, upper.uses, upper.used = lower.pins, lower.uses, lower.used
        upper.policy_data = lower.policy_data
        if lower.payload is None:
            self._ghosts[upper] = None
        else:
            upper.payload, lower.payload = lower.payload.split(tokens)
            # Not offered: with a child, it is no candidate, whether `lower` is one or not.
            upper.children = 1
            self.kept[upper] = None
        return upper

    def _count_children(self, span: Span[P] | None, change: int) -> None:
        if span is not None:
            span.children += change
            self._reconsider(span)

    def _reconsider(self, span: Span[P]) -> None:
        """Offer `span` to the policy, or withdraw it, if it has become or ceased to be evictable.

        Leaf first: a span is not offered while spans behind it are kept, which build on it.
        """
        offered = span.payload is not None and not span.pins and not span.children
        if offered == span.offered:
            return
        # A policy that raises leaves a span that it was not offered.
        span.offered = False
        (self.policy.offer if offered else self.policy.withdraw)(span)
        span.offered = offered

    def _forget(self) -> None:
        """Forget the oldest ghosts beyond the limit, except pinned ones and inner nodes."""
        for _ in range(len(self._ghosts) - self._max_ghosts):
            span, _ = self._ghosts.popitem(last=False)
            if span.node.children or span.pins:
                # To the end: left in front, it would be all that later calls look at.
                self._ghosts[span] = None
            else:
                RadixTree.remove(span.node)
