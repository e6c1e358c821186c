"""Argument checks shared by several caches. Each raises ValueError."""

from __future__ import annotations


def check_ids(max_sequences: int, *ids: int) -> None:
    """Raise ValueError unless all of `ids` lie in ``[0, max_sequences)``."""
    if not all(0 <= sequence < max_sequences for sequence in ids):
        raise ValueError(
            f"sequence ids must lie in [0, {max_sequences}), as many as max_sequences; "
            f"got {', '.join(map(str, ids))}."
        )


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless every size is at least 1; its keyword names it in the error."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1; got {value}.")


def check_range(start: int, stop: int | None) -> None:
    """Raise ValueError unless ``[start, stop)`` is a range of positions; None: to the end."""
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"a range must satisfy 0 <= start <= stop; got [{start}, {stop}).")
