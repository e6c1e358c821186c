"""Arguments of a session, checked before anything changes."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from kvcache._checks import NO_LIMIT
from kvcache.stores.outcomes import Deadline

from .arguments import as_finite, as_positions, check_deadline
from .known import checked_prompt
from .media import Media
from .radix import Tokens
from .retention import Retain, RetainedRange, as_retained


class SessionOptions(TypedDict, total=False):
    """Options of :meth:`PrefixCache.session`."""

    salt: str
    media: Media | None
    resume_points: Iterable[int]
    deadline: Deadline | None
    keep_on_error: bool
    wait: Deadline | float | None
    retain: Retain | None


@dataclass
class Asked:
    """Arguments of :meth:`PrefixCache.session`, checked.

    prompt: owned, read-only. places: its media. gone: True once nobody waits for the session.
    """

    prompt: Tokens
    places: Media
    salt: str
    points: list[int]
    deadline: Deadline | None
    keep_on_error: bool
    wait: Deadline | None
    retain: tuple[RetainedRange, ...]
    gone: bool = False


def as_asked(
    tokens: Sequence[int] | Tokens,
    *,
    salt: str = "",
    media: Media | None = None,
    resume_points: Iterable[int] = (),
    deadline: Deadline | None = None,
    keep_on_error: bool = True,
    wait: Deadline | float | None = None,
    retain: Retain | None = None,
) -> Asked:
    """Return the arguments of a session. Raises: as :meth:`PrefixCache.session`."""
    prompt, places = checked_prompt(tokens, salt, media)
    retained = as_retained(retain)
    # The ends of what is retained, or nobody could go on behind it where a window drops tokens.
    ends = [span.stop for span in retained if span.stop < NO_LIMIT]
    points = [*as_positions(resume_points, "resume_points"), *ends]
    check_deadline(deadline)
    if not isinstance(keep_on_error, bool):
        raise TypeError(
            "keep_on_error tells whether a session left by an exception stores its tokens, True "
            f"or False; got {reprlib.repr(keep_on_error)}."
        )
    limit = _as_wait(wait)
    return Asked(prompt, places, salt, points, deadline, keep_on_error, limit, retained)


def _as_wait(wait: Deadline | float | None) -> Deadline | None:
    if wait is None or isinstance(wait, Deadline):
        return wait
    rule = "a session waits for another until a kvcache.stores.Deadline, or for seconds"
    return Deadline.after(as_finite(wait, rule))
