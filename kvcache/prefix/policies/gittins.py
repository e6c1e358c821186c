"""Gittins: a policy learning the times at which spans are requested again."""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass
from sys import getsizeof

from kvcache._checks import as_index

from .base import EndedRequest, EvictionPolicy, PolicySpan
from .classes import BLOCK, NEW, USES, class_of, pause_of
from .returns import BOUNDS, WEIGHT, Floats, IndexRows, Returns, bucket_of

SAMPLE = 64
"""Candidates compared for one eviction at most."""
_INDEX_NBYTES = getsizeof(1 << 20)


@dataclass(slots=True)  # not frozen, which would make every new one cost thrice as much
class LastUse:
    """Last request for a span, kept in its `policy_data`.

    uses: earlier requests, 7 at most. pause: class of the seconds between it and the one before.
    kind: class by all that is known of it. tick: in which it came.

    Replaced and never changed, because both parts of a span that was split have the same one.
    """

    uses: int
    pause: int
    kind: int
    tick: int


class Gittins(EvictionPolicy):
    """Least expected return for the time it would be kept first.

    Hazards are learnt: for each class and bucket of age, tokens requested again are counted, and
    the time that tokens were at risk of it. The hazard is neither constant nor falling: nobody
    answers within a second, most do within minutes, or never. The index of a span is the return of
    keeping it for the best length of time t from now: the probability of a request within t, over
    the time it takes up room until that request or t (Gittins, 1979). Evicted spans go on teaching
    while the index remembers them. See docs/policies.md.

    The class of a span is its number of uses. When its last request has ended, three more facts
    refine it: how far from its start that request went on, how long the span before it had not been
    asked for, and how long the answer was. A finer class begins with the hazard of the coarser one.

    Of a sample of 64 the span with the least index goes (LHD; Beckmann et al., NSDI 2018), so no
    order has to be kept, which would change all the time. Nothing is known of the future.
    """

    data_nbytes = getsizeof(LastUse(0, 0, 0, 0)) + 2 * getsizeof(1 << 20)

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(as_index(seed, "seed"))  # noqa: S311 - a sample, no secret
        self._offered: list[PolicySpan] = []
        self._offered_at: dict[PolicySpan, int] = {}  # index in the list, to withdraw in O(1)
        self._returns = Returns()
        self._index = IndexRows(self.hazard(), range(USES))

    @property
    def nbytes(self) -> int:
        # Observations take the same, whatever the number of spans.
        return (
            getsizeof(self._offered)
            + getsizeof(self._offered_at)
            + _INDEX_NBYTES * len(self._offered)
        )

    def use(self, span: PolicySpan, now: float) -> None:
        self._tick(now)
        returns, tokens = self._returns, span.stop - span.start
        late, last, pause = now - returns.ticked, span.policy_data, NEW
        if isinstance(last, LastUse):
            age = now - span.used
            pause = pause_of(age)
            if returns.leave(last.kind, last.tick, age, tokens, late):
                returns.returned[last.kind, bucket_of(age)] += tokens
        uses = min(span.uses, USES - 1)
        returns.enter(uses, returns.ticks, 0.0, tokens, late)
        span.policy_data = LastUse(uses, pause, uses, returns.ticks)

    def ended(self, request: EndedRequest, now: float) -> None:
        self._tick(now)
        pause = NEW
        for span in request.spans:
            last = span.policy_data
            if not isinstance(last, LastUse):
                continue
            if span.used in request.asked:
                distance = (request.stop - span.start) * self.position_tokens
                kind = class_of(last.uses, distance, pause, request.answered)
                self._refine(span, last, kind, now)
            pause = last.pause

    def _refine(self, span: PolicySpan, last: LastUse, kind: int, now: float) -> None:
        """Let the tokens of `span` wait in another class from now on."""
        returns, tokens, age = self._returns, span.stop - span.start, now - span.used
        late = now - returns.ticked
        if returns.leave(last.kind, last.tick, age, tokens, late):
            returns.enter(kind, last.tick, age, tokens, late)
        span.policy_data = LastUse(last.uses, last.pause, kind, last.tick)

    def offer(self, span: PolicySpan) -> None:
        self._offered_at[span] = len(self._offered)
        self._offered.append(span)

    def withdraw(self, span: PolicySpan) -> None:
        # The last one takes the free place: removing from the middle would be O(n).
        at, last = self._offered_at.pop(span), self._offered.pop()
        if last is not span:
            self._offered[at] = last
            self._offered_at[last] = at

    def victim(self, now: float) -> PolicySpan | None:
        self._tick(now)
        sample = self._offered
        if len(sample) > SAMPLE:
            sample = self._random.choices(sample, k=SAMPLE)
        return min(sample, key=lambda span: self.index(span, now), default=None)

    def alike(self, upper: PolicySpan, lower: PolicySpan) -> bool:
        return upper.policy_data == lower.policy_data

    def index(self, span: PolicySpan, now: float) -> tuple[float, float]:
        """Return the index of `span`, in requests per second; then its last use, among equals."""
        last = span.policy_data
        kind = last.kind if isinstance(last, LastUse) else 0
        used = span.used
        # Not by `bucket_of`: this is called for every candidate compared.
        return self._index[kind][bisect_right(BOUNDS, now - used)], used

    def hazard(self) -> Floats:
        """Return requests per second as learnt so far, [classes, buckets of age]."""
        return self._returns.hazard(WEIGHT * BLOCK / self.position_tokens)

    def _tick(self, now: float) -> None:
        """Count whole ticks since the last call, and compute the index anew if there are any."""
        if self._returns.advance(now):
            # Of the classes that candidates were of: most of all classes have no span.
            self._index = IndexRows(self.hazard(), self._index)
