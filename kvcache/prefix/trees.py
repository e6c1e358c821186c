"""Trees of spans: attached, split, joined, and filed by what may be done with them.

Looking something up changes no tree. Spans are split where something is stored, and joined again
when nobody needs to tell their parts apart.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from sys import getsizeof
from typing import Generic

from .candidates import Candidates
from .footprint import of_span, of_tree
from .media import Placement, within
from .policies import EvictionPolicy
from .quotas import LimitedTree, QuotaOf, Quotas
from .radix import RadixTree, Tokens
from .retention import NBYTES, Retention
from .spans import P, Prefix, Span, alike, file_span, last_eviction
from .superseded import Superseded, is_resumed, superseded_before

_MIN_JOINED = 4
"""Spans joined at once at least: joining rows on the host copies them."""


class SpanTrees(Generic[P]):
    """Spans in any number of trees, and the bytes that they take.

    policy: hears of the spans that may be evicted and are not retained. quota_of: bytes of each
    salt at most. on_empty: called with a tree that has lost its last span. on_join: called with
    spans that are part of the one behind them from now on.
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        quota_of: QuotaOf | None,
        on_empty: Callable[[RadixTree[Span[P]]], object],
        on_join: Callable[[Sequence[Span[P]]], None],
    ) -> None:
        self.policy = policy
        self.nbytes = 0
        """Bytes of all payloads together."""
        self.kept: dict[Span[P], None] = {}
        """Spans with a payload, in the order in which they came; there may be far more ghosts."""
        self._quotas: Quotas[P] = Quotas(quota_of)
        self._candidates: Candidates[P] = Candidates(policy, self._quotas)
        self._on_empty, self._on_join = on_empty, on_join
        # Ghosts without spans behind them and without pins, the oldest first: to be forgotten.
        self._ghosts: OrderedDict[Span[P], None] = OrderedDict()
        self._superseded: Superseded[P] = Superseded()
        self._deserted: dict[Span[P], None] = {}
        """Spans that may be of no use since the last trim: the next one finds out."""
        self._spans = 0
        self._tracked = 0  # bytes of trees, nodes, spans and the overhead of payloads

    def new_tree(self, salt: str) -> RadixTree[Span[P]]:
        """Return an empty tree for a salt. Raises: what the function of quotas raises."""
        return self._quotas.new_tree(salt)

    def follow(self, tree: RadixTree[Span[P]], tokens: Tokens) -> Prefix[P]:
        """Return the spans at the beginning of `tokens`, ghosts among them. Nothing changes."""
        length, node, inside = tree.match(tokens)
        if inside is not None and length > node.depth:
            node = inside
        span = node.value
        return Prefix(span.path if span is not None else [], length)

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

    def _put(self, span: Span[P], payload: P | None) -> None:
        """Set the payload of `span`, and count its bytes instead of those of the present one."""
        before = self.nbytes
        if span.payload is not None:
            self.nbytes -= span.payload.nbytes
            self._tracked -= span.payload.overhead
        if payload is not None:
            self.nbytes += payload.nbytes
            self._tracked += payload.overhead
        if isinstance(span.tree, LimitedTree):
            self._quotas.count(span.tree, self.nbytes - before)
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
        upper.used, upper.born = lower.used, lower.born
        upper.evicted, upper.evicted_by = lower.evicted, lower.evicted_by
        upper.policy_data = lower.policy_data
        self._spans += 1
        self._tracked += of_span(lower) + of_span(upper)
        if lower.retention is not None:
            self._assign(upper, lower.retention)
        if parts is not None:
            self._put(upper, parts[0])
            self._put(lower, parts[1])
            self._reconsider(lower)  # its place to resume at may have been in the first part
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
            self._quotas.forget(span.tree)
            self._on_empty(span.tree)

    # Spans whose parts nobody tells apart any more.

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
            self._candidates.withdraw(last)
            last.offered = False
        for upper in uppers:
            self._assign(upper, None)
            self.policy.join(upper, last, self._candidates.now)
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
        self._on_join(uppers)
        self._reconsider(last)

    def _fold_superseded(self) -> bool:
        """Join a superseded span to the next one; return False if there is none that can be."""
        return any(self._fold(span) for span in iter(self._superseded.pop, None))

    def _fold_before(self, span: Span[P], now: float) -> bool:
        """Do the same for a span before `span`, retained no more."""
        before = superseded_before(span, now)
        return any(self._fold(upper) for upper in before if not is_resumed(upper))

    def _fold(self, span: Span[P]) -> bool:
        """Join a superseded span to the next one, whoever used it; return False if that fails.

        Nobody can resume at its end any more, so all that counts is when the next one was used.
        """
        child, payload = span.only_child, span.payload
        if payload is None or child is None or child.payload is None:
            return False
        reduced = payload.reduced(child.stop)
        if not (reduced or payload).joins(child.payload):
            if reduced is not None:
                reduced.close()
            return False
        if reduced is not None:
            self._put(span, reduced)
            payload.close()
        self._join([span, child])
        return span.payload is None

    # Where spans belong.

    def _assign(self, span: Span[P], retention: Retention | None) -> None:
        """Set the retention of `span`, which is no candidate now, and note when it falls."""
        if span.retention is not None:
            self._tracked -= NBYTES
            previous, span.retention = span.retention, None
            self._candidates.steps.drop(previous)
        if retention is not None:
            self._tracked += NBYTES
            span.retention = retention
            candidates = self._candidates
            candidates.any_retained = True
            candidates.steps.add(span, retention, retention.level(candidates.now))

    def _reconsider(self, span: Span[P]) -> None:
        """File `span` where it belongs: among the candidates, superseded spans, or idle ghosts.

        Leaf first: a span is not offered while spans behind it are kept, which build on it.
        """
        payload, pinned = span.payload, span.pins
        if payload is None:
            file_span(span, self._ghosts, not pinned and not span.node.children)
        elif not payload.resumable_anywhere:
            self._superseded.file(span)
            if not payload.resumable_inside and not span.children:
                self._deserted[span] = None
        offered = payload is not None and not pinned and not span.children
        if offered == span.offered:
            return
        # A policy that raises leaves a span that it was not offered.
        span.offered = False
        # Nearly all: one call less.
        plain = span.retention is None and not isinstance(span.tree, LimitedTree)
        candidates = self.policy if plain else self._candidates
        (candidates.offer if offered else candidates.withdraw)(span)
        span.offered = offered
