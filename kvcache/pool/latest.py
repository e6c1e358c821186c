"""The latest pass of a cache: how far it has come, and which layers of a model it tells."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from enum import IntEnum
from typing import NamedTuple


class Progress(IntEnum):
    """How far the pass begun last has come. That of a wrapper is the greatest of its parts."""

    NOTHING = 0
    """Nothing is left to put: no pass, a reserve pass, or one that brings no tokens of its own."""
    BLANK = 1
    """No layer was put, and none is known. A model need not use all parts of a wrapper, so what
    the others have put counts."""
    COMPLETE = 2
    """Every known layer was put, one at least."""
    PARTIAL = 3
    """A known layer was not put."""


NOTHING, BLANK, COMPLETE, PARTIAL = Progress  # names that are looked up fast, in every pass
UNFINISHED = (BLANK, PARTIAL)
"""Of a pass whose tokens are not history."""


class LatestPass(NamedTuple):
    """The pass begun last, finished or not; in a cache without one, nothing.

    start: first position that it brings to the sequence asked for, None if none. layers: all that
    were put by then, in this pass or before it. grew: whether it put any for the first time. Until
    a pass went through the whole model, nothing tells how many layers are still to come.
    """

    start: int | None = None
    layers: frozenset[Hashable] = frozenset()
    grew: bool = False


def joined(parts: Sequence[LatestPass]) -> LatestPass:
    """Return the latest pass of a wrapper of caches, each with layers of its own."""
    starts = [part.start for part in parts if part.start is not None]
    layers = [(number, layer) for number, part in enumerate(parts) for layer in part.layers]
    return LatestPass(
        min(starts, default=None), frozenset(layers), any(part.grew for part in parts)
    )
