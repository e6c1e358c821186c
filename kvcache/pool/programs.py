"""Plans of passes for compiled programs, one at a time or many decode steps ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvcache._checks import check_ids
from kvcache._interrupts import uninterrupted
from kvcache._types import Bools, Int32s
from kvcache.backends import Array
from kvcache.backends.products import NEVER
from kvcache.errors import NotSupportedError
from kvcache.storage.masks import device_mask

from .batch import Batch
from .blocks import block_reads
from .passes import CellPool
from .plan import ForwardPlan, Pass
from .planning import Planned
from .reads import Reads, plan_reads

StartForward = Callable[[Batch], None]
"""Function to begin a pass, as :meth:`Cache.start_forward` does."""


def plan_current(pool: CellPool, count: int, tokens: int | None, with_reads: bool) -> ForwardPlan:
    """Return the plan of the current pass, of `count` tokens, padded to `tokens`.

    The pass is complete once the state of the programs comes back. with_reads: plan for attention
    of the program, without a mask.

    Raises: NotSupportedError for a reserve pass.
    """
    forward_pass = pool.current_pass()
    if not forward_pass.stores:
        raise NotSupportedError("a reserve pass has no plan: it stores nothing. Use allocate.")
    # Edge padding: the last token is written again, to its own cell, with equal rows.
    extra = (0, (tokens or count) - count)
    cells = np.pad(forward_pass.cells, extra, "edge")
    if with_reads:
        reads = [_reads_of(pool, forward_pass)]
        plan = _plan_with_reads(pool, cells, reads, count, lambda array: array[0])
    else:
        visible = np.pad(forward_pass.mask(), (extra, (0, 0)), "edge")
        plan = _device_plan(pool, cells, forward_pass.start, visible)
    pool.passes.plan(forward_pass)
    return plan


def plan_steps(
    pool: CellPool, batch: Batch, steps: int, start_forward: StartForward, with_reads: bool
) -> Planned[ForwardPlan]:
    """Return the plans of `steps` decode steps, stacked; `start_forward` begins each in turn.

    As for :func:`plan_current`, they are complete once the state of the programs comes back.

    Raises: CacheFullError, ValueError; nothing has changed then.
    """
    _check_steps(pool, batch)
    pins, before = pool.pins, pool.passes.current
    passes: list[Pass] = []
    pins.retain_due()
    # Meanwhile resume points retain nothing: their rows could have to be spilled, and so read,
    # before a program has written them.
    pins.paused = True
    make_plan = _steps_with_reads if with_reads else _steps_with_mask
    try:
        plan = make_plan(pool, batch, _begun(pool, batch, steps, start_forward, passes))
        with uninterrupted():
            for forward_pass in passes:
                pool.passes.plan(forward_pass)
    except BaseException:
        # The last may have been interrupted before it was noted.
        passes += [begun for begun in pool.passes.begun_after(before) if begun not in passes]
        pool.drop(passes, before)
        raise
    else:
        return Planned(plan, lambda: pool.drop(passes, before))
    finally:
        pins.paused = False


def _check_steps(pool: CellPool, batch: Batch) -> None:
    """Raise ValueError unless `batch` is one token after the last one of each sequence."""
    sequences = batch.sequences.tolist()
    check_ids(pool.table.max_sequences, *sequences)
    if len(set(sequences)) < len(sequences):
        raise ValueError(f"a decode step has one token per sequence; got {sequences}.")
    for sequence, position in zip(sequences, batch.positions.tolist(), strict=True):
        if position < pool.table.next_position(sequence):
            raise ValueError(
                f"decode steps go on behind the last token; sequence {sequence} has "
                f"{pool.table.next_position(sequence)}, got position {position}."
            )


def _begun(
    pool: CellPool, batch: Batch, steps: int, start_forward: StartForward, passes: list[Pass]
) -> Iterator[Pass]:
    """Begin each step in turn and yield its pass, while the table is as the step sees it.

    passes: the passes begun, added here one by one.
    """
    for step in range(steps):
        start_forward(Batch(batch.positions + step, batch.sequences))
        passes.append(pool.current_pass())
        yield passes[-1]


def _steps_with_mask(pool: CellPool, batch: Batch, begun: Iterator[Pass]) -> ForwardPlan:
    """Return the plans of steps as each is begun, stacked."""
    passes: list[Pass] = []
    seen: list[list[Int32s]] = []
    for forward_pass in begun:
        passes.append(forward_pass)
        # Later steps change the table, so the cells visible to this one are recorded now.
        seen.append(
            [cells.copy() for cells in forward_pass.visible(range(forward_pass.cells.size))]
        )
    # One range, because the plans are stacked: a program has one shape for all steps.
    start, stop = pool.range_of(passes)
    visible = np.zeros((len(passes), len(batch), stop - start), np.bool_)
    for step, token in np.ndindex(visible.shape[:2]):
        visible[step, token, seen[step][token] - start] = True
    cells = np.stack([forward_pass.cells for forward_pass in passes])
    return _device_plan(pool, cells, [start] * len(passes), visible)


def _steps_with_reads(pool: CellPool, batch: Batch, begun: Iterator[Pass]) -> ForwardPlan:
    """Return the plans of steps as each is begun, stacked, with reads in place of a mask."""
    pairs = [(forward_pass.cells, _reads_of(pool, forward_pass)) for forward_pass in begun]
    cells, reads = zip(*pairs, strict=True)
    return _plan_with_reads(pool, np.stack(cells), reads, len(batch), lambda array: array)


def _reads_of(pool: CellPool, forward_pass: Pass) -> Reads:
    """Return the reads of a pass; cells in a row are copied like others in a program."""
    return plan_reads(forward_pass, pool.buffers.backend.read_costs._replace(run=NEVER))


def _plan_with_reads(
    pool: CellPool,
    cells: Int32s,
    reads: Sequence[Reads],
    tokens: int,
    select: Callable[[Int32s], Int32s],
) -> ForwardPlan:
    """Return a plan for attention. tokens: of a pass, without padding.

    select: what to take of arrays with an axis of passes in front.
    """
    backend, lead = pool.buffers.backend, cells.shape[:-1]

    def move(array: Int32s) -> Array:
        return backend.from_host(select(array))

    blocks = block_reads(reads, tokens, cells.shape[-1], move)
    start = [0] * lead[0] if lead else 0
    plan = _device_plan(pool, cells, start, np.zeros((*cells.shape, 0), np.bool_))
    return plan._replace(reads=blocks)


def _device_plan(
    pool: CellPool, cells: Int32s, start: int | list[int], visible: Bools
) -> ForwardPlan:
    """Return the plan of one pass, or of several, stacked along a first axis of every leaf."""
    buffers, steps = pool.buffers, cells.shape[:-1]
    keys, values = buffers.layouts
    return ForwardPlan(
        buffers.backend.from_host(cells),
        buffers.backend.traced_index(start),
        device_mask(buffers.backend, pool.config.mask_dtype, visible),
        buffers.empty(keys, steps),
        buffers.empty(values, steps),
    )
