"""The latest pass of a cache, as far as it tells which layers a model has."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple


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
