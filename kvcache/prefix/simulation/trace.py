"""Recorded requests, read from files in the format of the Mooncake traces."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from kvcache.prefix.arguments import as_finite
from kvcache.prefix.radix import Tokens, as_tokens


@dataclass(frozen=True)
class Request:
    """One request of a trace.

    now: seconds. blocks: one number per block of the prompt, the same for the same prefix; int32.

    Raises: TypeError, ValueError for a time that is no finite number, or blocks that are no list
        of numbers >= 0.
    """

    now: float
    blocks: Tokens

    def __post_init__(self) -> None:
        blocks = as_tokens(self.blocks)
        if blocks.size and blocks.min() < 0:
            raise ValueError(f"blocks are numbers >= 0; got {blocks.min()}.")
        # Frozen, so not by assignment.
        object.__setattr__(self, "now", as_finite(self.now, "now is in seconds"))
        object.__setattr__(self, "blocks", blocks)


def read_trace(path: str | PathLike[str]) -> list[Request]:
    """Read the requests of a file in the format of the Mooncake traces, gzipped or not.

    A line is a JSON object: `timestamp` in milliseconds, which never decreases, and `hash_ids` of
    the prompt's blocks; an id stands for its block and all before it.

    Raises: ValueError naming the first line of any other form; OSError.
    """
    open_file = gzip.open if Path(path).suffix == ".gz" else open
    try:
        with open_file(path, "rb") as lines:
            return list(_requests(lines, path))
    except EOFError:
        raise ValueError(f"a gzipped file is to be whole; {path} ends too early.") from None


def _requests(lines: Iterable[bytes], path: str | PathLike[str]) -> Iterator[Request]:
    """Yield the request of each line; errors name the line, and `path`."""
    numbers: dict[tuple[int, int], int] = {}
    latest = float("-inf")
    for number, line in enumerate(lines, 1):
        try:
            milliseconds, ids = _fields(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if milliseconds < latest:
            raise ValueError(
                f"{path}, line {number}: requests are in the order of their timestamps; "
                f"got {milliseconds} after {latest}. Sort them."
            )
        latest = milliseconds
        yield Request(milliseconds / 1000, as_tokens(_numbered(ids, numbers)))


def _fields(line: bytes) -> tuple[float, list[int]]:
    """Return timestamp and ids of a line."""
    try:
        record = json.loads(line)
        milliseconds, ids = record["timestamp"], record["hash_ids"]
        # type(), not isinstance(): true and false are no ids, though Python takes them for 1 and 0.
        good = type(ids) is list and all(type(block) is int for block in ids)
        # JSON of Python knows NaN and numbers of any size.
        good = good and type(milliseconds) in {int, float} and math.isfinite(milliseconds)
    except (ValueError, TypeError, KeyError, OverflowError):
        good = False
    if not good:
        raise ValueError(
            "a request is a JSON object with a finite timestamp in ms and hash_ids, a list of "
            f"integers; got {line.strip()[:80].decode(errors='replace')!r}."
        )
    return milliseconds, ids


def _numbered(ids: list[int], numbers: dict[tuple[int, int], int]) -> list[int]:
    """Return small numbers for ids of any size, another wherever an id has another history.

    Ids of a trace may exceed int32; and the bounds of a replay know a block by its number alone,
    without the blocks before it. numbers: by the number of the block before and the id; extended.
    """
    blocks: list[int] = []
    for block in ids:
        key = blocks[-1] if blocks else -1, block
        blocks.append(numbers.setdefault(key, len(numbers)))
    return blocks
