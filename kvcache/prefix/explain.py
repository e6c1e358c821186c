"""Why tokens of a prompt were not reused: noted when a session begins, worked out when asked."""

from __future__ import annotations

import reprlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from kvcache._interrupts import uninterrupted
from kvcache.snapshots.resuming import last_resumable

from .policies import policy_name
from .radix import Node, Tokens
from .reasons import Explanation, Reason, Why, decoded
from .spans import EvictedBy, chooser
from .stored import Search, StoredPrefix, StoredSpan, contiguous_snapshots

if TYPE_CHECKING:
    from .kept import KeptSpans
    from .session import Request

_CONTEXT = 8
"""Tokens shown before a divergence, and behind it."""


Evicted: TypeAlias = list[tuple[int, int, float | None, EvictedBy | None]]
"""Ranges of spans without a payload, with the time of their eviction, and who chose them; None if
they never were."""
Noted: TypeAlias = tuple[
    "KeptSpans", Tokens, StoredPrefix, Search, Evicted | None, Node[StoredSpan] | None
]
"""How a session began: what :class:`Beginning` is made of, once somebody asks."""


def note(kept: KeptSpans, ids: Tokens, prefix: StoredPrefix, search: Search) -> Noted:
    """Return how a session on the prompt `ids` begins, of which `prefix` is known.

    Every session pays for this, and few are asked. So it is a tuple of references, and takes down
    only what the next request may change: ghosts, and the branch added last behind the prefix.
    """
    spans = prefix.spans
    if not spans:
        return kept, ids, prefix, search, None, None
    last = spans[-1]
    evicted = _evicted_behind(search.hit.stored, spans) if last.payload is None else None
    children = last.node.children
    # The newest of several, as there may be thousands behind instructions that all share.
    branch = next(reversed(children.values())) if children else None
    return kept, ids, prefix, search, evicted, branch


def _evicted_behind(stored: int, spans: list[StoredSpan]) -> Evicted:
    """Return those of `spans` that end behind all that is stored."""
    return [
        (span.start, span.stop, span.evicted, span.evicted_by)
        for span in spans
        if span.stop > stored
    ]


class Beginning(NamedTuple):
    """How a session began: references, to be read under the lock of its prefix cache.

    kept: spans of that. ids: of the prompt. length: those known. evicted: ranges of them behind all
    that is stored. branch: other tokens known at `length`.
    """

    kept: KeptSpans
    ids: Tokens
    salt: str
    length: int
    search: Search
    evicted: Evicted
    branch: Node[StoredSpan] | None


def _beginning(noted: Noted, salt: str) -> Beginning:
    kept, ids, (spans, length), search, evicted, branch = noted
    if length == ids.size:
        branch = None
    elif spans and length < spans[-1].node.depth:  # inside of the last span, or of what it was
        branch = spans[-1].node
    return Beginning(kept, ids, salt, length, search, evicted or [], branch)


def explain(
    request: Request,
    lock: threading.RLock,
    decode: Callable[[list[int]], str] | None,
    *,
    other_salts: bool,
) -> Explanation:
    """Do :meth:`Session.explain`; count its reasons the first time."""
    if decode is not None and not callable(decode):
        raise TypeError(f"decode is a function from a list of token ids to text; got {decode!r}.")
    if not isinstance(other_salts, bool):
        raise TypeError(
            "other_salts tells whether to look for tokens under other salts, True or False; got "
            f"{reprlib.repr(other_salts)}."
        )
    with lock:
        noted = _beginning(request.noted, request.known.salt)
        reasons = _of_store(_of_memory(noted), request.lacks)
        if other_salts:
            reasons = _of_others(reasons, _known_elsewhere(noted))
        merged = _merged(reasons)
        sides = _sides(noted)
    if decode is not None and sides is not None:
        prompt, stored = (decoded(side, decode) for side in sides)
        merged = [
            replace(reason, texts=(prompt, stored)) if reason.why == "diverged" else reason
            for reason in merged
        ]
    explanation = Explanation(noted.search.hit.matched, noted.ids.size, tuple(merged))
    with lock, uninterrupted():  # last: `decode` may raise
        if not request.explained:
            request.explained = True
            noted.kept.explained.update(explanation.counts)
    return explanation


def _of_memory(noted: Beginning) -> Iterator[Reason]:
    """Yield the reasons by what was in memory."""
    hit, size, length = noted.search.hit, noted.ids.size, noted.length
    yield from _between_stops(noted)
    if hit.stored == size:
        yield Reason(size - 1, size, "last")
    for begin, end, evicted, by in noted.evicted:
        start, stop = max(begin, hit.stored), min(end, length)
        if evicted is None:
            yield Reason(start, stop, "new")
        else:
            policy = chooser(by, policy_name(noted.kept.index.policy))
            yield Reason(start, stop, "evicted", evicted=evicted, policy=policy)
    if length < size and noted.branch is not None:
        yield Reason(length, size, "diverged", position=length)
    elif length < size:
        yield Reason(length, size, "new")


def _between_stops(noted: Beginning) -> Iterator[Reason]:
    """Yield the reasons for tokens that were stored, the last one of the prompt left out."""
    hit, stops, span = noted.search
    position = hit.matched
    for limit, length in reversed(stops):
        if position < length:
            yield Reason(position, length, "media")
        if length < limit:
            first = limit == stops[0][0]
            points = (length, *_next_resume_point(span, limit)) if first else (length,)
            limited_by = hit.limited_by if first else ()
            yield Reason(
                length, limit, "no_resume_point", limited_by=limited_by, resume_points=points
            )
        position = limit


def _next_resume_point(span: StoredSpan | None, limit: int) -> tuple[int, ...]:
    """Return the first resume point behind `limit` in a span, if it is still stored."""
    if span is None or span.payload is None or span.node.value is not span:
        return ()
    path = span.path
    snapshots = contiguous_snapshots(path, path)
    nearest: tuple[int, ...] = ()
    position = last_resumable(snapshots, span.stop)
    while position > limit:
        nearest, position = (position,), last_resumable(snapshots, position - 1)
    return nearest


def _of_store(reasons: Iterable[Reason], lacks: dict[int, Why]) -> Iterator[Reason]:
    """Yield `reasons`, with those of a store for tokens that were not in memory."""
    stops = sorted(lacks)
    for reason in reasons:
        start = reason.start
        if reason.why in ("new", "diverged", "evicted"):
            for stop in stops:
                if start < min(stop, reason.stop):
                    yield Reason(start, min(stop, reason.stop), lacks[stop])
                    start = min(stop, reason.stop)
        if start < reason.stop:
            yield replace(reason, start=start)


def _of_others(reasons: Iterable[Reason], length: int) -> Iterator[Reason]:
    """Yield `reasons`, but for new tokens among the first `length`, known under another salt."""
    for reason in reasons:
        start = reason.start
        if reason.why in ("new", "diverged") and start < length:
            start = min(length, reason.stop)
            yield Reason(reason.start, start, "other_salt")
        if start < reason.stop:
            yield replace(reason, start=start)


def _known_elsewhere(noted: Beginning) -> int:
    """Return how many tokens of the prompt are stored at most under another salt."""
    # Stand-ins of media of a session that has ended may be those of others.
    media = noted.ids < 0
    ids = noted.ids[: media.argmax()] if media.any() else noted.ids
    longest = 0
    for salt in noted.kept.trees:
        if salt != noted.salt:
            spans, length = noted.kept.follow(salt, ids)
            stops = [span.stop for span in spans if span.payload is not None]
            longest = max(longest, min(length, *stops[-1:]) if stops else 0)
    return longest


def _merged(reasons: Iterable[Reason]) -> list[Reason]:
    """Return `reasons`, equal ones next to each other as one."""
    merged: list[Reason] = []
    for reason in reasons:
        if merged and replace(merged[-1], start=reason.start, stop=reason.stop) == reason:
            merged[-1] = replace(merged[-1], stop=reason.stop)
        else:
            merged.append(reason)
    return merged


def _sides(noted: Beginning) -> tuple[list[int], list[int]] | None:
    """Return the ids around a divergence: of the prompt, and of the sequence known."""
    if noted.branch is None:
        return None
    position, ids = noted.length, noted.ids
    before = ids[max(0, position - _CONTEXT) : position].tolist()
    other = _ids_below(noted.branch, position)
    return before + ids[position : position + _CONTEXT].tolist(), before + other


def _ids_below(node: Node[StoredSpan], position: int) -> list[int]:
    """Return a few ids from `position` on, on the way to `node`, which may have been split."""
    ids: list[int] = node.tokens.tolist()
    while node.depth - node.tokens.size > position and node.parent is not None:
        node = node.parent
        ids = node.tokens.tolist() + ids
    start = node.depth - node.tokens.size
    return ids[position - start :][:_CONTEXT]
