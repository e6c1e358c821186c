"""Recorded requests, replayed against a prefix cache of blocks: what a policy would have found."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import takewhile
from os import PathLike
from pathlib import Path
from typing import Any

from kvcache.prefix.index import Span, SpanIndex
from kvcache.prefix.policies import Policy
from kvcache.prefix.radix import RadixTree, Tokens, as_tokens


@dataclass(frozen=True)
class Request:
    """now: seconds. blocks: one number per block of the prompt, the same for the same prefix."""

    now: float
    blocks: Tokens


@dataclass(frozen=True)
class Blocks:
    """A payload of so many blocks, which are not really there."""

    size: int
    resumable_anywhere = True

    def split(self, tokens: int) -> tuple[Blocks, Blocks]:
        """The first, and the others."""
        return Blocks(tokens), Blocks(self.size - tokens)

    def close(self) -> None:
        """Nothing to give up."""


def read_trace(path: str | PathLike[str]) -> list[Request]:
    """The requests of a file in the format of the Mooncake traces, gzipped or not.

    A line is a JSON object: `timestamp` in milliseconds, which never decreases, and `hash_ids` of
    the prompt's blocks; an id stands for its block and all before it.

    Raises: ValueError for what is no such line, and says which; OSError.
    """
    opened = gzip.open if Path(path).suffix == ".gz" else open
    try:
        with opened(path, "rb") as lines:
            return list(_requests(lines, path))
    except EOFError:
        raise ValueError(f"a gzipped file is to be whole; {path} ends too early.") from None


def _requests(lines: Iterable[bytes], path: str | PathLike[str]) -> Iterator[Request]:
    numbers: dict[tuple[int, int], int] = {}
    latest = float("-inf")
    for at, line in enumerate(lines, 1):
        try:
            milliseconds, ids = _fields(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {at}: {error}") from None
        if milliseconds < latest:
            raise ValueError(
                f"{path}, line {at}: requests are in the order of their timestamps; "
                f"got {milliseconds} after {latest}. Sort them."
            )
        latest = milliseconds
        yield Request(milliseconds / 1000, as_tokens(_numbered(ids, numbers)))


def _fields(line: bytes) -> tuple[float, list[int]]:
    """Timestamp and ids of a line."""
    try:
        record: Any = json.loads(line)
        milliseconds, ids = record["timestamp"], record["hash_ids"]
        good = isinstance(milliseconds, int | float) and all(type(each) is int for each in ids)
    except (ValueError, TypeError, KeyError):
        good = False
    if not good:
        raise ValueError(
            "a request is a JSON object with a timestamp in ms and hash_ids, a list of integers; "
            f"got {line.strip()[:80].decode(errors='replace')!r}."
        )
    return milliseconds, ids


def _numbered(ids: list[int], numbers: dict[tuple[int, int], int]) -> list[int]:
    """Small numbers for ids of any size; of its own wherever an id has another history."""
    blocks: list[int] = []
    for each in ids:
        key = blocks[-1] if blocks else -1, each
        blocks.append(numbers.setdefault(key, len(numbers)))
    return blocks


def replay(
    requests: Iterable[Request], policy: Policy, budget: int | None
) -> tuple[int, SpanIndex[Blocks]]:
    """Blocks found, of the beginnings of all requests, and the index as it is in the end.

    budget: blocks that are kept between requests, None for no limit.
    """
    tree: RadixTree[Span[Blocks]] = RadixTree()
    index: SpanIndex[Blocks] = SpanIndex(policy, budget, grain=1)
    return sum(_served(request, tree, index) for request in requests), index


def _served(request: Request, tree: RadixTree[Span[Blocks]], index: SpanIndex[Blocks]) -> int:
    spans = index.extend(tree, request.blocks)
    kept = [span.payload is not None for span in spans]
    found = spans[kept.index(False)].start if False in kept else request.blocks.size
    index.use(spans, request.now)
    for span in spans:
        if span.payload is None:
            index.fill(span, Blocks(span.stop - span.start))
    index.trim(request.now)
    return found


def optimum(requests: Sequence[Request], budget: int) -> int:
    """Blocks that no policy can find more of: it knows the future (Belady, 1966).

    Of what is kept, that goes first which is asked for again last, or never; of what is asked for
    at once, the end. So a block never stays without those before it.
    """
    kept: set[int] = set()
    queue: list[tuple[int, int, int]] = []
    found = 0
    for request, coming in zip(requests, _coming(requests), strict=True):
        found += sum(1 for _ in takewhile(kept.__contains__, request.blocks.tolist()))
        for place, (block, next_use) in enumerate(coming.items()):
            kept.discard(block)
            if next_use is not None:
                kept.add(block)
                heappush(queue, (-next_use, -place, block))
        while len(kept) > budget:
            # What is left in the queue of earlier uses is behind all that is still to come.
            kept.remove(heappop(queue)[2])
    return found


def _coming(requests: Sequence[Request]) -> list[dict[int, int | None]]:
    """For each request, by block, the number of the next request for it."""
    coming: list[dict[int, int | None]] = []
    following: dict[int, int] = {}
    for at in range(len(requests) - 1, -1, -1):
        blocks = requests[at].blocks.tolist()
        coming.append({block: following.get(block) for block in blocks})
        following.update(dict.fromkeys(blocks, at))
    return coming[::-1]


def ever(requests: Iterable[Request]) -> int:
    """Blocks that a cache without limit finds."""
    seen: set[int] = set()
    found = 0
    for request in requests:
        blocks = request.blocks.tolist()
        found += sum(block in seen for block in blocks)
        seen.update(blocks)
    return found
