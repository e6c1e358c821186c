"""Requests that wait for others, which are about to store the same tokens."""

from __future__ import annotations

import numpy as np

from .asked import Asked
from .kept import KeptSpans
from .radix import Tokens
from .requests import Requests
from .session import Request
from .stored import find_hit

_LOOK_SECONDS = 0.05
"""Longest time between two looks: sessions that are dropped, and callers that go, notify nobody."""


def wait_for_others(requests: Requests, kept: KeptSpans, asked: Asked) -> None:
    """Wait while a request at work has tokens of a prompt that are not stored yet.

    Until what it stores makes the hit deeper, it ends, or the deadline passes.
    """
    limit = asked.wait
    if limit is None:
        return
    with requests.lock:
        ids, placements = kept.media_ids.substitute(asked.prompt, asked.places)
        bounds = [(medium.start, medium.stop) for medium in placements]

        def hit() -> tuple[int, int]:
            found = find_hit(kept.follow(asked.salt, ids), ids.size, bounds)
            return found.matched, found.stored

        first, stored = hit()
        matched = first
        while matched == first and not (asked.gone or limit.passed):
            others = requests.at_work(asked.salt)
            if max((_to_come(other, ids) for other in others), default=0) <= stored:
                return
            requests.ended_or_stored.wait(min(limit.left, _LOOK_SECONDS))
            matched, stored = hit()


def _to_come(other: Request, ids: Tokens) -> int:
    """Return how many tokens of a prompt another request has, and is going to store."""
    shared = _shared(other.known.ids, ids)
    return shared if other.dropped is None else min(shared, other.dropped)


def _shared(one: Tokens, other: Tokens) -> int:
    """Return how many tokens of a prompt `other`, but for its last, begin `one` as well."""
    count = min(one.size, other.size - 1)
    parting = np.flatnonzero(one[:count] != other[:count])
    return int(parting[0]) if parting.size else count
