"""Marks of spans in drawings: why requests compute their tokens although these are known."""

from __future__ import annotations

from typing import NamedTuple

from .spans import chooser
from .stored import StoredSpan, last_resume_points

_POINTS = 3
"""Resume points that a line names at most."""


class Mark(NamedTuple):
    """A sign in front of a span, and its meaning in the legend. style: of rich."""

    sign: str
    style: str
    meaning: str


EVICTED = Mark("✗", "red", "evicted: computed again, or fetched from a store")
NOT_STORED = Mark("○", "dim", "known, and never stored: computed")
LIMITED = Mark("◐", "yellow", "stored, and requests can go on at its resume points only")


def mark_of(span: StoredSpan) -> Mark | None:
    """Return the mark of a span; None for one of which any beginning is reused."""
    if span.payload is None:
        return NOT_STORED if span.evicted is None else EVICTED
    return None if span.payload.resumable_anywhere else LIMITED


def details_of(span: StoredSpan, policy: str) -> list[str]:
    """Return what is known of the reason, as texts. policy: name of the one that evicts."""
    details = []
    if span.payload is None:
        by, told = chooser(span.evicted_by, policy), span.evicted is not None
        details.append(f"evicted by {by} at {span.evicted:.6g} s" if told else "not stored")
    elif not span.payload.resumable_anywhere:
        parts = enumerate(span.payload.snapshot.parts)
        limits = [n for n, part in parts if not part.spec.visibility.resumable_anywhere]
        caches = "caches" if len(limits) > 1 else "cache"
        details += [_points(span), f"limited by {caches} {', '.join(map(str, limits))}"]
    for medium in span.media:
        details.append(f"no hit ends inside of [{medium.start}, {medium.stop})")
    return details


def _points(span: StoredSpan) -> str:
    """Return the last resume points in a span, as text."""
    points = last_resume_points(span, _POINTS + 1)
    if not points:
        return "no resume point"
    more = "… " if len(points) > _POINTS else ""
    plural = "s" if len(points) > 1 else ""
    return f"resume point{plural} {more}{', '.join(map(str, points[-_POINTS:]))}"
