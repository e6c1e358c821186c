"""Hazards of classes of spans, learnt from the times at which tokens are requested again."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .classes import CLASSES, SHAPE, USES

Floats: TypeAlias = npt.NDArray[np.float64]

TICK = 8.0
"""Seconds after which the time at risk is counted and the index is computed anew."""
TICKS = 2048
"""Ticks for which a span is watched after its last request: four and a half hours."""
WEIGHT = 20
"""Blocks requested again that the hazard of the coarser class counts as, per bucket of age."""
_MISSED = 32  # ticks made up for after silence; older ones teach nothing
FADE = 0.5 ** (TICK / 86_400)
"""Share of the past left after a tick: half of it after a day."""

# Ages fall into buckets of an octave: with finer ones less is known about each.
EDGES = TICK * np.concatenate([[0], 2.0 ** np.arange(np.log2(TICKS))])
BOUNDS: list[float] = EDGES[1:].tolist()  # between two buckets
_TICK_BOUNDS = [int(bound / TICK) for bound in BOUNDS]
WIDTH = np.diff(EDGES, append=TICK * TICKS)
# The prior: a span is requested again once in twenty times its age. The younger, the likelier, so
# that the policy begins as LRU. It weighs as much as one token at risk for so long.
_SECONDS = 20 * (EDGES + WIDTH / 2)


def bucket_of(age: float) -> int:
    """Return the bucket of an age in seconds."""
    return bisect_right(BOUNDS, age)


class Returns:
    """Tokens requested again and the seconds that tokens were at risk of it, by class and age.

    Tokens wait from one request to the next, in a class that can change once in between. Those
    whose last requests came in the same tick are one cohort. It takes 7 MB, whatever it observes.
    fade: share of the past left after a tick.
    """

    def __init__(self, fade: float = FADE) -> None:
        self._fade = fade
        self.ticks = 0
        """Whole ticks so far."""
        self.ticked = 0.0
        """Time of the last one."""
        self.returned = np.zeros((CLASSES, EDGES.size))
        """Tokens requested again."""
        self.risked = np.zeros((CLASSES, EDGES.size))
        """Tokens x seconds at risk of it."""
        self.waiting = np.zeros((TICKS, CLASSES), np.int32)
        """Tokens that wait, by the tick of their last request modulo TICKS, and class."""
        # Sums of them by class and bucket: of their age at the last tick, and at the one before.
        self._ages = np.zeros((CLASSES, EDGES.size))
        self._earlier = np.zeros((CLASSES, EDGES.size))

    def enter(self, kind: int, tick: int, age: float, tokens: int, late: float) -> None:
        """Let tokens wait, last requested in `tick`, `age` seconds ago; `late` after a tick."""
        self._wait(kind, tick, tokens)
        # The next tick counts as if the tokens had come at the last one.
        self.risked[kind, bucket_of(age)] -= tokens * late

    def leave(self, kind: int, tick: int, age: float, tokens: int, late: float) -> bool:
        """Undo :meth:`enter`, later; the time in between stays. False if no longer watched."""
        if not self.watches(tick):
            return False
        self._wait(kind, tick, -tokens)
        self.risked[kind, bucket_of(age)] += tokens * late
        return True

    def watches(self, tick: int) -> bool:
        """Return True if tokens last requested in `tick` still wait."""
        return self.ticks - tick < TICKS

    def advance(self, now: float) -> bool:
        """Count the whole ticks since the last call as time at risk; False if there are none."""
        missed = int((now - self.ticked) / TICK)
        if not missed:
            return False
        # After a long silence, tick by tick would take too long: the rest is skipped.
        for _ in range(min(missed, _MISSED)):
            self.risked *= self._fade
            self.risked += (self._earlier + self._ages) * (TICK / 2)
            self.returned *= self._fade
            self._step()
        if missed > _MISSED:
            self._skip(missed - _MISSED)
        self.ticked += missed * TICK
        return True

    def _wait(self, kind: int, tick: int, tokens: int) -> None:
        """Add tokens to those that wait, or take them out."""
        self.waiting[tick % TICKS, kind] += tokens
        age = self.ticks - tick
        self._ages[kind, bisect_right(_TICK_BOUNDS, age)] += tokens
        # Requests are spread over their tick: on average, a token's age passes a whole tick midway.
        self._earlier[kind, bisect_right(_TICK_BOUNDS, max(age - 1, 0))] += tokens

    def _step(self) -> None:
        """Make all waiting tokens older by a tick; the oldest are no longer watched."""
        np.copyto(self._earlier, self._ages)
        self.ticks += 1
        for bucket, bound in enumerate(_TICK_BOUNDS):
            cohort = self.waiting[(self.ticks - bound) % TICKS]
            self._ages[:, bucket] -= cohort
            self._ages[:, bucket + 1] += cohort
        oldest = self.waiting[self.ticks % TICKS]
        self._ages[:, -1] -= oldest
        self._earlier[:, -1] -= oldest
        oldest[:] = 0

    def _skip(self, ticks: int) -> None:
        """Make all waiting tokens older by `ticks`, and sum them anew."""
        gone = self.ticks + 1 + np.arange(min(ticks, TICKS))
        self.waiting[gone % TICKS] = 0
        self.ticks += ticks
        ages = np.arange(TICKS)
        by_age = self.waiting[(self.ticks - ages) % TICKS] if ticks < TICKS else None
        for sums, wholes in ((self._ages, ages), (self._earlier, np.maximum(ages - 1, 0))):
            sums[:] = 0
            if by_age is not None:
                starts = np.searchsorted(wholes, [0, *_TICK_BOUNDS])
                sums[:] = np.add.reduceat(by_age, starts, 0, dtype=np.float64).T

    def hazard(self, weight: float) -> Floats:
        """Return requests per second at risk, [classes, buckets].

        weight: tokens requested again that the hazard of the coarser class counts as. The coarsest
        classes, by uses, take that of one use less for one token at risk for twenty times its age.
        """
        returned, risked = _by_level(self.returned), _by_level(self.risked)
        coarsest = hazard = _by_uses(returned[0], risked[0])
        for more, seconds in zip(returned[1:], risked[1:], strict=True):
            prior = hazard[..., None, :]
            hazard = (more + weight) / (seconds + weight / prior)
        return np.concatenate([coarsest, hazard.reshape(-1, EDGES.size)])


def _by_level(counts: Floats) -> list[Floats]:
    """Return sums by uses; by uses and distance; ...; the counts of the finest classes."""
    levels = [counts[USES:].reshape(*SHAPE, EDGES.size)]
    for _ in SHAPE[1:]:
        levels.append(levels[-1].sum(-2))
    levels[-1] = levels[-1] + counts[:USES]
    return levels[::-1]


def _by_uses(returned: Floats, risked: Floats) -> Floats:
    prior, hazard = 1 / _SECONDS, np.empty_like(risked)
    for uses in range(USES):
        # As if one token had been at risk for `_SECONDS`, at the hazard of the prior.
        more = returned[uses] + prior * _SECONDS
        hazard[uses] = prior = more / (risked[uses] + _SECONDS)
    return hazard


class IndexRows(dict[int, list[float]]):
    """The Gittins index by class, at the start of each bucket of age; computed when asked for.

    hazard: requests per second, [classes, buckets]. kinds: classes computed at once, which is much
    faster than one by one.
    """

    def __init__(self, hazard: Floats, kinds: Iterable[int]) -> None:
        chosen = list(kinds)
        super().__init__(zip(chosen, gittins_index(hazard[chosen]), strict=True))
        self._hazard = hazard

    def __missing__(self, kind: int) -> list[float]:
        [row] = gittins_index(self._hazard[kind : kind + 1])
        self[kind] = row
        return row


def gittins_index(hazard: Floats, width: Floats = WIDTH) -> list[list[float]]:
    """Return the Gittins index at the start of each bucket of age, [classes, buckets].

    hazard: requests per second, [classes, buckets]; the index is in requests per second, too.
    width: seconds of each bucket.
    """
    rates = np.ascontiguousarray(hazard.T)  # a row per bucket, all of which are in one loop
    requested = -np.expm1(-rates * width[:, None])  # probability of a request within the bucket
    unrequested, seconds = 1 - requested, requested / rates
    # For each bucket to stop behind: probability of a request until then, and seconds waited.
    probability, waited = np.zeros_like(rates), np.zeros_like(rates)
    index = np.empty_like(rates)
    for bucket in range(width.size - 1, -1, -1):
        for sums, first in ((probability, requested), (waited, seconds)):
            sums[bucket:] *= unrequested[bucket]
            sums[bucket:] += first[bucket]
        index[bucket] = (probability[bucket:] / waited[bucket:]).max(0)
    rows: list[list[float]] = index.T.tolist()
    return rows
