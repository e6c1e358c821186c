"""Which spans of token sequences are kept, within a budget: a radix tree with a policy.

Every node of the tree is a span: the tokens between two places where sequences part, or where one
ended. All tokens of a span have the same history, so a policy decides about spans. What is evicted
leaves its tokens behind for a while, a ghost, so that a policy can learn from what comes back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, Protocol, Self, TypeVar

from kvcache.errors import KVCacheError

from .policies import Policy
from .radix import Node, RadixTree, Tokens


class Payload(Protocol):
    """What is kept for a span."""

    @property
    def size(self) -> int:
        """What it takes of the budget."""

    @property
    def resumable_anywhere(self) -> bool:
        """Whether the first part of it is of use without the second."""

    def split(self, tokens: int) -> tuple[Self, Self]:
        """Itself in two: what is kept for the first `tokens` of its span, and for the others."""

    def close(self) -> None:
        """Give up what it holds."""


P = TypeVar("P", bound=Payload)


class Span(Generic[P]):
    """A node of the tree, and what is kept for its tokens: nothing, if it is a ghost.

    uses: how often it was asked for. used: when last, in seconds. pins: who needs it now.
    children: spans right behind it that are kept. offered: whether the policy may choose it.
    policy_data: of the policy's own; both parts of a span that is split have it.
    """

    __slots__ = ("children", "node", "offered", "payload", "pins", "policy_data", "used", "uses")

    def __init__(self, node: Node[Span[P]]) -> None:
        self.node = node
        self.payload: P | None = None
        self.pins = self.children = self.uses = 0
        self.used = 0.0
        self.offered = False
        self.policy_data: Any = None

    @property
    def start(self) -> int:
        """Position of its first token."""
        return self.node.parent.depth if self.node.parent is not None else 0

    @property
    def stop(self) -> int:
        """One past the position of its last."""
        return self.node.depth

    @property
    def size(self) -> int:
        """What it takes of the budget, 0 for a ghost."""
        return self.payload.size if self.payload is not None else 0

    @property
    def parent(self) -> Span[P] | None:
        """The span before it."""
        return self.node.parent.value if self.node.parent is not None else None

    @property
    def path(self) -> list[Span[P]]:
        """The spans from the beginning of its tokens to it."""
        spans: list[Span[P]] = []
        span: Span[P] | None = self
        while span is not None:
            spans.append(span)
            span = span.parent
        return spans[::-1]


class SpanIndex(Generic[P]):
    """The spans of one budget, over any number of trees (one per tenant, say).

    budget: most that all payloads together may take, None for no limit; exceeded only while what
    would have to go is pinned. grain: fewest tokens that a divisible span loses at once.
    ghosts: evicted spans that are remembered, at most. on_evict: told of spans about to be evicted.
    """

    def __init__(
        self,
        policy: Policy,
        budget: int | None = None,
        *,
        grain: int = 64,
        ghosts: int = 100_000,
        on_evict: Callable[[Span[P]], None] = lambda _: None,
    ) -> None:
        self.policy = policy
        self.budget = budget
        self.size = 0
        """What all payloads take together."""
        self.evictions = 0
        """Spans evicted so far."""
        self.kept: dict[Span[P], None] = {}
        """The spans with a payload, which may be few among the ghosts."""
        self._grain, self._most_ghosts, self._on_evict = grain, ghosts, on_evict
        self._ghosts: OrderedDict[Span[P], None] = OrderedDict()

    def follow(self, tree: RadixTree[Span[P]], tokens: Tokens) -> list[Span[P]]:
        """The spans that `tokens` begin with, ghosts among them; the last is split to fit."""
        length, node, inside = tree.match(tokens)
        if inside is not None and length > node.depth:
            node = self._split(inside, length - node.depth)
        return node.value.path if node.value is not None else []

    def extend(self, tree: RadixTree[Span[P]], tokens: Tokens) -> list[Span[P]]:
        """The spans that `tokens` consist of. What was not there yet is a ghost at first.

        Fill or pin it before :meth:`trim`, which may forget ghosts.
        """
        spans = self.follow(tree, tokens)
        if tokens.size > (spans[-1].stop if spans else 0):
            node = tree.insert(tokens)
            node.value = Span(node)
            self._ghosts[node.value] = None
            spans.append(node.value)
        return spans

    def use(self, spans: list[Span[P]], now: float) -> None:
        """Tell the policy that these, in the order of their tokens, were asked for."""
        for span in spans:
            self.policy.use(span, now)
            span.uses += 1
            span.used = now

    def fill(self, span: Span[P], payload: P) -> None:
        """Keep `payload` for `span`, instead of what it has; it is the index's then."""
        before, self.size = span.payload, self.size + payload.size - span.size
        span.payload = payload
        if before is None:
            self._ghosts.pop(span, None)
            self.kept[span] = None
            self._reconsider(span)
            self._count(span.parent, 1)

    def pin(self, span: Span[P], pins: int = 1) -> None:
        """Let neither `span` nor what is before it go; -1 takes that back."""
        for each in span.path:
            each.pins += pins
            self._reconsider(each)

    def trim(self, now: float) -> None:
        """Evict until the budget holds, or all that could go is in use."""
        while self.budget is not None and self.size > self.budget:
            span = self.policy.victim(now)
            if span is None:
                break
            if not span.offered:
                raise KVCacheError(
                    "a policy chooses among the spans it was offered; "
                    f"{type(self.policy).__name__} chose [{span.start}, {span.stop}), which it "
                    "was not, or not any more."
                )
            self._shrink(span, self.size - self.budget, now)
        self._forget()

    def evict(self, span: Span[P], now: float) -> None:
        """Give up what is kept for `span`, which becomes a ghost."""
        payload = span.payload
        if payload is None:
            return
        self._on_evict(span)
        self.policy.evict(span, now)
        self.size -= payload.size
        self.evictions += 1
        span.payload, span.offered = None, False
        payload.close()
        del self.kept[span]
        self._ghosts[span] = None
        self._count(span.parent, -1)

    def drop_ghosts(self) -> None:
        """Forget what is not kept; for trees that are given up as a whole."""
        self._ghosts.clear()

    def _shrink(self, span: Span[P], excess: int, now: float) -> None:
        """Evict `span`, or as much of its end as is too much."""
        tokens = span.stop - span.start
        if span.payload is not None and span.payload.resumable_anywhere and span.size:
            going = max(self._grain, -(-excess * tokens // span.size))
            if going < tokens:
                self._split(span.node, tokens - going)
        self.evict(span, now)

    def _split(self, node: Node[Span[P]], tokens: int) -> Node[Span[P]]:
        """A span of its own for the first `tokens` of that of `node`, which keeps the others."""
        lower: Any = node.value
        node = RadixTree.split(node, tokens)
        node.value = upper = Span(node)
        upper.pins, upper.uses, upper.used = lower.pins, lower.uses, lower.used
        upper.policy_data = lower.policy_data
        if lower.payload is None:
            self._ghosts[upper] = None
        else:
            upper.payload, lower.payload = lower.payload.split(tokens)
            upper.children = 1
            self.kept[upper] = None
        return node

    def _count(self, span: Span[P] | None, children: int) -> None:
        if span is not None:
            span.children += children
            self._reconsider(span)

    def _reconsider(self, span: Span[P]) -> None:
        """Tell the policy whether it may choose `span`, if that has changed."""
        offered = span.payload is not None and not span.pins and not span.children
        if offered != span.offered:
            span.offered = offered
            (self.policy.offer if offered else self.policy.withdraw)(span)

    def _forget(self) -> None:
        """Let go of the oldest ghosts that are too many, but not of what others hang on."""
        for _ in range(len(self._ghosts) - self._most_ghosts):
            span, _ = self._ghosts.popitem(last=False)
            if span.node.children or span.pins:
                self._ghosts[span] = None
            else:
                RadixTree.remove(span.node)
