"""Replay of recorded requests: the hits of a policy, and upper bounds for all policies."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count, pairwise, takewhile
from typing import TypeAlias

from kvcache._checks import as_budget, as_sizes
from kvcache.prefix.arguments import as_list
from kvcache.prefix.index import SpanIndex
from kvcache.prefix.policies import EndedRequest, EvictionPolicy
from kvcache.prefix.policies.classes import BLOCK
from kvcache.prefix.radix import RadixTree
from kvcache.prefix.spans import Span

from .hints import RETAIN, whole_blocks
from .trace import Request

_SPEED = 50.0
"""Tokens answered per second: a trace tells when a request came, not when it ended."""


@dataclass(frozen=True)
class BlockPayload:
    """A payload of blocks without data.

    nbytes: the number of blocks. A replay has its budget in blocks, so each counts as one byte.
    """

    nbytes: int
    overhead = 0
    resumable_anywhere = resumable_inside = True

    def split(self, tokens: int) -> tuple[BlockPayload, BlockPayload]:
        """Return the first `tokens` blocks and the others: in a replay, a token is a block."""
        return BlockPayload(tokens), BlockPayload(self.nbytes - tokens)

    def joins(self, following: BlockPayload) -> bool:
        """Return True: blocks have no place."""
        return True

    def join(self, following: Sequence[BlockPayload]) -> BlockPayload:
        """Return all blocks as one payload."""
        return BlockPayload(self.nbytes + sum(payload.nbytes for payload in following))

    def reduced(self, position: int) -> None:
        """Return None: a request may end behind any block, so all are needed."""

    def thinned(self, nbytes: int) -> None:
        """Return None: a request may end behind any block."""

    def cut(self, nbytes: int) -> None:
        """Return None: the index cuts it where it likes."""

    def close(self) -> None:
        """Do nothing: there is no data to release."""


def as_requests(requests: object) -> list[Request]:
    """Return recorded requests as a list.

    Raises: TypeError for anything else, ValueError unless their times never decrease.
    """
    listed: list[Request] = []
    for request in as_list(requests):
        if not isinstance(request, Request):
            raise TypeError(
                "a replay is of a list of requests, as read_trace returns; "
                f"got {reprlib.repr(request)}."
            )
        listed.append(request)
    for number, (request, later) in enumerate(pairwise(listed), 1):
        if later.now < request.now:
            raise ValueError(
                f"requests are in the order of their times; got {later.now} s after "
                f"{request.now} s, as number {number}. Sort them."
            )
    return listed


BlockTree: TypeAlias = RadixTree[Span[BlockPayload]]


def replay(
    requests: Iterable[Request],
    policy: EvictionPolicy,
    budget: int | None,
    block_size: int = BLOCK,
    hints: Sequence[bool] | None = None,
) -> tuple[int, SpanIndex[BlockPayload]]:
    """Count the blocks found at the beginnings of all requests; return the final index as well.

    budget: blocks kept between requests, None for no limit. block_size: tokens of a block. hints:
    for each request whether its prompt is said to return, and so to be retained for ten minutes;
    None for no hints.

    The policy is told of the end of a request when the answer is complete, at 50 tokens per second;
    never where the trace does not tell how long it was.

    Raises: TypeError, ValueError for anything but requests in the order of their time, a policy,
        such a budget and block size, and a hint for each request; nothing was replayed then.
    """
    requests, budget = as_requests(requests), as_budget(budget, "blocks")
    retained = [False] * len(requests) if hints is None else list(map(bool, as_list(hints)))
    if len(retained) != len(requests):
        raise ValueError(
            f"hints are one for each request; got {len(retained)} for {len(requests)} requests."
        )
    [block_size] = as_sizes(block_size=block_size)
    if not isinstance(policy, EvictionPolicy):
        raise TypeError(f"a replay is of one policy, by make_policy(name); got {policy!r}.")
    policy.position_tokens = block_size
    tree: BlockTree = RadixTree()
    # The grain of prefix caches is in tokens, of which a block has many: here every block counts.
    index: SpanIndex[BlockPayload] = SpanIndex(policy, budget, grain=1)
    hits, ends = 0, Ends(tree, index)
    for request, retain in zip(requests, retained, strict=True):
        ends.tell(request.now)
        hits += _serve(request, tree, index, retain)
        ends.add(request)
    return hits, index


class Ends:
    """Requests under way, of whose ends the policy of an index is told in their order."""

    def __init__(self, tree: BlockTree, index: SpanIndex[BlockPayload]) -> None:
        self._tree, self._index = tree, index
        self._order = count()  # decides between equal times: requests cannot be compared
        self._ends: list[tuple[float, int, Request, int]] = []

    def add(self, request: Request) -> None:
        """Take up a request that was served, unless nothing is known of its answer."""
        answered = request.answered
        if answered is not None:
            end = request.now + answered / _SPEED
            heappush(self._ends, (end, next(self._order), request, answered))

    def tell(self, now: float) -> None:
        """Tell of all ends until now."""
        while self._ends and self._ends[0][0] <= now:
            end, _, request, answered = heappop(self._ends)
            spans = self._index.follow(self._tree, request.blocks).spans
            ended = EndedRequest(spans, request.blocks.size, answered, [request.now])
            self._index.policy.ended(ended, end)


def _serve(request: Request, tree: BlockTree, index: SpanIndex[BlockPayload], retain: bool) -> int:
    """Return the blocks found for a request; then keep all of its blocks, as the budget allows.

    retain: whether its whole blocks shall stay before those of others.
    """
    spans = index.extend(tree, request.blocks)
    kept = [span.payload is not None for span in spans]
    hits = spans[kept.index(False)].start if False in kept else request.blocks.size
    index.use(spans, request.now)
    for span in spans:
        if span.payload is None:
            index.fill(span, BlockPayload(span.stop - span.start))
    if retain:
        index.retain(index.extend(tree, whole_blocks(request)), *RETAIN, request.now)
    index.trim(request.now)
    return hits


def optimum(requests: Iterable[Request], budget: int | None) -> int:
    """Count the blocks found by a policy with knowledge of the future (Belady, 1966).

    No policy finds more. It evicts the block requested again last, or never; of blocks requested
    again together, the last of the prompt. So a block never stays without those before it.

    Raises: as :func:`replay`.
    """
    requests, room = as_requests(requests), as_budget(budget, "blocks")
    if room is None:
        return found_without_limit(requests)
    kept: set[int] = set()
    queue: list[tuple[int, int, int]] = []
    hits = 0
    for request, next_uses in zip(requests, _next_uses(requests), strict=True):
        hits += sum(1 for _ in takewhile(kept.__contains__, request.blocks.tolist()))
        for place, (block, next_use) in enumerate(next_uses.items()):
            kept.discard(block)
            if next_use is not None:
                kept.add(block)
                heappush(queue, (-next_use, -place, block))
        while len(kept) > room:
            # Entries of uses past by now are still queued, but sort behind all uses to come.
            kept.remove(heappop(queue)[2])
    return hits


def _next_uses(requests: Sequence[Request]) -> list[dict[int, int | None]]:
    """Return for each request, by block, the number of the next request for the block."""
    next_uses: list[dict[int, int | None]] = []
    upcoming: dict[int, int] = {}
    for number in range(len(requests) - 1, -1, -1):
        blocks = requests[number].blocks.tolist()
        next_uses.append({block: upcoming.get(block) for block in blocks})
        upcoming.update(dict.fromkeys(blocks, number))
    return next_uses[::-1]


def found_without_limit(requests: Iterable[Request]) -> int:
    """Count the blocks found by a cache of unlimited size: all requested before."""
    seen: set[int] = set()
    hits = 0
    for request in as_requests(requests):
        blocks = request.blocks.tolist()
        hits += sum(block in seen for block in blocks)
        seen.update(blocks)
    return hits
