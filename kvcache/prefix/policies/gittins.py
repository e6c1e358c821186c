"""Gittins: a policy learning the times at which spans are requested again."""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass
from sys import getsizeof
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvcache._checks import as_index

from .base import EvictionPolicy, PolicySpan

Floats: TypeAlias = npt.NDArray[np.float64]

CLASSES = 8
"""Spans requested once, twice, ... and eight times or more."""
TICK = 8.0
"""Seconds after which the time at risk is counted and the index is computed anew."""
TICKS = 2048
"""Ticks for which a span is watched after its last request: four and a half hours."""
SAMPLE = 64
"""Candidates compared for one eviction at most."""
_INDEX_NBYTES = getsizeof(1 << 20)
_MISSED = 32  # ticks made up for after silence; older ones teach nothing
_FADE = 0.5 ** (TICK / 86_400)  # share of the past left after a tick: half of it after a day

# Ages fall into buckets of an octave: with finer ones less is known about each.
_EDGES = TICK * np.concatenate([[0], 2.0 ** np.arange(np.log2(TICKS))])
_BOUNDS: list[float] = _EDGES[1:].tolist()  # between two buckets
_WIDTH = np.diff(_EDGES, append=TICK * TICKS)
# The prior: a span is requested again once in twenty times its age. The younger, the likelier, so
# that the policy begins as LRU. It weighs as much as one token at risk for so long.
_SECONDS = 20 * (_EDGES + _WIDTH / 2)


def _spread() -> Floats:
    """Return the seconds one tick adds per bucket of age, [ticks since the request, buckets].

    Half of a tick is spent at an age of fewer whole ticks than the other half; all of it in the
    first bucket for a request during the tick.
    """
    ages = np.arange(TICKS)
    spread = np.zeros((TICKS, _EDGES.size))
    # Requests are spread over their tick: on average, a token's age passes a whole tick midway.
    for age in (np.maximum(ages - 1, 0), ages):
        spread[ages, np.searchsorted(_EDGES, TICK * age, "right") - 1] += TICK / 2
    return spread


_SPREAD = _spread()


@dataclass(slots=True)  # not frozen, which would make every new one cost thrice as much
class LastUse:
    """Class and tick of the last request for a span, kept in its `policy_data`.

    Replaced and never changed, because both parts of a span that was split have the same one.
    """

    uses: int
    tick: int


class Gittins(EvictionPolicy):
    """Least expected return for the time it would be kept first.

    Hazards are learnt: for each class (by uses) and bucket of age, tokens requested again are
    counted, and the time that tokens were at risk of it. The hazard is neither constant nor
    falling: nobody answers within a second, most do within minutes, or never. The index of a span
    is the return of keeping it for the best length of time t from now: the probability of a
    request within t, over the time it takes up room until that request or t (Gittins, 1979).
    Evicted spans go on teaching while the index remembers them. See docs/policies.md.

    Of a sample of 64 the span with the least index goes (LHD; Beckmann et al., NSDI 2018), so no
    order has to be kept, which would change all the time. Nothing is known of the future.
    """

    data_nbytes = getsizeof(LastUse(0, 0)) + getsizeof(1 << 20)

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(as_index(seed, "seed"))  # noqa: S311 - a sample, no secret
        self._offered: list[PolicySpan] = []
        self._offered_at: dict[PolicySpan, int] = {}  # index in the list, to withdraw in O(1)
        self._returned = np.zeros((CLASSES, _EDGES.size))
        """Tokens requested again."""
        self._risked = np.zeros((CLASSES, _EDGES.size))
        """Tokens x seconds at risk of it."""
        self._waiting = np.zeros((CLASSES, TICKS))
        """Tokens by ticks since their last request."""
        self._ticks, self._ticked = 0, 0.0
        self._index = gittins_index(self._hazard())

    @property
    def nbytes(self) -> int:
        # The numbers of observations are a few, whatever the number of spans.
        return (
            getsizeof(self._offered)
            + getsizeof(self._offered_at)
            + _INDEX_NBYTES * len(self._offered)
        )

    def use(self, span: PolicySpan, now: float) -> None:
        self._tick(now)
        tokens, late = span.stop - span.start, now - self._ticked
        last = span.policy_data
        if isinstance(last, LastUse):
            self._count_return(last, now - span.used, tokens, late)
        uses = min(span.uses, CLASSES - 1)
        self._waiting[uses, 0] += tokens
        # The next tick counts as if the tokens had come at the last one.
        self._risked[uses, 0] -= tokens * late
        span.policy_data = LastUse(uses, self._ticks)

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
        uses = last.uses if isinstance(last, LastUse) else 0
        used = span.used
        return self._index[uses][bisect_right(_BOUNDS, now - used)], used

    def _count_return(self, last: LastUse, age: float, tokens: int, late: float) -> None:
        """Count a request for tokens last requested `age` seconds ago, `late` after a tick."""
        ticks = self._ticks - last.tick
        if ticks < TICKS:  # else no longer watched
            bucket = bisect_right(_BOUNDS, age)
            self._returned[last.uses, bucket] += tokens
            self._risked[last.uses, bucket] += tokens * late
            self._waiting[last.uses, ticks] -= tokens

    def _tick(self, now: float) -> None:
        """Count the whole ticks since the last call as time at risk, and compute the index."""
        missed = int((now - self._ticked) / TICK)
        if not missed:
            return
        # After a long silence, tick by tick would take too long: the rest is skipped below.
        for _ in range(min(missed, _MISSED)):
            self._risked = _FADE * self._risked + self._waiting @ _SPREAD
            self._returned *= _FADE
            self._age(1)
        self._age(missed - _MISSED)
        self._ticks += missed
        self._ticked += missed * TICK
        self._index = gittins_index(self._hazard())

    def _age(self, ticks: int) -> None:
        """Make all waiting tokens older by `ticks`; the oldest are no longer watched."""
        if ticks > 0:
            self._waiting[:, ticks:] = self._waiting[:, :-ticks].copy()
            self._waiting[:, :ticks] = 0

    def _hazard(self) -> Floats:
        """Return requests per second at risk, [classes, buckets].

        The prior of a class is the hazard of the one before it.
        """
        prior, hazard = 1 / _SECONDS, np.empty_like(self._risked)
        for uses in range(CLASSES):
            # As if one token had been at risk for `_SECONDS`, at the hazard of the prior.
            returned = self._returned[uses] + prior * _SECONDS
            hazard[uses] = prior = returned / (self._risked[uses] + _SECONDS)
        return hazard


def gittins_index(hazard: Floats, width: Floats = _WIDTH) -> list[list[float]]:
    """Return the Gittins index at the start of each bucket of age, [classes, buckets].

    hazard: requests per second, [classes, buckets]; the index is in requests per second, too.
    width: seconds of each bucket.
    """
    requested = -np.expm1(-hazard * width)  # probability of a request within the bucket
    index = np.empty_like(hazard)
    for bucket in range(width.size):
        unrequested = np.cumprod(1 - requested[:, bucket:], 1)  # until the end of each bucket
        reached = np.concatenate([np.ones((len(unrequested), 1)), unrequested[:, :-1]], 1)
        seconds = reached * requested[:, bucket:] / hazard[:, bucket:]
        index[:, bucket] = ((1 - unrequested) / np.cumsum(seconds, 1)).max(1)
    rows: list[list[float]] = index.tolist()
    return rows
