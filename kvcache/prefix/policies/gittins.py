"""Gittins: a policy learning the times at which spans are requested again."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from sys import getsizeof, maxsize

from kvcache._checks import as_index

from .base import EndedRequest, EvictionPolicy, PolicySpan
from .classes import BLOCK, NEW, USES, class_of, last_block_of, pause_of
from .returns import BOUNDS, WEIGHT, Floats, IndexRows, Returns, bucket_of

SAMPLE = 64
"""Candidates compared for one eviction at most."""
_INDEX_NBYTES = getsizeof(1 << 20)
_NOWHERE = maxsize
"""Position of a last block that is not told apart."""


@dataclass(slots=True)  # not frozen, which would make every new one cost thrice as much
class LastUse:
    """Last request for a span, kept in its `policy_data`.

    uses: earlier requests, 7 at most. pause: class of the seconds between it and the one before.
    kind: class by all that is known of it. tick: in which it came. last_block: position where the
    last block of the request begins. last_kind: class from there on.

    Replaced and never changed, because both parts of a span that was split have the same one.
    """

    uses: int
    pause: int
    kind: int
    tick: int
    last_block: int = _NOWHERE
    last_kind: int = 0

    def parts(self, span: PolicySpan) -> Iterator[tuple[int, int]]:
        """Yield classes of `span`, and how many of its tokens are in each."""
        start, stop = span.start, span.stop
        parted = min(max(start, self.last_block), stop)
        if start < parted:
            yield self.kind, parted - start
        if parted < stop:
            yield self.last_kind, stop - parted


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
    The last block of a request is in a class of its own and can go alone: prompts part there.

    Of a sample of 64 the span with the least index goes (LHD; Beckmann et al., NSDI 2018), so no
    order has to be kept, which would change all the time. Nothing is known of the future.
    """

    data_nbytes = getsizeof(LastUse(0, 0, 0, 0)) + 4 * getsizeof(1 << 20)

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
        returns, last, pause = self._returns, span.policy_data, NEW
        late = now - returns.ticked
        if isinstance(last, LastUse):
            age = now - span.used
            pause, bucket = pause_of(age), bucket_of(age)
            for kind, tokens in last.parts(span):
                if returns.leave(kind, last.tick, age, tokens, late):
                    returns.returned[kind, bucket] += tokens
        uses = min(span.uses, USES - 1)
        returns.enter(uses, returns.ticks, 0.0, span.stop - span.start, late)
        span.policy_data = LastUse(uses, pause, uses, returns.ticks)

    def ended(self, request: EndedRequest, now: float) -> None:
        self._tick(now)
        pause, last_block = NEW, request.stop - max(1, BLOCK // self.position_tokens)
        for span in request.spans:
            last = span.policy_data
            if not isinstance(last, LastUse):
                continue
            if span.used in request.asked:
                distance = (request.stop - span.start) * self.position_tokens
                kind = class_of(last.uses, distance, pause, request.answered)
                # What goes as a whole is judged as a whole; of a ghost nobody knows.
                apart = span.payload is None or span.complete
                bound, last_kind = (last_block, last_block_of(kind)) if apart else (_NOWHERE, 0)
                refined = LastUse(last.uses, last.pause, kind, last.tick, bound, last_kind)
                self._refine(span, last, refined, now)
            pause = last.pause

    def _refine(self, span: PolicySpan, last: LastUse, refined: LastUse, now: float) -> None:
        """Let the tokens of `span` wait in the classes of `refined` from now on."""
        self._forget(span, last, now)
        self._watch(span, refined, now - span.used, now)
        span.policy_data = refined

    def join(self, upper: PolicySpan, lower: PolicySpan, now: float) -> None:
        last, behind = upper.policy_data, lower.policy_data
        if last == behind:
            return
        self._tick(now)
        if isinstance(last, LastUse):
            self._forget(upper, last, now)
        if isinstance(behind, LastUse):
            self._watch(upper, behind, now - lower.used, now)

    def _watch(self, span: PolicySpan, last: LastUse, age: float, now: float) -> None:
        """Let the tokens of `span` wait as `last` says, last requested `age` seconds ago."""
        returns = self._returns
        if returns.watches(last.tick):
            for kind, tokens in last.parts(span):
                returns.enter(kind, last.tick, age, tokens, now - returns.ticked)

    def _forget(self, span: PolicySpan, last: LastUse, now: float) -> None:
        """Let the tokens of `span`, which wait as `last` says, wait no more."""
        returns = self._returns
        for kind, tokens in last.parts(span):
            returns.leave(kind, last.tick, now - span.used, tokens, now - returns.ticked)

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
        rows, least, oldest = self._index, inf, inf
        chosen: PolicySpan | None = None
        # Neither `min` with a key nor `bucket_of`: calls would be half of what an eviction costs.
        for span in sample:
            last, used, kind = span.policy_data, span.used, 0
            if isinstance(last, LastUse):
                kind = last.kind if span.stop <= last.last_block else last.last_kind
            index = rows[kind][bisect_right(BOUNDS, now - used)]
            if index < least or (index == least and used < oldest):
                chosen, least, oldest = span, index, used
        return chosen

    def tail(self, span: PolicySpan) -> int:
        last, tokens = span.policy_data, span.stop - span.start
        if not isinstance(last, LastUse) or span.stop <= last.last_block:
            return tokens
        return min(tokens, span.stop - last.last_block)

    def alike(self, upper: PolicySpan, lower: PolicySpan) -> bool:
        return upper.policy_data == lower.policy_data

    def hazard(self) -> Floats:
        """Return requests per second as learnt so far, [classes, buckets of age]."""
        return self._returns.hazard(WEIGHT * BLOCK / self.position_tokens)

    def _tick(self, now: float) -> None:
        """Count whole ticks since the last call, and compute the index anew if there are any."""
        if self._returns.advance(now):
            # Of the classes that candidates were of: most of all classes have no span.
            self._index = IndexRows(self.hazard(), self._index)
