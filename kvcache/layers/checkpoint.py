"""Checkpoints of per-layer caches, for speculative decoding; savepoints, for failed calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, SupportsIndex, TypeAlias

from kvcache._checks import as_index
from kvcache.errors import TrimError


@dataclass(frozen=True)
class Checkpoint:
    """State of a per-layer cache for a rollback to return to.

    offset: tokens seen by then. first: first position held by then, sinks aside.
    """

    offset: int
    first: int = 0


def checked_accepted(mark: int | None, offset: int, accepted: SupportsIndex) -> tuple[int, int]:
    """Return where a checkpoint was opened, and `accepted` as an int.

    mark: offset at the open checkpoint, None without one. offset: of the cache.

    Raises: TrimError without a checkpoint, or for more tokens than came since.
    """
    if mark is None:
        raise TrimError("rollback needs an open checkpoint. Call checkpoint() first.")
    count = as_index(accepted, "accepted")
    if not 0 <= count <= offset - mark:
        raise TrimError(f"accepted must be 0 to {offset - mark} tokens, those since; got {count}.")
    return mark, count


Names: TypeAlias = tuple[str, ...]
"""Names of attributes."""


class HasSavepoint(Protocol):
    """A part of a cache that can be put back."""

    def savepoint(self) -> Callable[[], None]:
        """Return a function that makes it what it is now."""


def savepoint(
    owner: object, names: Names, parts: Iterable[HasSavepoint | None]
) -> Callable[[], None]:
    """Return a function that puts back the attributes `names` of `owner`, and its `parts`."""
    own = {name: getattr(owner, name) for name in names}
    undos = [part.savepoint() for part in parts if part is not None]

    def undo() -> None:
        for name, value in own.items():
            setattr(owner, name, value)
        for undo_part in undos:
            undo_part()

    return undo
