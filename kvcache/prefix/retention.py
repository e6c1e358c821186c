"""Retention of spans: a priority over all others that decays, and how sessions ask for it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from sys import getsizeof
from typing import NamedTuple, TypeAlias, cast

from kvcache._checks import NO_LIMIT, as_index

from .arguments import as_finite

Retain: TypeAlias = tuple[int, float] | Mapping[tuple[int, int | None], tuple[int, float]]
"""Priority and seconds, of all tokens of a session or by positions ``[start, stop)``; a stop of
None is the end."""
MAX_PRIORITY = 100


@dataclass(frozen=True, slots=True)
class Retention:
    """A priority that falls from `priority` to 0, by one at a time, within `seconds` from `since`.

    seconds: positive; ``math.inf`` for a pin, whose priority stays. since: 0 for a pin, so that two
    of equal priority are equal.
    """

    priority: int
    seconds: float
    since: float = 0.0

    @property
    def expires(self) -> float:
        """Time at which the priority is 0."""
        return self.since + self.seconds

    def level(self, now: float) -> int:
        """Return the effective priority: the whole one times the share of time left, rounded up."""
        if math.isinf(self.expires):
            return self.priority
        share = min(1.0, max(0.0, (self.expires - now) / self.seconds))
        level = math.ceil(self.priority * share)
        # Rounding: what :meth:`until` says counts, or a level might never end.
        while level and now >= self.until(level):
            level -= 1
        while level < self.priority and now < self.until(level + 1):
            level += 1
        return level

    def until(self, level: int) -> float:
        """Return the time at which the effective priority falls below `level`."""
        return self.since + self.seconds * ((self.priority - level + 1) / self.priority)

    def outranks(self, other: Retention | None, now: float) -> bool:
        """Return whether it protects more than `other`: by its level, or for longer at the same."""
        own = self.level(now), self.expires
        theirs = (0, math.inf) if other is None else (other.level(now), other.expires)
        return own > theirs


NBYTES = getsizeof(Retention(1, 1.0)) + 2 * getsizeof(0.5)
"""Bytes of memory of a retention."""


class RetainedRange(NamedTuple):
    """Tokens ``[start, stop)`` of a session to be retained when it stores them."""

    start: int
    stop: int
    priority: int
    seconds: float


def cuts_of(ranges: Sequence[RetainedRange], held: int) -> list[int]:
    """Return the positions in ``(0, held]`` at which spans part for `ranges`, in order."""
    bounds = {min(bound, held) for span in ranges for bound in (span.start, span.stop)}
    return sorted(bounds - {0})


_RULE = (
    "retain is a pair (priority, seconds), or a mapping of positions (start, stop) to such pairs"
)


def as_retained(retain: Retain | None) -> tuple[RetainedRange, ...]:
    """Return the ranges to retain, in order; none for None.

    Raises: TypeError for anything but a pair or a mapping of ranges to pairs; ValueError for a
        priority outside of 1 to 100, no positive time, or ranges that are empty or overlap.
    """
    if retain is None:
        return ()
    if not isinstance(retain, Mapping):
        return (RetainedRange(0, NO_LIMIT, *_as_pair(retain)),)
    ranges = sorted(
        RetainedRange(*_as_range(place), *_as_pair(pair)) for place, pair in retain.items()
    )
    for before, after in pairwise(ranges):
        if after.start < before.stop:
            raise ValueError(
                "ranges to retain share no position; got "
                f"{reprlib.repr(list(retain))}. Give each token one priority."
            )
    return tuple(ranges)


def _as_range(place: tuple[int, int | None]) -> tuple[int, int]:
    try:
        start, stop = place
    except (TypeError, ValueError) as error:
        raise TypeError(f"{_RULE}; got {reprlib.repr(place)} for positions.") from error
    first = as_index(start, "the start of a range to retain")
    end = NO_LIMIT if stop is None else as_index(stop, "the stop of a range to retain")
    if not 0 <= first < end:
        raise ValueError(
            f"a range to retain is [start, stop) with 0 <= start < stop; got {reprlib.repr(place)}."
        )
    return first, end


def _as_pair(pair: object) -> tuple[int, float]:
    if not isinstance(pair, Sequence) or isinstance(pair, str | bytes) or len(pair) != 2:
        raise TypeError(f"{_RULE}; got {reprlib.repr(pair)}.")
    priority, seconds = as_index(pair[0], "a priority"), _as_seconds(pair[1])
    if not 1 <= priority <= MAX_PRIORITY:
        raise ValueError(
            f"a priority is 1 to {MAX_PRIORITY}; got {priority}. Leave out what need not stay."
        )
    return priority, seconds


def _as_seconds(value: object) -> float:
    rule = "what is retained has positive seconds, or math.inf"
    endless = isinstance(value, float) and value == math.inf
    seconds = math.inf if endless else as_finite(cast("float", value), rule)
    if seconds <= 0:
        raise ValueError(f"{rule}; got {seconds}.")
    return seconds
