"""Times contestants against each other on a machine that does other things as well.

Every round runs each contestant for one short block of steps, in a new order. What disturbs
the machine for longer than a block disturbs all of them, and what disturbs one block is an
outlier that the median over the rounds ignores.
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
"""Called with the work done, all work, and what is being measured."""

BLOCK_MICROSECONDS = 500
"""Aim for the length of a block: shorter than what disturbs it, longer than the clock notices."""
SLOW_EVERY = 10
"""A contestant whose single step takes ten such blocks has a turn in every tenth round only."""


@dataclass
class Blocks:
    """Blocks of one contestant. steps: of one block. us: microseconds per step of each."""

    contestant: Contestant
    wait: Callable[[], None]
    steps: int = 1
    every: int = 1
    us: list[float] = field(default_factory=list)

    def time(self) -> float:
        """Microseconds of one more block, not recorded."""
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
        self.time()
        took = self.time()
        while self.steps < limit and took * 2 <= BLOCK_MICROSECONDS:
            self.steps = min(limit, self.steps * 2)
            took = self.time()
        if took > BLOCK_MICROSECONDS * 10 and self.steps == 1:
            self.every = SLOW_EVERY

    def turn(self, number: int) -> None:
        """Take part in that round, perhaps."""
        if number % self.every == 0:
            self.us.append(self.time() / self.steps)

    @property
    def rounds_us(self) -> tuple[float, ...]:
        """Microseconds per step of each block, to four digits."""
        return four_digits(self.us)


def four_digits(us: Sequence[float]) -> tuple[float, ...]:
    """Microseconds as reports keep them: more digits than that are noise."""
    return tuple(float(f"{value:.4g}") for value in us)


def ticks(
    progress: Progress | None, done: int, contests: int, rounds: int, label: str
) -> Callable[[], None]:
    """What :func:`interleave` calls in one of several contests, told to whoever wants to know."""
    each = rounds + 1
    count = done * each

    def tick() -> None:
        nonlocal count
        count += 1
        if progress is not None:
            progress(count, contests * each, label)

    return tick


def interleave(
    contestants: Sequence[tuple[Contestant, int]],
    rounds: int,
    wait: Callable[[], None],
    tick: Callable[[], None],
) -> list[Blocks]:
    """Time all contestants against each other, `rounds` blocks each.

    contestants: each with the longest block of steps that it may take. wait: returns once a
    device has done what was queued. tick: called after the warm-up and after every round.
    """
    blocks = [Blocks(contestant, wait) for contestant, _ in contestants]
    for entry, (_, limit) in zip(blocks, contestants, strict=True):
        entry.warm_up(limit)
    tick()
    shuffle = random.Random(0).shuffle  # noqa: S311 - an order of turns, no secret
    turns = list(blocks)
    with no_collection():
        for number in range(rounds):
            shuffle(turns)
            for entry in turns:
                entry.turn(number)
            tick()
    return blocks


@contextmanager
def no_collection() -> Iterator[None]:
    """Without the garbage collector, which would run in whichever block fills its quota."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
