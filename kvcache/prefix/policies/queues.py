"""Policies with an order by key: LRU, S3-FIFO and GreedyDual-Size-Frequency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from operator import attrgetter
from sys import getsizeof

from kvcache.prefix.arguments import as_finite

from .base import EvictionPolicy, PolicySpan, Queue

_MAX_CHANCES = 3  # as in the paper, whose counters have two bits
_MAX_ROUNDS = 100


class LRU(EvictionPolicy):
    """Least recently used first."""

    def __init__(self) -> None:
        self._queue: Queue[PolicySpan, float] = Queue(attrgetter("used"))

    @property
    def nbytes(self) -> int:
        return self._queue.nbytes

    def offer(self, span: PolicySpan) -> None:
        self._queue.add(span)

    def withdraw(self, span: PolicySpan) -> None:
        self._queue.withdraw(span)

    def victim(self, now: float) -> PolicySpan | None:
        return self._queue.first()

    def evict(self, span: PolicySpan, now: float) -> None:
        self._queue.withdraw(span)

    def alike(self, upper: PolicySpan, lower: PolicySpan) -> bool:
        return True  # the time of their last use is all that counts


@dataclass(slots=True)  # not frozen, which would make every new one cost thrice as much
class QueueSlot:
    """Slot of a span in the queues of S3-FIFO, kept in its `policy_data`.

    Replaced and never changed, because both parts of a span that was split have the same one.
    """

    turn: int
    """Order within its queue."""
    main: bool = False
    """True in the main queue, False in the small one."""
    chances: int = 0
    """Uses since it entered its queue, 3 at most, less the rounds they paid for."""
    evicted_at: int | None = None
    """Bytes the small queue had evicted in total with this span, None if it did not evict it."""

    @property
    def evictable(self) -> bool:
        """True if its span goes when its turn comes.

        In the small queue one further use does not save it: it takes two to get to the main one.
        """
        return self.chances <= (0 if self.main else 1)


class Fifo:
    """One queue of S3-FIFO. nbytes: of all spans offered in it."""

    def __init__(self, main: bool) -> None:
        self.nbytes = 0
        self.queue: Queue[PolicySpan, float] = Queue(_turn_in(main))


def _turn_in(main: bool) -> Callable[[PolicySpan], int | None]:
    """Return the key of a queue: the turn of a span, None if it is in the other queue."""

    def turn(span: PolicySpan) -> int | None:
        slot = span.policy_data
        return slot.turn if isinstance(slot, QueueSlot) and slot.main == main else None

    return turn


class S3FIFO(EvictionPolicy):
    """Three first-in-first-out queues (S3-FIFO; Yang et al., SOSP 2023): scans pass quickly.

    New spans enter a small queue, a tenth of all candidates. Used twice there, a span moves on to
    the main queue, where every use is another round. A span evicted by the small queue and used
    again before as many bytes were evicted as the main queue holds enters the main queue at once.

    small: share of the small queue, 0 to 1.

    Raises: TypeError, ValueError for no such share.
    """

    data_nbytes = getsizeof(QueueSlot(0)) + 2 * getsizeof(1 << 20)

    def __init__(self, small: float = 0.1) -> None:
        self._share = as_finite(small, "small is a share of all candidates, 0 to 1")
        if not 0 <= self._share <= 1:
            raise ValueError(f"small is a share of all candidates, 0 to 1; got {small}.")
        self._turns = count()
        self._small, self._main = Fifo(main=False), Fifo(main=True)
        # As of the offer: a span that is split while it is offered has fewer bytes when it goes.
        self._sizes: dict[PolicySpan, int] = {}
        self._evicted = 0  # bytes by the small queue so far

    @property
    def nbytes(self) -> int:
        return self._small.queue.nbytes + self._main.queue.nbytes + getsizeof(self._sizes)

    def use(self, span: PolicySpan, now: float) -> None:
        slot = span.policy_data
        if not isinstance(slot, QueueSlot):
            span.policy_data = QueueSlot(next(self._turns))
        elif span.payload is None:
            span.policy_data = QueueSlot(next(self._turns), main=self._returns_soon(slot))
        else:
            chances = min(_MAX_CHANCES, slot.chances + 1)
            span.policy_data = QueueSlot(slot.turn, slot.main, chances)

    def offer(self, span: PolicySpan) -> None:
        fifo = self._fifo_of(self._slot_of(span))
        self._sizes[span] = span.nbytes
        fifo.nbytes += span.nbytes
        fifo.queue.add(span)

    def withdraw(self, span: PolicySpan) -> None:
        self._take_out(span, self._slot_of(span))

    def victim(self, now: float) -> PolicySpan | None:
        # So many second chances at most: no call waits for a whole queue to pass.
        for _ in range(_MAX_ROUNDS):
            span = self._next()
            if span is None or self._slot_of(span).evictable:
                break
            self._requeue(span)
        return span

    def evict(self, span: PolicySpan, now: float) -> None:
        slot = self._slot_of(span)
        self._take_out(span, slot)
        if not slot.main:
            self._evicted += span.nbytes
            span.policy_data = QueueSlot(slot.turn, evicted_at=self._evicted)

    def alike(self, upper: PolicySpan, lower: PolicySpan) -> bool:
        return upper.policy_data == lower.policy_data

    def _take_out(self, span: PolicySpan, slot: QueueSlot) -> None:
        """Take an offered span out of its queue."""
        fifo = self._main if slot.main else self._small
        fifo.nbytes -= self._sizes.pop(span)
        fifo.queue.withdraw(span)

    def _returns_soon(self, ghost: QueueSlot) -> bool:
        """True if the small queue evicted no more bytes since than the main queue holds."""
        return (
            ghost.evicted_at is not None and self._evicted - ghost.evicted_at <= self._main.nbytes
        )

    def _next(self) -> PolicySpan | None:
        """Return the first of the small queue if it exceeds its share, else of the main one."""
        small, main = self._small, self._main
        if small.nbytes > self._share * (small.nbytes + main.nbytes):
            return small.queue.first() or main.queue.first()
        return main.queue.first() or small.queue.first()

    def _requeue(self, span: PolicySpan) -> None:
        """Move `span` to the end of the main queue; if it came from there, at a chance less."""
        slot = self._slot_of(span)
        chances = slot.chances - 1 if slot.main else 0
        self.withdraw(span)
        span.policy_data = QueueSlot(next(self._turns), main=True, chances=chances)
        self.offer(span)

    def _slot_of(self, span: PolicySpan) -> QueueSlot:
        """Return the slot of `span`, a new one in the small queue if it was never used."""
        slot = span.policy_data
        if not isinstance(slot, QueueSlot):
            span.policy_data = slot = QueueSlot(next(self._turns))
        return slot

    def _fifo_of(self, slot: QueueSlot) -> Fifo:
        return self._main if slot.main else self._small


def recompute_cost(start: int, stop: int) -> float:
    """Return the cost to compute tokens ``[start, stop)`` again, in costs of a first token.

    The matrices cost the same for every token, attention in proportion to the tokens before it.
    At position 30,000 both cost the same in a model of 8e9 parameters, 32 layers and 4,096
    channels: 2 x 8e9 operations against 4 x 32 x 4,096 for each token seen.
    """
    return stop - start + (stop * stop - start * start) / 2 / 30_000


class Cost(EvictionPolicy):
    """Cheapest to compute again for its bytes first, and seldom used before often used.

    GreedyDual-Size-Frequency (Cherkasova, HP Labs 1998). cost: of computing the tokens from start
    to stop again, in any unit. A span is worth uses x cost / nbytes, on top of the worth of the
    last one evicted when it was used: so a span that is not used any more goes in the end.

    Raises: TypeError for no function; when it is used, TypeError or ValueError for a cost that is
        no finite number.
    """

    data_nbytes = 0  # a level is shared by all spans used at it

    def __init__(self, cost: Callable[[int, int], float] = recompute_cost) -> None:
        if not callable(cost):
            raise TypeError(f"cost is a function of start and stop; got {cost!r}.")
        self._cost = cost
        self._queue: Queue[PolicySpan, float] = Queue(self._worth)
        self._level = 0.0
        self._victim: tuple[PolicySpan | None, float] = None, 0.0  # with its worth

    def use(self, span: PolicySpan, now: float) -> None:
        span.policy_data = self._level

    @property
    def nbytes(self) -> int:
        return self._queue.nbytes

    def offer(self, span: PolicySpan) -> None:
        self._queue.add(span)

    def withdraw(self, span: PolicySpan) -> None:
        self._queue.withdraw(span)

    def victim(self, now: float) -> PolicySpan | None:
        span = self._queue.first()
        self._victim = span, self._queue.least or 0.0
        return span

    def evict(self, span: PolicySpan, now: float) -> None:
        self._queue.withdraw(span)
        victim, worth = self._victim
        self._level = max(self._level, worth if span is victim else self._worth(span))
        self._victim = None, 0.0

    def alike(self, upper: PolicySpan, lower: PolicySpan) -> bool:
        # Numbers of uses that differ little are worth no lookup of one more span.
        same_order = upper.uses.bit_length() == lower.uses.bit_length()
        return same_order and upper.policy_data == lower.policy_data

    def _worth(self, span: PolicySpan) -> float:
        level = span.policy_data if isinstance(span.policy_data, float) else 0.0
        cost = as_finite(self._cost(span.start, span.stop), "cost returns the cost of tokens")
        return level + span.uses * cost / max(1, span.nbytes)
