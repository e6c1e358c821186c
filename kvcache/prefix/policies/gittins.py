"""The policy that learns when spans come back."""

from __future__ import annotations

import random
from bisect import bisect_right

import numpy as np
import numpy.typing as npt

from .base import AnySpan, Policy

Floats = npt.NDArray[np.float64]

CLASSES = 8
"""Spans asked for once, twice, ... and eight times or more."""
TICK = 8.0
"""Seconds, after each of which the time at risk is counted and the index is computed anew."""
TICKS = 2048
"""Ticks for which a span that does not come back is watched: four and a half hours."""
SAMPLE = 64
_MISSED = 32  # ticks that are made up for after silence; what is beyond teaches nothing
_FADE = 0.5 ** (TICK / 86_400)  # what a tick leaves of what was learnt: half of it after a day

# Ages fall into buckets of an octave: with finer ones less is known about each.
_EDGES = TICK * np.concatenate([[0], 2.0 ** np.arange(np.log2(TICKS))])
_STARTS: list[float] = _EDGES.tolist()
_WIDTH = np.diff(_EDGES, append=TICK * TICKS)
# Nothing known, a span is asked for again once in twenty times its age: the younger, the likelier,
# so that the policy begins as LRU. It weighs as much as one token that has been at risk so long.
_SECONDS = 20 * (_EDGES + _WIDTH / 2)


def _spread() -> Floats:
    """Seconds of a tick that tokens, by the ticks before it that they came in, spent per bucket.

    Half of it at an age of fewer whole ticks than the other half; all of it in the first bucket
    where they came during the tick.
    """
    ages = np.arange(TICKS)
    spread = np.zeros((TICKS, _EDGES.size))
    for cell in (np.maximum(ages - 1, 0), ages):
        spread[ages, np.searchsorted(_EDGES, TICK * cell, "right") - 1] += TICK / 2
    return spread


_SPREAD = _spread()


class Gittins(Policy):
    """Least to be expected of for the time it would have to be kept.

    A span that has been asked for so many times comes back at an age that is learnt: of each class
    (by uses) and bucket of age, tokens that came back are counted, and for how long tokens were at
    risk to. That is their hazard, which is neither constant nor falling: nobody answers within a
    second, most do within minutes, or never. The index of a span is what keeping it for the best
    length of time t from now brings: the probability that it comes back within t, over the time
    that it takes up room until it does or t is over (Gittins, 1979). Evicted spans go on teaching,
    as long as the index remembers them. See docs/policies.md.

    Of a sample of 64 the one with the least index goes (LHD; Beckmann et al., NSDI 2018), so that
    nothing has to be kept in an order that changes all the time. Nothing is known of the future.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a sample, no secret
        self._offered: list[AnySpan] = []
        self._places: dict[AnySpan, int] = {}
        self._returned = np.zeros((CLASSES, _EDGES.size))
        """Tokens."""
        self._risked = np.zeros((CLASSES, _EDGES.size))
        """Tokens x seconds."""
        self._waiting = np.zeros((CLASSES, TICKS))
        """Tokens asked for so many ticks ago, and not since."""
        self._ticks, self._ticked = 0, 0.0
        self._index = gittins_index(self._hazard())

    def use(self, span: AnySpan, now: float) -> None:
        self._tick(now)
        tokens, late = span.stop - span.start, now - self._ticked
        if span.policy_data is not None:
            self._return(span, now - span.used, tokens, late)
        uses = min(span.uses, CLASSES - 1)
        self._waiting[uses, 0] += tokens
        self._risked[uses, 0] -= tokens * late  # the next tick counts all of its time
        span.policy_data = uses, self._ticks

    def offer(self, span: AnySpan) -> None:
        self._places[span] = len(self._offered)
        self._offered.append(span)

    def withdraw(self, span: AnySpan) -> None:
        place, last = self._places.pop(span), self._offered.pop()
        if last is not span:
            self._offered[place] = last
            self._places[last] = place

    def victim(self, now: float) -> AnySpan | None:
        self._tick(now)
        sample = self._offered
        if len(sample) > SAMPLE:
            sample = self._random.choices(sample, k=SAMPLE)
        return min(sample, key=lambda span: self.index(span, now), default=None)

    def index(self, span: AnySpan, now: float) -> tuple[float, float]:
        """What is to be expected of `span`, in returns per second; then, when it was used."""
        uses = span.policy_data[0] if span.policy_data is not None else 0
        return self._index[uses][bisect_right(_STARTS, now - span.used) - 1], span.used

    def _return(self, span: AnySpan, age: float, tokens: int, late: float) -> None:
        uses, since = span.policy_data[0], self._ticks - span.policy_data[1]
        if since < TICKS:
            bucket = bisect_right(_STARTS, age) - 1
            self._returned[uses, bucket] += tokens
            self._risked[uses, bucket] += tokens * late
            self._waiting[uses, since] -= tokens

    def _tick(self, now: float) -> None:
        """Count the time that has passed, and learn from it."""
        missed = int((now - self._ticked) / TICK)
        if not missed:
            return
        for _ in range(min(missed, _MISSED)):
            self._risked = _FADE * self._risked + self._waiting @ _SPREAD
            self._returned *= _FADE
            self._age(1)
        self._age(missed - _MISSED)
        self._ticks += missed
        self._ticked += missed * TICK
        self._index = gittins_index(self._hazard())

    def _age(self, ticks: int) -> None:
        if ticks > 0:
            self._waiting[:, ticks:] = self._waiting[:, :-ticks].copy()
            self._waiting[:, :ticks] = 0

    def _hazard(self) -> Floats:
        """Returns per second at risk, by class and bucket; of an unknown class as of the last."""
        known, hazard = 1 / _SECONDS, np.empty_like(self._risked)
        for uses in range(CLASSES):
            returned = self._returned[uses] + known * _SECONDS
            hazard[uses] = known = returned / (self._risked[uses] + _SECONDS)
        return hazard


def gittins_index(hazard: Floats, width: Floats = _WIDTH) -> list[list[float]]:
    """What keeping brings per second, at best, from the start of each bucket of age.

    hazard: returns per second, [classes, buckets]. width: seconds of each bucket.
    """
    back = -np.expm1(-hazard * width)  # probability to come back within the bucket
    index = np.empty_like(hazard)
    for bucket in range(width.size):
        left = np.cumprod(1 - back[:, bucket:], 1)
        here = np.concatenate([np.ones((len(left), 1)), left[:, :-1]], 1)
        seconds = here * back[:, bucket:] / hazard[:, bucket:]
        index[:, bucket] = ((1 - left) / np.cumsum(seconds, 1)).max(1)
    return index.tolist()  # type: ignore[no-any-return]
