"""Measure the cost of planning a pass on the host: cells written and read, and visibility.

The cache is on NumPy and has no layers to speak of, so that nothing but planning is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np

from kvcache._checks import check_sizes
from kvcache.bench.harness.contest import Contestant
from kvcache.bench.harness.report import library_versions, this_machine
from kvcache.bench.harness.timing import Progress, TimedBlocks, interleave, ticks
from kvcache.pool.batch import Batch
from kvcache.pool.causal import CausalCache
from kvcache.pool.latest import COMPLETE
from kvcache.pool.latest import Progress as PassProgress

from .report import LOADS, Load, PlanReport, PlanTiming

ROUNDS = 101
WINDOW = 1024
LARGER = 10
"""Times as many cells as the sequences need, in the large pools."""
MAX_STEPS = 64
_PROMPT = 2048
"""Tokens of one pass while a pool is filled."""


def run_plan(
    loads: Sequence[Load] = LOADS,
    window: int = WINDOW,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> PlanReport:
    """Measure ``Batch`` and ``start_forward`` of passes over one new token per sequence.

    Each load is planned with and without a sliding window, with and without the dense mask, and
    in a pool of ten times as many cells. All of one load take turns in every round.

    Raises: ValueError; nothing was measured then.
    """
    check_sizes(window=window, rounds=rounds)
    for load in loads:
        check_sizes(sequences=load.sequences, used=load.used)
        if not load.used <= load.capacity:
            raise ValueError(f"used must be <= capacity; got {load.used} > {load.capacity}.")
        if not window < load.used:
            raise ValueError(
                "a window must be shorter than what is used, so that every token drops another; "
                f"got {window} for {load.used}."
            )
    timings: list[PlanTiming] = []
    for done, load in enumerate(loads):
        tick = ticks(progress, done, len(loads), rounds, load.label)
        timings += _measured(load, window, rounds, tick)
    return PlanReport(rounds, this_machine(), library_versions(), tuple(timings))


def _measured(
    load: Load, window: int, rounds: int, tick: Callable[[], None]
) -> Iterator[PlanTiming]:
    """Time all planners of one load against each other."""
    every_option = product((None, window), (1, LARGER), (False, True))
    pools = [PlannedPool(load, *options) for options in every_option]
    limit = max(1, min(MAX_STEPS, load.used // 2))
    contestants = [(pool.contestant(), limit) for pool in pools]
    timed = interleave(contestants, rounds, lambda: None, tick)  # no device to wait for
    for pool, blocks in zip(pools, timed, strict=True):
        yield pool.timing(blocks)


class _WithoutLayers(CausalCache):
    """A cache whose passes count as they begin, so that planning is all that is measured."""

    def pass_progress(self) -> PassProgress:
        return COMPLETE


class PlannedPool:
    """A pool of sequences decoded together; the rest of a larger pool stays empty.

    Without a window, rewinding removes the tokens of a block. With one, the sequences are longer
    than it, so that every token drops another, and they just go on.

    mask: True to make the dense mask of every pass, for which a small layer is put as well.
    """

    def __init__(self, load: Load, window: int | None, pool: int, mask: bool = False) -> None:
        self.load, self.window, self.pool, self.mask = load, window, pool, mask
        self.cache = _WithoutLayers(window)
        self.cache.init(
            "numpy",
            "int8",
            max_sequences=load.sequences * pool,
            capacity=load.capacity,
            max_batch=max(_PROMPT, load.sequences),
        )
        self.sequences = list(range(load.sequences))
        self.position = load.used
        self._fill()

    def _fill(self) -> None:
        for sequence, start in product(self.sequences, range(0, self.load.used, _PROMPT)):
            positions = range(start, min(self.load.used, start + _PROMPT))
            self.cache.start_forward(Batch(positions, [sequence] * len(positions)))

    def contestant(self) -> Contestant:
        """Return passes over this pool as a contestant."""
        name = "with mask" if self.mask else "without mask"
        return Contestant(name, self.plan_and_mask if self.mask else self.plan, self.rewind)

    def plan(self, steps: int) -> None:
        """Plan as many passes."""
        start_forward, sequences = self.cache.start_forward, self.sequences
        for position in range(self.position, self.position + steps):
            start_forward(Batch([position] * len(sequences), sequences))
        self.position += steps

    def plan_and_mask(self, steps: int) -> None:
        """Plan as many passes, and make the mask of each, shared by its layers."""
        # One head, one dimension: `get` makes masks only where something was put.
        keys = np.zeros((1, len(self.sequences), 1), np.int8)
        for _ in range(steps):
            self.plan(1)
            self.cache.put(keys)
            self.cache.get()

    def rewind(self, steps: int) -> None:
        """Remove the last `steps` tokens; with a window, do nothing."""
        if self.window is None:
            self.position -= steps
            for sequence in self.sequences:
                self.cache.remove(sequence, self.position)

    def timing(self, blocks: TimedBlocks) -> PlanTiming:
        """Return the timing of this planner."""
        load = self.load
        return PlanTiming(
            load.sequences,
            load.capacity,
            load.used,
            self.window,
            self.pool,
            self.mask,
            blocks.steps,
            blocks.rounds_us,
        )
