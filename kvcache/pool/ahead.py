"""Tokens that see others ahead of them: those of images, in models with text around."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

import numpy as np

from kvcache._types import Int32s

TokensAhead: TypeAlias = Collection[int] | Collection[Collection[int]]
"""Batch indices of tokens that see others ahead, or groups of such indices."""
Seen: TypeAlias = dict[int, tuple[int, int]]
"""By batch index: the positions ``[start, stop)`` that a token sees beyond the rule."""

_END = int(np.iinfo(np.int32).max)


def seen_ahead(tokens: TokensAhead, positions: Int32s, sequences: Int32s) -> Seen:
    """Return what `tokens` see: all of their sequence, or their group if they come in groups.

    positions, sequences: of the batch.

    Raises: ValueError for anything but indices of the batch, or a group of several sequences.
    """
    items = list(tokens)  # of a list, a set, or an array of any framework
    if not any(np.ndim(np.asarray(item)) for item in items):
        return {i: (int(positions[i]), _END) for i in _batch_indices(items, positions.size)}
    seen: Seen = {}
    for item in items:
        group = _batch_indices(item, positions.size)
        if len(set(sequences[group].tolist())) > 1:
            raise ValueError(f"a group belongs to one sequence; got batch indices {group}.")
        held = positions[group].tolist()
        seen |= dict.fromkeys(group, (min(held), max(held) + 1) if held else (0, 0))
    return seen


def _batch_indices(tokens: object, size: int) -> list[int]:
    """Return indices of a batch of `size` tokens from a mask of it, or integers as in NumPy."""
    index = np.asarray(tokens)
    if not index.size:
        return []
    mask = index.dtype.kind == "b" and index.shape == (size,)
    integers = index.dtype.kind in "iu" and index.ndim == 1
    if not mask and not (integers and -size <= index.min() and index.max() < size):
        raise ValueError(
            f"set_causal takes indices into the batch of {size} tokens, a mask of it, or groups of "
            f"indices; got {tokens!r}."
        )
    chosen: list[int] = np.arange(size)[index].tolist()
    return chosen
