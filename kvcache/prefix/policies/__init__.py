"""Eviction policies: the choice of a span to give up when the budget is used up.

A policy is given by its name, or as an object of one's own class derived from
:class:`EvictionPolicy`.
"""

from __future__ import annotations

from collections.abc import Callable

from .base import EndedRequest, EvictionPolicy, PolicySpan
from .gittins import Gittins
from .queues import LRU, S3FIFO, Cost, recompute_cost

__all__ = [
    "LRU",
    "POLICIES",
    "S3FIFO",
    "Cost",
    "EndedRequest",
    "EvictionPolicy",
    "Gittins",
    "PolicySpan",
    "make_policy",
    "recompute_cost",
]

POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LRU,
    "s3fifo": S3FIFO,
    "cost": Cost,
    "gittins": Gittins,
}
"""Constructors of the policies, by name."""


def make_policy(policy: str | EvictionPolicy) -> EvictionPolicy:
    """Return a new policy by name, or an object as it is: for one index at a time.

    Raises: ValueError for any other name; TypeError for neither a name nor a policy.
    """
    if isinstance(policy, EvictionPolicy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(
            "a policy is a name or an object of a class derived from "
            f"kvcache.prefix.policies.EvictionPolicy; got {policy!r}."
        )
    if policy not in POLICIES:
        raise ValueError(
            f"there is no policy {policy!r}; take {', '.join(POLICIES)}, or derive one from "
            "kvcache.prefix.policies.EvictionPolicy."
        )
    return POLICIES[policy]()


def policy_name(policy: EvictionPolicy) -> str:
    """Return the name of a policy: that by which it is made, or of its class."""
    names = (name for name, kind in POLICIES.items() if kind is type(policy))
    return next(names, type(policy).__name__)
