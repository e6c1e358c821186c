"""Recorded requests, read from files in the format of the Mooncake traces."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import BinaryIO, NotRequired, TypedDict, cast

from kvcache._checks import as_room
from kvcache.prefix.arguments import as_finite
from kvcache.prefix.radix import Tokens, as_tokens
from kvcache.storage import schema
from kvcache.storage.reading import open_regular

_LONGEST_LINE = 1 << 24
"""Bytes of a line: a million ids and more. The longest prompt of Mooncake's traces has 2 KB."""
_UNPACKED_RATIO = 64
"""Bytes unpacked of one of a gzipped file. Mooncake's traces have 4; zeros would have 1,000."""
_REQUEST = schema.record(
    {"timestamp": schema.finite, "hash_ids": schema.list_of(schema.any_integer)}
)
_ANSWERED = schema.integer(0, 2**31 - 1)


class _Fields(TypedDict):
    """Fields of a line; others are left out."""

    timestamp: float
    hash_ids: list[int]
    output_length: NotRequired[int]


@dataclass(frozen=True)
class Request:
    """One request of a trace.

    now: seconds. blocks: one number per block of the prompt, the same for the same prefix; int32.
    answered: tokens of the answer, None if that is not known.

    Raises: TypeError, ValueError for a time that is no finite number, blocks that are no list of
        numbers >= 0, or no such number of tokens.
    """

    now: float
    blocks: Tokens
    answered: int | None = None

    def __post_init__(self) -> None:
        blocks = as_tokens(self.blocks)
        if blocks.size and blocks.min() < 0:
            raise ValueError(f"blocks are numbers >= 0; got {blocks.min()}.")
        # Frozen, so not by assignment.
        object.__setattr__(self, "now", as_finite(self.now, "now is in seconds"))
        object.__setattr__(self, "blocks", blocks)
        if self.answered is not None:
            object.__setattr__(self, "answered", as_room(self.answered, "answered"))


def read_trace(path: str | PathLike[str]) -> list[Request]:
    """Read the requests of a file in the format of the Mooncake traces, gzipped or not.

    A line is a JSON object: `timestamp` in milliseconds, which never decreases, and `hash_ids` of
    the prompt's blocks; an id stands for its block and all before it. `output_length`, the tokens
    answered, may be left out. A line has at most 16 MiB, and a gzipped file unpacks to at most 64
    times its size and 16 MiB.

    Raises: ValueError naming the first line of any other form, or a gzipped file that is damaged;
        FileNotFoundError; FileAccessError for no regular file, or one that may not be read.
    """
    with open_regular(path) as file:
        if Path(path).suffix != ".gz":
            return list(_requests(_lines(file, None), path))
        most = _UNPACKED_RATIO * os.fstat(file.fileno()).st_size + _LONGEST_LINE
        try:
            with gzip.GzipFile(fileobj=file) as unpacked:
                return list(_requests(_lines(unpacked, most), path))
        except EOFError:
            raise ValueError(f"a gzipped file is to be whole; {path} ends too early.") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"a gzipped file is to be whole; {path} is damaged: {error}."
            ) from None


def _lines(file: BinaryIO | gzip.GzipFile, most: int | None) -> Iterator[bytes]:
    """Yield the lines of a file, long ones in parts. most: bytes in all; None for any.

    Raises: ValueError for a file that has more.
    """
    done = 0
    while line := file.readline(_LONGEST_LINE + 1):
        done += len(line)
        if most is not None and done > most:
            raise ValueError(
                f"a gzipped file unpacks to at most {_UNPACKED_RATIO} times its size; this one "
                f"is larger than {most} bytes. Unpack it if you trust it."
            )
        yield line


def _requests(lines: Iterable[bytes], path: str | PathLike[str]) -> Iterator[Request]:
    """Yield the request of each line; errors name the line, and `path`."""
    numbers: dict[tuple[int, int], int] = {}
    latest = float("-inf")
    for number, line in enumerate(lines, 1):
        try:
            fields = _fields(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        milliseconds = fields["timestamp"]
        if milliseconds < latest:
            raise ValueError(
                f"{path}, line {number}: requests are in the order of their timestamps; "
                f"got {milliseconds} after {latest}. Sort them."
            )
        latest = milliseconds
        blocks = as_tokens(_numbered(fields["hash_ids"], numbers))
        yield Request(milliseconds / 1000, blocks, fields.get("output_length"))


def _fields(line: bytes) -> _Fields:
    """Return what is known of the request of a line."""
    if len(line) > _LONGEST_LINE:
        raise ValueError(f"a request has at most {_LONGEST_LINE} bytes; this line has more.")
    try:
        record = schema.parse_json(line)
        _REQUEST(record, "request")
        if isinstance(record, dict) and "output_length" in record:
            _ANSWERED(record["output_length"], "request.output_length")
    except schema.SchemaError as error:
        raise ValueError(
            "a request is a JSON object with a finite timestamp in ms and hash_ids, a list of "
            f"integers; got {line.strip()[:80].decode(errors='replace')!r} ({error})."
        ) from None
    return cast(_Fields, record)


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
