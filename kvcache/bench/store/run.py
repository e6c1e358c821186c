"""Measure the throughput of stores, beside the ceilings of the machine in the same run.

The ceilings: a copy to new memory, a plain file written anew and read, and one TCP stream over
loopback. All contestants take turns. Nobody waits for a disk, as no store does: files are in the
memory of the system.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from kvcache._checks import check_sizes
from kvcache.bench.harness.report import Skipped, library_versions, this_machine
from kvcache.bench.harness.timing import Progress, TimedBlocks, no_collection, ticks

from .case import StoreCase, size_name
from .contestants import Entrants
from .report import StoreReport, StoreTiming

SIZES = (1 << 20, 32 << 20)
ROUNDS = 31
_LONGEST_BLOCK = 16
_BLOCK_NBYTES = 32 << 20
"""Bytes of a block at most, so that large values are not kept by the dozen."""


def run_store(
    sizes: Sequence[int] = SIZES,
    rounds: int = ROUNDS,
    directory: Path | None = None,
    progress: Progress | None = None,
) -> StoreReport:
    """Measure puts and gets of values of `sizes` bytes.

    directory: where files are written, and removed at the end; None for a temporary one. RedisStore
    takes part on a redis-server and on a valkey-server, where there are such programs. They are
    started on free ports of loopback, and end with the run.

    Raises: ValueError; nothing was measured then. StoreError if a store does not take the values.
    """
    check_sizes(rounds=rounds, **{f"sizes[{i}]": size for i, size in enumerate(sizes)})
    timings: list[StoreTiming] = []
    skipped: list[Skipped] = []
    for done, nbytes in enumerate(sorted(set(sizes))):
        tick = ticks(progress, done, len(set(sizes)), rounds, f"values of {size_name(nbytes)}")
        with tempfile.TemporaryDirectory(dir=directory) as name, ExitStack() as stack:
            entrants = Entrants(StoreCase(nbytes, Path(name)), stack)
            timings += _timed(entrants, nbytes, rounds, tick)
        skipped += [
            Skipped("values", f"of {size_name(nbytes)}", contestant, reason)
            for contestant, reason in entrants.missing.items()
        ]
    return StoreReport(rounds, this_machine(), library_versions(), tuple(timings), tuple(skipped))


def _timed(
    entrants: Entrants, nbytes: int, rounds: int, tick: Callable[[], None]
) -> list[StoreTiming]:
    """Time all contestants against each other, every one in every round."""
    steps = max(1, min(_LONGEST_BLOCK, _BLOCK_NBYTES // nbytes))
    entries = [
        (operation, TimedBlocks(contestant, _no_device, steps))
        for operation, contestant in entrants.all()
    ]
    # Not `interleave`, where a contestant that takes milliseconds sits out nine rounds of ten: here
    # all do. It would leave three blocks of a stream, whose times vary.
    for _, blocks in entries:
        blocks.time()
    tick()
    shuffle = random.Random(0).shuffle  # noqa: S311 - an order of turns, no secret
    turns = list(entries)
    with no_collection():
        for number in range(rounds):
            shuffle(turns)
            for _, blocks in turns:
                blocks.turn(number)
            tick()
    return [
        StoreTiming(operation, nbytes, blocks.contestant.name, steps, blocks.rounds_us)
        for operation, blocks in entries
    ]


def _no_device() -> None:
    """Wait for nothing."""
