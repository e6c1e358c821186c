"""Which span goes first when the budget is used up.

A policy is given by its name, or as an object of one's own class derived from :class:`Policy`.
"""

from __future__ import annotations

from collections.abc import Callable

from .base import Policy
from .gittins import Gittins
from .queues import LRU, S3FIFO, Cost, recompute_cost

__all__ = ["LRU", "POLICIES", "S3FIFO", "Cost", "Gittins", "Policy", "policy", "recompute_cost"]

POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": LRU,
    "s3fifo": S3FIFO,
    "cost": Cost,
    "gittins": Gittins,
}
"""What makes a policy, by its name."""


def policy(given: str | Policy) -> Policy:
    """A new policy of that name; an object as it is, for one index at a time.

    Raises: ValueError for any other name; TypeError for what is neither.
    """
    if isinstance(given, Policy):
        return given
    if not isinstance(given, str):
        raise TypeError(
            "a policy is a name or an object of a class derived from kvcache.prefix.policies.Policy"
            f"; got {given!r}."
        )
    if given not in POLICIES:
        raise ValueError(
            f"there is no policy {given!r}; take {', '.join(POLICIES)}, or derive one from "
            "kvcache.prefix.policies.Policy."
        )
    return POLICIES[given]()
