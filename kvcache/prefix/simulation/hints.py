"""Hints which prompts return, some of them wrong: what the word of an application is worth."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvcache.prefix.radix import Tokens

from .trace import Request

RETAIN = 1, 600.0
"""Priority, and seconds: applications know that a user goes on, not when."""


def whole_blocks(request: Request) -> Tokens:
    """Return all blocks of a prompt but its last, which is seldom full; an only one as well."""
    return request.blocks[: max(1, request.blocks.size - 1)]


def hints_of(requests: Sequence[Request], wrong: float, seed: int = 0) -> list[bool]:
    """Return for each request whether its prompt is said to return.

    A prompt returns if a later one begins with all its whole blocks. wrong: probability that a hint
    says the opposite, of prompts that return and of others alike.
    """
    chance = random.Random(seed)  # noqa: S311 - a simulation, no secret
    return [returns != (chance.random() < wrong) for returns in _returning(requests)]


def _returning(requests: Sequence[Request]) -> list[bool]:
    returning: list[bool] = []
    upcoming: set[int] = set()
    for request in reversed(requests):
        # A block stands for all before it.
        returning.append(upcoming.issuperset(whole_blocks(request)[-1:].tolist()))
        upcoming.update(request.blocks.tolist())
    return returning[::-1]
