"""Plans of passes for compiled programs, one at a time or many decode steps ahead."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvcache._checks import check_ids
from kvcache._interrupts import uninterrupted
from kvcache._types import Bools, Int32s
from kvcache.errors import NotSupportedError
from kvcache.storage.masks import device_mask

from .batch import Batch
from .passes import CellPool
from .plan import ForwardPlan, Pass
from .planning import Planned

StartForward = Callable[[Batch], None]
"""Function to begin a pass, as :meth:`Cache.start_forward` does."""


def plan_current(pool: CellPool, count: int, tokens: int | None) -> ForwardPlan:
    """Return the plan of the current pass, of `count` tokens, padded to `tokens`.

    The pass is complete once the state of the programs comes back.

    Raises: NotSupportedError for a reserve pass.
    """
    forward_pass = pool.current_pass()
    if not forward_pass.stores:
        raise NotSupportedError("a reserve pass has no plan: it stores nothing. Use allocate.")
    # Edge padding: the last token is written again, to its own cell, with equal rows.
    extra = (0, (tokens or count) - count)
    cells = np.pad(forward_pass.cells, extra, "edge")
    visible = np.pad(forward_pass.mask(), (extra, (0, 0)), "edge")
    plan = _device_plan(pool, cells, forward_pass.start, visible)
    pool.passes.plan(forward_pass)
    return plan


def plan_steps(
    pool: CellPool, batch: Batch, steps: int, start_forward: StartForward
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
    try:
        plan = _planned(pool, batch, steps, start_forward, passes)
        with uninterrupted():
            for forward_pass in passes:
                pool.passes.plan(forward_pass)
    except BaseException:
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


def _planned(
    pool: CellPool, batch: Batch, steps: int, start_forward: StartForward, passes: list[Pass]
) -> ForwardPlan:
    """Begin each step in turn and return their plans, stacked, with one range for all.

    passes: the passes begun, added here one by one.
    """
    seen: list[list[Int32s]] = []
    for step in range(steps):
        start_forward(Batch(batch.positions + step, batch.sequences))
        passes.append(pool.current_pass())
        # Later steps change the table, so the cells visible to this one are recorded now.
        seen.append([cells.copy() for cells in passes[-1].visible()])
    # One range, because the plans are stacked: a program has one shape for all steps.
    start, stop = pool.range_of(passes)
    visible = np.zeros((steps, len(batch), stop - start), np.bool_)
    for step, token in np.ndindex(visible.shape[:2]):
        visible[step, token, seen[step][token] - start] = True
    cells = np.stack([forward_pass.cells for forward_pass in passes])
    return _device_plan(pool, cells, [start] * steps, visible)


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
