"""Timing of contestants against each other, on a machine busy with other things as well.

Every round runs each contestant for one short block of steps, in a new order. A disturbance
longer than a block hits all of them, and one that hits a single block is an outlier, which the
median over the rounds ignores.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from .contest import Contestant

Progress = Callable[[int, int, str], None]
"""Called with the work done, all work, and a label for the work in hand."""

BLOCK_MICROSECONDS = 500
"""Length to aim at for a block: shorter than a disturbance, longer than the clock's resolution."""
SLOW_EVERY = 10
"""A contestant whose single step takes ten such blocks has a turn in every tenth round only."""


@dataclass
class TimedBlocks:
    """Blocks of one contestant. steps: of one block. us: microseconds per step of each block.

    wait: returns once a device has done all queued work. every: rounds from one turn to the next.
    """

    contestant: Contestant
    wait: Callable[[], None]
    steps: int = 1
    every: int = 1
    us: list[float] = field(default_factory=list)

    def time(self) -> float:
        """Run one more block, not recorded; return its microseconds."""
        # The first steps find caches and allocators as others left them: not timed.
        lead = max(1, self.steps // 2)
        self.contestant.rewind(lead + self.steps)
        self.contestant.run(lead)
        self.wait()
        start = perf_counter()
        self.contestant.run(self.steps)
        self.wait()
        return (perf_counter() - start) * 1e6

    def warm_up(self, limit: int) -> None:
        """Compile, touch memory, and choose the number of steps, `limit` at most."""
        self.time()  # compiles: says nothing about later blocks
        took = self.time()
        # Doubled until a block lasts long enough for the clock, and half that long at the least.
        while self.steps < limit and took * 2 <= BLOCK_MICROSECONDS:
            self.steps = min(limit, self.steps * 2)
            took = self.time()
        # Such blocks would make up most of a run; their medians need no more than a few.
        if took > BLOCK_MICROSECONDS * 10 and self.steps == 1:
            self.every = SLOW_EVERY

    def turn(self, number: int) -> None:
        """Record a block in round `number`, unless this contestant sits it out."""
        if number % self.every == 0:
            self.us.append(self.time() / self.steps)

    @property
    def rounds_us(self) -> tuple[float, ...]:
        """Microseconds per step of each block, to four digits."""
        return four_digits(self.us)


def four_digits(us: Sequence[float]) -> tuple[float, ...]:
    """Round microseconds to four significant digits: further ones are noise."""
    return tuple(float(f"{value:.4g}") for value in us)


def ticks(
    progress: Progress | None, done: int, contests: int, rounds: int, label: str
) -> Callable[[], None]:
    """Return the `tick` of one contest: it tells `progress` how far all contests have come.

    done: contests before this one, of as many rounds. A contest ticks ``rounds + 1`` times.
    """
    ticks_per_contest = rounds + 1
    count = done * ticks_per_contest

    def tick() -> None:
        nonlocal count
        count += 1
        if progress is not None:
            progress(count, contests * ticks_per_contest, label)

    return tick


def interleave(
    contestants: Sequence[tuple[Contestant, int]],
    rounds: int,
    wait: Callable[[], None],
    tick: Callable[[], None],
) -> list[TimedBlocks]:
    """Time all contestants against each other, `rounds` blocks each.

    contestants: each with the longest block of steps that it may take. wait: returns once a
    device has done all queued work. tick: called after the warm-up and after every round.
    """
    entries = [TimedBlocks(contestant, wait) for contestant, _ in contestants]
    for entry, (_, limit) in zip(entries, contestants, strict=True):
        entry.warm_up(limit)
    tick()
    # The same orders in every run, so that two runs differ by what they measure only.
    shuffle = random.Random(0).shuffle  # noqa: S311 - an order of turns, no secret
    turns = list(entries)
    with no_collection():
        for number in range(rounds):
            # A fixed order would have each contestant find the caches of the same predecessor.
            shuffle(turns)
            for entry in turns:
                entry.turn(number)
            tick()
    return entries


@contextmanager
def no_collection() -> Iterator[None]:
    """Suspend the garbage collector: it would run in whichever block happens to fill its quota."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
