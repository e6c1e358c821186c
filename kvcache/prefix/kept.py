"""Spans kept by one prefix cache: their index, trees, media, and events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from sys import getsizeof

from kvcache.snapshots.snapshot import Snapshot

from .events import Events
from .index import SpanIndex
from .known import KnownTokens
from .known_keys import KnownKeys
from .media import MediaIds
from .policies import EvictionPolicy
from .quotas import QuotaOf
from .radix import RadixTree, Tokens
from .reasons import Why
from .retention import RetainedRange
from .spans import Prefix
from .stored import StoredPrefix, StoredSnapshot, StoredSpan, close_snapshots, has_resume_point

_MIN_INDEX_BUDGET = 1 << 26
_HASHES_SHARE, _KEYS_SHARE = 8, 4
"""Parts of the index budget that hashes of blocks, and keys known of a store, take at most."""


class KeptSpans:
    """Spans with snapshots, in trees by salt. Use it under the lock of its prefix cache.

    budget, index_budget: bytes; None for no limit, and for one that goes with the budget: without
    any, evicted spans alone are forgotten. medium: of their events. quota_of: bytes of each salt at
    most, None for no limits.
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        budget: int | None,
        index_budget: int | None,
        namespace: str,
        medium: str,
        quota_of: QuotaOf | None,
    ) -> None:
        if index_budget is None and budget is not None:
            index_budget = max(_MIN_INDEX_BUDGET, budget // 16)
        bound = _MIN_INDEX_BUDGET if index_budget is None else index_budget
        self.events = events = Events(namespace, medium, bound // _HASHES_SHARE)
        trees: dict[str, RadixTree[StoredSpan]] = {}  # by salt; none without a span
        media_ids, keys = MediaIds(), KnownKeys(bound // _KEYS_SHARE)
        self.index: SpanIndex[StoredSnapshot] = SpanIndex(
            policy,
            budget,
            index_budget=index_budget,
            ghost_budget=bound,
            quota_of=quota_of,
            on_evict=events.removed,
            on_empty=lambda tree: trees.pop(tree.salt, None),
            on_join=events.forget,
            others=lambda: getsizeof(trees) + media_ids.nbytes + events.nbytes + keys.nbytes,
        )
        self.trees, self.media_ids, self.known_keys = trees, media_ids, keys
        self.explained: Counter[Why] = Counter()
        """Tokens not reused by reason, of the sessions that were explained."""

    def follow(self, salt: str, ids: Tokens) -> StoredPrefix:
        """Return what is known of `ids`, which begin the tokens of a request."""
        tree = self.trees.get(salt)
        return self.index.follow(tree, ids) if tree is not None else Prefix([], 0)

    def parted(self, known: KnownTokens, held: int, cuts: Sequence[int]) -> StoredPrefix:
        """Split what is known of the first `held` tokens at `cuts`, and return it."""
        prefix = self.follow(known.salt, known.ids[:held])
        splits = [cut for cut in cuts if cut <= prefix.length]
        for cut in splits:
            self.index.extend(self.trees[known.salt], known.ids[:cut])
        return self.follow(known.salt, known.ids[:held]) if splits else prefix

    def file(
        self,
        known: KnownTokens,
        held: int,
        prefix: StoredPrefix,
        snapshots: dict[int, Snapshot],
        now: float,
        cuts: Sequence[int] = (),
    ) -> list[StoredSpan]:
        """Keep `snapshots`, by the start of their spans, for the first `held` tokens.

        prefix: what is known of these. cuts: positions at which new spans part. Takes ownership of
        the snapshots. Return the spans filled.
        """
        filled: list[StoredSpan] = []
        stops = [*(cut for cut in cuts if prefix.length < cut < held), held]
        try:
            spans = self._extended(known, stops, prefix, snapshots, filled)
            new = [span for span in spans if span.start >= prefix.length]
            self.index.use(new, now)  # the others were used when the request began
            _drop_useless(spans, snapshots)
            for span in spans:
                if span.start in snapshots:
                    self.index.fill(span, StoredSnapshot(snapshots.pop(span.start)))
                    self.events.stored(span)
                    filled.append(span)
        finally:  # what a policy that raised has kept from its place
            close_snapshots(snapshots)
        return filled

    def _extended(
        self,
        known: KnownTokens,
        stops: Sequence[int],
        prefix: StoredPrefix,
        snapshots: dict[int, Snapshot],
        filled: list[StoredSpan],
    ) -> list[StoredSpan]:
        """Return the spans up to the last of `stops`; those behind `prefix` end at each of them.

        Those of `prefix` take what they lack from `snapshots`. filled: gets the spans that did.
        """
        replaced: dict[StoredSpan, StoredSnapshot] = {}
        try:
            for span in prefix.spans:
                # Before a span is split, so that both parts get what belongs to them.
                if span.payload is not None and span.start in snapshots:
                    replaced[span] = span.payload
                    self.index.fill(span, StoredSnapshot(snapshots.pop(span.start)))
            tree = self._tree_of(known.salt)
            for stop in stops:
                spans = self.index.extend(tree, known.ids[:stop], known.media)
        except BaseException:
            # A framework cannot split a payload: each span has again what it had.
            for span, previous in list(replaced.items()):
                replaced[span] = span.payload or previous
                self.index.fill(span, previous)
            raise
        else:
            filled += replaced
            return spans
        finally:
            for payload in replaced.values():
                payload.close()

    def _tree_of(self, salt: str) -> RadixTree[StoredSpan]:
        """Return the tree of a salt, a new one if it has none. Raises: what its quota raises."""
        tree = self.trees.get(salt)
        if tree is None:
            self.trees[salt] = tree = self.index.new_tree(salt)
        return tree

    def retain(
        self, known: KnownTokens, held: int, ranges: Iterable[RetainedRange], now: float
    ) -> None:
        """Retain what is kept of the first `held` tokens in `ranges`, which bound spans."""
        spans = self.follow(known.salt, known.ids[:held]).spans
        for start, stop, priority, seconds in ranges:
            inside = [span for span in spans if start <= span.start and span.stop <= stop]
            self.index.retain(inside, priority, seconds, now)

    def drop_branch(self, known: KnownTokens, position: int, now: float) -> None:
        """Evict what is kept of the tokens from `position` on, and shared with nobody."""
        tree = self.trees.get(known.salt)
        if tree is not None:
            self.index.drop_branch(tree, known.ids, position, now)

    def trim(self, nbytes: int, now: float) -> None:
        """Evict until no more than `nbytes` are kept, or all that is left is in use."""
        index = self.index
        budget = index.budget
        try:
            index.budget = nbytes if budget is None else min(nbytes, budget)
            index.trim(now)
        finally:
            index.budget = budget

    def clear(self, now: float) -> None:
        """Evict all spans that are not pinned, and forget those evicted before."""
        kept = list(self.index.kept)
        # Leaf first: only spans without children are offered to the policy, and can be evicted.
        for span in sorted(kept, key=lambda span: -span.stop):
            if not span.pins:
                self.index.evict(span, now)
        self.index.forget_ghosts()
        if kept and not self.index.kept:
            self.events.cleared()


def _drop_useless(spans: Sequence[StoredSpan], snapshots: dict[int, Snapshot]) -> None:
    """Close, and take out, those of `snapshots` for the last of `spans` that nobody could use.

    No request can resume in them, and nothing is kept behind them.
    """
    for span in reversed(spans):
        snapshot = snapshots.get(span.start)
        resumable = snapshot is not None and has_resume_point(snapshot)
        if span.payload is not None or span.children or resumable:
            return
        if snapshot is not None:
            del snapshots[span.start]
            snapshot.close()
