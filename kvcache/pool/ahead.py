"""Tokens that see others ahead of them: those of images, in models with text around."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

import numpy as np

from kvcache._checks import as_batch_indices
from kvcache._types import Int32s

from .owners import Owners

TokensAhead: TypeAlias = Sequence[int] | Sequence[Sequence[int]]
"""Batch indices of tokens that see others ahead, or groups of such indices."""
Seen: TypeAlias = dict[int, tuple[int, int]]
"""By batch index: the positions ``[start, stop)`` that a token sees beyond the rule."""

_END = int(np.iinfo(np.int32).max)
_NAME = "except_"  # of the argument, in errors


def seen_ahead(tokens: TokensAhead, positions: Int32s, sequences: Int32s) -> Seen:
    """Return what `tokens` see: all of their sequence, or their group if they come in groups.

    positions, sequences: of the batch.

    Raises: ValueError for anything but indices of the batch, or a group of several sequences.
    """
    groups = _groups(tokens)
    if groups is None:
        indices = as_batch_indices(cast(Sequence[int], tokens), positions.size, _NAME)
        return {token: (int(positions[token]), _END) for token in indices}
    seen: Seen = {}
    for items in groups:
        group = list(as_batch_indices(items, positions.size, _NAME))
        if len(set(sequences[group].tolist())) > 1:
            raise ValueError(f"a group belongs to one sequence; got batch indices {group}.")
        held = positions[group].tolist()
        seen |= dict.fromkeys(group, (min(held), max(held) + 1) if held else (0, 0))
    return seen


def tell_owners(owners: Owners, seen: Seen, positions: Int32s, sequences: Int32s) -> None:
    """Tell the owners of `sequences` which of their tokens see others ahead, and how far.

    seen: result of :func:`seen_ahead`. positions, sequences: of the batch.
    """
    for token, (_, stop) in seen.items():
        sequence, start = int(sequences[token]), int(positions[token])
        owner = owners.recording(sequence)
        if owner is not None:
            # Nothing is visible behind the last token of the pass.
            end = int(positions[sequences == sequence].max()) + 1
            owner.looked_ahead(sequence, start, min(stop, end))


def _groups(tokens: TokensAhead) -> list[Sequence[int]] | None:
    """Return `tokens` as groups of indices; None if they are indices, or nothing of the kind."""
    items: object = tokens
    if not isinstance(items, Sequence):
        return None
    groups = [item for item in items if np.ndim(item) == 1]
    return groups if groups and len(groups) == len(items) else None
