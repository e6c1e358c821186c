"""Spans, the nodes of the trees of an index, and the payloads kept for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence
from typing import Any, Generic, Literal, NamedTuple, Protocol, Self, TypeAlias, TypeVar

from kvcache.errors import KVCacheError

from .media import Placement
from .radix import Node, RadixTree
from .retention import Retention


class Payload(Protocol):
    """Data kept for a span."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes of the budget; constant."""

    @property
    def overhead(self) -> int:
        """Bytes of host memory it takes in addition, outside the budget; constant."""

    @property
    def resumable_anywhere(self) -> bool:
        """True if its first part is of use without the second, wherever it is split."""

    @property
    def resumable_inside(self) -> bool:
        """False if it is of use only together with a payload behind it."""

    def split(self, tokens: int) -> tuple[Self, Self]:
        """Return the data of the first `tokens` of its span, and of the others, to replace it."""

    def joins(self, following: Self) -> bool:
        """Return True if the payload of the span right behind can be joined to this one."""

    def join(self, following: Sequence[Self]) -> Self | None:
        """Return one payload for this and the `following`, contiguous spans, to replace them.

        None where that fails; nothing has changed then.
        """

    def reduced(self, position: int) -> Self | None:
        """Return what resuming at `position`, behind its span, needs of it; None for all of it.

        Both stay usable, and are closed one by one.
        """

    def thinned(self, nbytes: int) -> Self | None:
        """Return it without some places to resume at, for `nbytes` less at least.

        The deepest one stays. None if so many bytes cannot go. Both stay usable, and are closed one
        by one. Not asked of a payload that is resumable anywhere.
        """

    def cut(self, nbytes: int) -> int | None:
        """Return how many tokens at its beginning may stay for `nbytes` less at least, thinned.

        A request can resume behind them. None if there are none. Asked only where :meth:`thinned`
        had none.
        """

    def close(self) -> None:
        """Release everything it holds."""


P = TypeVar("P", bound=Payload)
EvictedBy: TypeAlias = Literal["policy", "retention", "quota", "drop_branch"]
"""Who chose a span to be evicted: the policy, or where all were retained, the least priority; the
quota of its salt; or a user who declared it dead."""


class Span(Generic[P]):
    """A node of the tree, with a payload for its tokens, or without one: a ghost.

    tree: its tree. media: those in it, at their positions in the sequence. uses: requests for it
    so far. used: time of the last, in seconds. born: that when its payload was stored. evicted:
    that when it became a ghost, the last for parts joined. evicted_by: who chose it then. Both are
    None if it never was one. pins: sessions that use it or a span behind it. children: kept spans
    right behind it. offered: whether it may be evicted. retention: None for none, and for a ghost.
    level: its effective priority while it is offered, by which it is queued; 0 if the policy may
    choose it. policy_data: owned by the policy; both parts of a span that is split have it, and the
    retention.
    """

    __slots__ = (
        "__weakref__",
        "born",
        "children",
        "evicted",
        "evicted_by",
        "level",
        "media",
        "node",
        "offered",
        "payload",
        "pins",
        "policy_data",
        "retention",
        "tree",
        "used",
        "uses",
    )

    def __init__(
        self,
        tree: RadixTree[Span[P]],
        node: Node[Span[P]],
        media: tuple[Placement, ...] = (),
    ) -> None:
        self.tree = tree
        self.node = node
        self.media = media
        self.payload: P | None = None
        self.pins = self.children = self.uses = self.level = 0
        self.used = self.born = 0.0
        self.evicted: float | None = None
        self.evicted_by: EvictedBy | None = None
        self.retention: Retention | None = None
        self.offered = False
        self.policy_data: object = None

    @property
    def start(self) -> int:
        """Position of its first token."""
        parent = self.node.parent
        return parent.depth if parent is not None else 0

    @property
    def stop(self) -> int:
        """Position after its last token."""
        return self.node.depth

    @property
    def nbytes(self) -> int:
        """Bytes its payload takes of the budget, 0 for a ghost."""
        payload = self.payload
        return payload.nbytes if payload is not None else 0

    @property
    def parent(self) -> Span[P] | None:
        """Span right before it, None for the first of a sequence."""
        parent = self.node.parent
        return parent.value if parent is not None else None

    @property
    def only_child(self) -> Span[P] | None:
        """The span right behind it, ghosts included; None if there are several, or none."""
        if len(self.node.children) != 1:
            return None
        [child] = self.node.children.values()
        return child.value

    @property
    def complete(self) -> bool:
        """True if nothing can be added to its payload: no token of it was ever dropped."""
        return self.payload is not None and self.payload.resumable_anywhere

    @property
    def useless(self) -> bool:
        """True if it was of use to spans behind it only, and none of them is kept any more."""
        return self.offered and self.payload is not None and not self.payload.resumable_inside

    @property
    def path(self) -> list[Span[P]]:
        """Spans from position 0 to this one, itself the last."""
        spans, node = [self], self.node.parent
        while node is not None and (span := node.value) is not None:
            spans.append(span)
            node = node.parent
        spans.reverse()
        return spans


class Prefix(NamedTuple, Generic[P]):
    """The known beginning of a sequence.

    spans: in order, ghosts among them. length: its tokens; they may end inside the last span.
    """

    spans: list[Span[P]]
    length: int


def alike(upper: Span[P], lower: Span[P], ghosts: Container[Span[P]]) -> bool:
    """Return True if `upper` and `lower`, right behind it, may be one span again.

    Nothing else may be behind `upper`, save for one of `ghosts` at most, which can be forgotten:
    for that alone, a span that is requested as a whole shall not stay in two.
    """
    if upper.pins != lower.pins or upper.used != lower.used:
        return False
    children = upper.node.children
    if upper.payload is None or lower.payload is None:
        same = upper.evicted_by == lower.evicted_by
        return same and upper.payload is lower.payload and len(children) == 1
    if len(children) > 2 or upper.retention != lower.retention:
        return False
    others = [node.value for node in children.values() if node.value is not lower]
    forgettable = all(span is None or span in ghosts for span in others)
    return forgettable and upper.payload.joins(lower.payload)


def last_eviction(spans: Sequence[Span[P]]) -> float | None:
    """Return the time at which the last of `spans` was evicted; None if none was."""
    times = [span.evicted for span in spans if span.evicted is not None]
    return max(times, default=None)


def chooser(by: EvictedBy | None, policy: str) -> str:
    """Return who chose an evicted span, as text. policy: name of the one that evicts."""
    return policy if by in ("policy", None) else by


def as_offered(span: object, policy: object) -> Span[Any]:
    """Return the span that `policy` chose. Raises: KVCacheError unless it was offered it."""
    if not isinstance(span, Span) or not span.offered or span.level:
        chosen = f"[{span.start}, {span.stop})" if isinstance(span, Span) else repr(span)
        raise KVCacheError(
            "a policy chooses among the spans it was offered; "
            f"{type(policy).__name__} chose {chosen}, which it was not, or not any more."
        )
    return span


def file_span(span: Span[P], spans: OrderedDict[Span[P], None], belongs: bool) -> None:
    """Add `span` to the end of `spans` unless it is there, or take it out."""
    if belongs:
        spans.setdefault(span)
    else:
        spans.pop(span, None)
