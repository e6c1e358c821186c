"""Streams: passes through one network, kept apart by name or by number."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from kvcache.backends import Array, backend_of, nbytes
from kvcache.errors import DiffusionCacheError, UnknownStreamError

Stream: TypeAlias = int | str


class Streams:
    """The streams of a cache: names as they are given, or the numbers below a count.

    Raises: DiffusionCacheError for no stream, or two of one name; TypeError for a string.
    """

    def __init__(self, streams: int | Sequence[str]) -> None:
        # A string would pass for names of one letter each.
        if isinstance(streams, str):
            raise TypeError(f"streams are a number or names; got one string: write ({streams!r},).")
        self.names: tuple[int, ...] | tuple[str, ...]
        if isinstance(streams, Sequence):
            self.names = tuple(streams)
        else:
            self.names = tuple(range(operator.index(streams)))
        if not self.names or len(set(self.names)) < len(self.names):
            raise DiffusionCacheError(
                f"there is at least one stream, each of another name; got {streams!r}."
            )
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def number(self, stream: Stream) -> int:
        """Return the number of `stream`, given by name or number.

        Raises: UnknownStreamError.
        """
        # operator.index refuses 1.5, of which int() would make 1.
        number = self._numbers.get(stream) if isinstance(stream, str) else operator.index(stream)
        if number is None or not 0 <= number < len(self):
            known = ", ".join(map(repr, self.names))
            raise UnknownStreamError(
                f"a stream is one of {known}, or its number from 0 on; got {stream!r}. "
                "Say which there are when making the cache, with streams=... Nothing was changed."
            )
        return number


def distinct(arrays: Iterable[Array | None]) -> list[Array]:
    """Return every array once, by identity, without None."""
    # Arrays have no hash, and == compares their elements.
    return list({id(array): array for array in arrays if array is not None}.values())


def bytes_of(array: Array) -> int:
    """Return the bytes of an array; a view counts its own elements.

    Raises: UnknownBackendError, DTypeError for an array that neither has ``nbytes`` nor is of a
    framework and dtype that kvcache knows.
    """
    # The array's own word first: it has dtypes that kvcache never writes, such as int64.
    own = getattr(array, "nbytes", None)
    if own is not None:
        return int(own)
    name = backend_of(array).dtype_name(array)
    return nbytes(array.shape, name)
