"""Policies that keep spans in the order of a key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from .base import AnySpan, Policy, Queue


class LRU(Policy):
    """Least recently used first."""

    def __init__(self) -> None:
        self._queue = Queue(lambda span: span.used)

    def offer(self, span: AnySpan) -> None:
        self._queue.add(span)

    def withdraw(self, span: AnySpan) -> None:
        """Nothing: it is passed over when its turn comes."""

    def victim(self, now: float) -> AnySpan | None:
        return self._queue.first()


@dataclass
class Place:
    """Where a span is in S3-FIFO. chances: uses since it came, 3 at most; evicted: see `_mass`."""

    turn: int
    main: bool = False
    chances: int = 0
    evicted: int | None = None


class S3FIFO(Policy):
    """Three first-in-first-out queues (S3-FIFO; Yang et al., SOSP 2023): scans pass quickly.

    What is new enters a small queue, a tenth of all that may go. Used twice there, it moves on to
    the main queue, where every use is another round. What left the small queue and is asked for
    again before as much was evicted as the main queue holds enters that at once.
    """

    def __init__(self, small: float = 0.1) -> None:
        self._share = small
        self._turns = count()
        self._queues = tuple(Queue(self._turn_in(main)) for main in (False, True))
        self._sizes: dict[AnySpan, int] = {}
        self._held = [0, 0]  # size of what is offered, in small and main
        self._mass = 0  # size of what the small queue has evicted so far

    def use(self, span: AnySpan, now: float) -> None:
        place = span.policy_data
        if place is None or span.payload is None:
            known = place is not None and place.evicted is not None
            span.policy_data = Place(
                next(self._turns), known and self._mass - place.evicted <= self._held[True]
            )
        else:
            # Not in place: both parts of a span that was split have the same mark.
            span.policy_data = Place(place.turn, place.main, min(3, place.chances + 1))

    def offer(self, span: AnySpan) -> None:
        place = self._place(span)
        self._sizes[span] = span.size
        self._held[place.main] += span.size
        self._queues[place.main].add(span)

    def withdraw(self, span: AnySpan) -> None:
        self._held[span.policy_data.main] -= self._sizes.pop(span)

    def victim(self, now: float) -> AnySpan | None:
        # So many second chances at most: nobody has to wait for a whole queue to pass.
        for _ in range(100):
            span = self._next()
            if span is None or span.policy_data.chances <= (not span.policy_data.main):
                break
            self._again(span)
        return span

    def evict(self, span: AnySpan, now: float) -> None:
        super().evict(span, now)
        if not span.policy_data.main:
            self._mass += span.size
            span.policy_data = Place(span.policy_data.turn, evicted=self._mass)

    def _next(self) -> AnySpan | None:
        small, main = self._queues
        if self._held[False] > self._share * sum(self._held):
            return small.first() or main.first()
        return main.first() or small.first()

    def _again(self, span: AnySpan) -> None:
        """To the end of the main queue, with a chance less if it comes from there."""
        place = span.policy_data
        self.withdraw(span)
        span.policy_data = Place(next(self._turns), True, place.chances - 1 if place.main else 0)
        self.offer(span)

    def _place(self, span: AnySpan) -> Place:
        if span.policy_data is None:
            span.policy_data = Place(next(self._turns))
        place: Place = span.policy_data
        return place

    def _turn_in(self, main: bool) -> Callable[[AnySpan], float | None]:
        return lambda span: span.policy_data.turn if span.policy_data.main == main else None


def recompute_cost(start: int, stop: int) -> float:
    """What it takes to compute tokens [start, stop) again, in passes of a single first token.

    The matrices cost the same for every token, attention in proportion to the tokens before it.
    At position 30,000 both cost the same in a model of 8e9 parameters, 32 layers and 4,096
    channels: 2 x 8e9 operations against 4 x 32 x 4,096 for each token seen.
    """
    return stop - start + (stop * stop - start * start) / 2 / 30_000


class Cost(Policy):
    """What is cheapest to compute again for the room that it takes, and seldom asked for.

    GreedyDual-Size-Frequency (Cherkasova, HP Labs 1998). cost: of computing the tokens from start
    to stop again, in any unit. A span is worth uses x cost / size, on top of what the last one
    evicted was worth when it was used: so what is not used any more goes in the end.
    """

    def __init__(self, cost: Callable[[int, int], float] = recompute_cost) -> None:
        self._cost = cost
        self._queue = Queue(self._worth)
        self._level = 0.0

    def use(self, span: AnySpan, now: float) -> None:
        span.policy_data = self._level

    def offer(self, span: AnySpan) -> None:
        self._queue.add(span)

    def withdraw(self, span: AnySpan) -> None:
        """Nothing: it is passed over when its turn comes."""

    def victim(self, now: float) -> AnySpan | None:
        return self._queue.first()

    def evict(self, span: AnySpan, now: float) -> None:
        self._level = max(self._level, self._worth(span))

    def _worth(self, span: AnySpan) -> float:
        value = span.uses * self._cost(span.start, span.stop) / max(1, span.size)
        return (span.policy_data or 0.0) + value
