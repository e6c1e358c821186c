"""Classes of spans by what their last request tells, each finer one within a coarser one."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from math import prod

BLOCK = 512
"""Tokens of a block, in which distances are classed and observations are weighed."""
USES = 8
"""Spans requested once, twice, ... and eight times or more."""
DISTANCES = (BLOCK, 3 * BLOCK, 15 * BLOCK, 63 * BLOCK)
"""Most tokens from the start of a span to the end of its request, by class; the last has more."""
PAUSES = (16.0, 128.0, 512.0)
"""Seconds since the last request at which the next class begins, after that of no request yet."""
ANSWERS = (32, 128, 512)
"""Tokens answered at which the next class begins."""
SHAPE = USES, len(DISTANCES) + 1, len(PAUSES) + 2, len(ANSWERS) + 1
"""Classes by uses, refined by distance, then by pause, then by answer."""
CLASSES = USES + prod(SHAPE)
"""All classes: those of requests that have not ended, by uses alone, then the finest ones."""
_NEARER = prod(SHAPE[2:])
"""How much higher the number of a class is than that of the next nearer one."""
NEW = 0
"""Pause of a span that was not requested before."""


def pause_of(seconds: float) -> int:
    """Return the class of a pause, of seconds between two requests for a span."""
    return 1 + bisect_right(PAUSES, seconds)


def class_of(uses: int, distance: int, pause: int, answered: int) -> int:
    """Return the number of a finest class.

    uses: earlier requests for the span, USES - 1 at most. distance: tokens from its start to the
    end of the request. pause: of the span before it, of :func:`pause_of` or NEW. answered: tokens.
    """
    _, distances, pauses, answers = SHAPE
    number = uses * distances + bisect_left(DISTANCES, distance)
    number = (number * pauses + pause) * answers + bisect_right(ANSWERS, answered)
    return USES + number


def last_block_of(kind: int) -> int:
    """Return the class of the last block of a request, whose other tokens are in class `kind`."""
    nearer = (kind - USES) // _NEARER % SHAPE[1]
    return kind - nearer * _NEARER
