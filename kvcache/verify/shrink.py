"""Finds the shortest script that still shows a fault: delta debugging over operations and tokens.

Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002. Deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

from .operations import Begin, Cancel, Draft, Feed, Ids, Operation, Script, Together, Trim

MOST_TRIES = 400
"""Scripts that a search runs at most."""


def shrink(script: Script, is_faulty: Callable[[Script], bool], tries: int = MOST_TRIES) -> Script:
    """Return the smallest script found for which `is_faulty`, which is true of `script`."""
    seen = {script}
    progress = True
    while progress:
        progress = False
        for candidate in _smaller(script):
            if candidate in seen:
                continue
            if len(seen) > tries:
                return script
            seen.add(candidate)
            if is_faulty(candidate):
                script, progress = candidate, True
                break
    return script


def _smaller(script: Script) -> Iterator[Script]:
    """Yield scripts with less in them, those with much less first."""
    return chain(_without_operations(script), _with_simpler_operations(script))


def _without_operations(script: Script) -> Iterator[Script]:
    size = len(script) // 2
    while size:
        # From the end: later operations need earlier ones.
        for stop in range(len(script), 0, -size):
            shorter = script[: max(0, stop - size)] + script[stop:]
            if shorter:
                yield shorter
        size //= 2


def _with_simpler_operations(script: Script) -> Iterator[Script]:
    for number, operation in enumerate(script):
        for simpler in _simpler(operation):
            yield (*script[:number], simpler, *script[number + 1 :])


def _simpler(operation: Operation) -> Iterator[Operation]:
    """Yield operations of fewer tokens or simpler options."""
    if isinstance(operation, Begin):
        yield from _simpler_begin(operation)
    elif isinstance(operation, Feed | Draft | Cancel):
        yield from (replace(operation, ids=ids) for ids in _shorter(operation.ids))
        if isinstance(operation, Feed) and operation.sizes:
            yield replace(operation, sizes=())
        if isinstance(operation, Draft) and operation.accepted:
            yield replace(operation, accepted=operation.accepted - 1)
    elif isinstance(operation, Trim) and operation.count > 1:
        yield replace(operation, count=operation.count // 2)
        yield replace(operation, count=operation.count - 1)
    elif isinstance(operation, Together):
        for row, ids in enumerate(operation.ids):
            for shorter in _shorter(ids):
                yield replace(
                    operation, ids=(*operation.ids[:row], shorter, *operation.ids[row + 1 :])
                )


def _simpler_begin(operation: Begin) -> Iterator[Operation]:
    yield from (replace(operation, more=ids) for ids in _shorter(operation.more))
    if operation.sizes:
        yield replace(operation, sizes=())
    if operation.rest is not None:
        yield replace(operation, rest=None)
    if operation.keep:
        yield replace(operation, keep=min(operation.keep // 2, 64))
        yield replace(operation, keep=min(operation.keep - 1, 64))


def _shorter(ids: Ids) -> Iterator[Ids]:
    if len(ids) > 1:
        half = len(ids) // 2
        yield ids[:half]
        yield ids[half:]
        yield ids[:-1]
        yield ids[1:]
