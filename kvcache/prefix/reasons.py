"""Reasons why tokens of a prompt were not reused, as ranges, for people and programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .arguments import check_text

Why: TypeAlias = Literal[
    "new",
    "diverged",
    "evicted",
    "no_resume_point",
    "media",
    "other_salt",
    "gated",
    "late",
    "failed",
    "last",
]
"""Why tokens were not reused; :class:`Reason` has the details.

new: never stored, or forgotten since. diverged: behind a position at which other tokens are known.
evicted: stored once. no_resume_point: stored, and a cache could not go on behind them. media: a hit
would have ended inside a medium. other_salt: stored for another salt. gated, late, failed: in a
store, and computing was estimated to be faster, it did not answer in time, or its pages were
damaged or of other caches. last: stored, and left to compute as the next token comes from it.
"""
TEXTS: dict[Why, str] = {
    "new": "new",
    "diverged": "behind a divergence",
    "evicted": "evicted",
    "no_resume_point": "without a resume point",
    "media": "inside media",
    "other_salt": "under another salt",
    "gated": "faster to compute than to fetch",
    "late": "late from the store",
    "failed": "damaged in the store",
    "last": "last, always computed",
}
"""Words for people."""


@dataclass(frozen=True)
class Reason:
    """One reason for the tokens ``[start, stop)`` of a prompt.

    why: see :data:`Why`. position: of "diverged", where the other tokens begin. texts: of
    "diverged", given a decoder, the text around that position in the prompt, and in a stored
    sequence. evicted, policy: of "evicted", seconds of the clock of the prefix cache, and the name
    of the policy that chose; "retention" where all were retained, and the least so went; "quota"
    for that of the salt; "drop_branch" for a branch declared dead. limited_by: of
    "no_resume_point", indices of the caches that could go on least deep. resume_points: of
    "no_resume_point", the nearest positions at which all caches can go on: before it, or 0, and, as
    far as it is known, behind it.
    """

    start: int
    stop: int
    why: Why
    position: int | None = None
    texts: tuple[str, str] | None = None
    evicted: float | None = None
    policy: str | None = None
    limited_by: tuple[int, ...] = ()
    resume_points: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of its tokens."""
        return self.stop - self.start

    def __str__(self) -> str:
        line = f"{self.tokens} {TEXTS[self.why]}"
        return "; ".join([line, *self._details])

    @property
    def _details(self) -> list[str]:
        """Texts of what is known besides."""
        details = []
        if self.position is not None:
            details.append(f"other tokens from position {self.position} on")
        if self.texts is not None:
            prompt, stored = self.texts
            details.append(f"{prompt!r} here, {stored!r} there")
        if self.policy is not None:
            details.append(f"by {self.policy} at {self.evicted:.6g} s")
        if self.limited_by:
            details.append(f"limited by {_listed('cache', self.limited_by)}")
        if self.resume_points:
            details.append(f"nearest {_listed('resume point', self.resume_points)}")
        return details


@dataclass(frozen=True)
class Explanation:
    """Why tokens of a prompt were not reused.

    matched: tokens reused. prompt: tokens of the prompt. reasons: in order, without gaps, for all
    tokens from `matched` on. ``str`` of it is one line, with the tokens by reason.
    """

    matched: int
    prompt: int
    reasons: tuple[Reason, ...]

    @property
    def counts(self) -> dict[Why, int]:
        """Tokens by reason, in the order of the prompt; they add up to those not reused."""
        counts: dict[Why, int] = {}
        for reason in self.reasons:
            counts[reason.why] = counts.get(reason.why, 0) + reason.tokens
        return counts

    def __str__(self) -> str:
        line = f"{self.matched} of {self.prompt} tokens reused"
        counts = [f"{tokens} {TEXTS[why]}" for why, tokens in self.counts.items()]
        return f"{line}: {', '.join(counts)}" if counts else line

    def render(self) -> str:
        """Return one line for the tokens reused, and one for each reason, with its details."""
        width = len(str(self.prompt))
        rows = [(0, self.matched, f"{self.matched} reused")] if self.matched else []
        rows += [(reason.start, reason.stop, str(reason)) for reason in self.reasons]
        return "\n".join(f"[{a:>{width}}, {b:>{width}})  {text}" for a, b, text in rows)


def _listed(noun: str, numbers: tuple[int, ...]) -> str:
    """Return numbers as text behind what they count."""
    plural = "s" if len(numbers) > 1 else ""
    return f"{noun}{plural} {', '.join(map(str, numbers))}"


def decoded(ids: list[int], decode: Callable[[list[int]], str]) -> str:
    """Return the text of token ids; a run of stand-ins for a medium, which are negative, is one.

    Raises: TypeError if `decode` returns no text; what it raises.
    """
    texts, run, medium = [], [], False
    for token in [*ids, None]:
        if token is not None and token >= 0:
            run.append(token)
            medium = False
            continue
        if run:
            text = decode(run)
            check_text(text, "decode returns the text of token ids")
            texts.append(text)
            run = []
        if token is not None and not medium:
            texts.append("<medium>")
            medium = True
    return "".join(texts)
