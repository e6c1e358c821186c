"""Entries of a prompt cache that are several: layers with attention and a state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, TypeAlias

from kvcache.errors import ForeignFileError

from .entries import AttentionEntry
from .states import RecurrentEntry

Entry: TypeAlias = Any
"""An :class:`AttentionEntry` or a :class:`RecurrentEntry`; one list has the kinds of the next."""


class EntryList:
    """The entries of one layer that has more than one."""

    def __init__(self, *entries: Entry) -> None:
        self.entries = entries

    def __getitem__(self, index: int) -> Entry:
        return self.entries[index]

    def size(self) -> int:
        """Return the largest size of the entries."""
        return max(int(entry.size()) for entry in self.entries)

    def empty(self) -> bool:
        """Return whether no token came."""
        return all(entry.empty() for entry in self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all entries."""
        return sum(entry.nbytes for entry in self.entries)

    def is_trimmable(self) -> bool:
        """Return whether all entries are."""
        return all(entry.is_trimmable() for entry in self.entries)

    def trim(self, n: int) -> int:
        """Take back the last `n` tokens of all entries, and return their number.

        Raises: TrimError where one of them cannot; all are unchanged then.
        """
        for entry in self.entries:
            entry.cache.check_trim(min(n, entry.cache.offset))
        counts: list[int] = [entry.trim(n) for entry in self.entries]
        return counts[0]

    # Batches.

    @classmethod
    def merge(cls, lists: Sequence[Self]) -> Self:
        """Return entries with the requests of all `lists`, which stay as they are."""
        columns = zip(*(own.entries for own in lists), strict=True)
        return cls(*(type(column[0]).merge(column) for column in columns))

    def extend(self, other: Self) -> None:
        """Append the requests of `other`."""
        for entry, more in zip(self.entries, other.entries, strict=True):
            entry.extend(more)

    def filter(self, batch_indices: Any) -> None:
        """Keep these requests of the batch only, in this order."""
        for entry in self.entries:
            entry.filter(batch_indices)

    def extract(self, idx: int) -> Self:
        """Return entries of one request of the batch, without padding."""
        return type(self)(*(entry.extract(idx) for entry in self.entries))

    def prepare(self, **padding: Any) -> None:
        """Announce the padding of the tokens to come, in all entries."""
        for entry in self.entries:
            entry.prepare(**padding)

    def finalize(self) -> None:
        """Move padding on the right of the requests to their left, in all entries."""
        for entry in self.entries:
            entry.finalize()

    # Files.

    @property
    def state(self) -> list[tuple[object, str]]:
        """The state of each entry, and the name of its class."""
        return [(entry.state, type(entry).__name__) for entry in self.entries]

    @classmethod
    def from_state(cls, state: Sequence[tuple[Sequence[object], str]]) -> Self:
        """Return entries with what :attr:`state` told.

        Raises: ForeignFileError for the state of something else.
        """
        kinds = {kind.__name__: kind for kind in (AttentionEntry, RecurrentEntry)}
        names = [name for _, name in state]
        if not kinds.keys() >= {*names}:
            raise ForeignFileError(
                f"a list holds entries of the kinds {', '.join(kinds)}; got {names}. Load files "
                "only as what saved them."
            )
        return cls(*(kinds[name].from_state(own) for own, name in state))

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return type(self)(*(entry.__deepcopy__(memo) for entry in self.entries))
