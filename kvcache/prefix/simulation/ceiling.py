"""The hits of a policy that knows the hazards `gittins` learns: what its classes can tell."""

from __future__ import annotations

from collections.abc import Iterable

from kvcache.prefix.policies import Gittins
from kvcache.prefix.policies.classes import BLOCK
from kvcache.prefix.policies.returns import Floats, IndexRows, Returns

from .replay import as_requests, replay
from .trace import Request

_WEIGHT = 1
"""Blocks that the hazard of a coarser class counts as, where a finer one was hardly seen."""


class _Observer(Gittins):
    """Counts the whole past alike."""

    def __init__(self) -> None:
        super().__init__()
        self._returns = Returns(fade=1.0)

    def observed(self, now: float) -> Floats:
        """Return the hazards of all requests until `now`."""
        self._tick(now)
        return self._returns.hazard(_WEIGHT * BLOCK / self.position_tokens)


class Informed(Gittins):
    """`gittins` with hazards that it does not learn.

    hazard: requests per second at risk, by class and bucket of age; as :func:`hazard_of` returns.
    """

    def __init__(self, hazard: Floats, seed: int = 0) -> None:
        super().__init__(seed)
        self._index = IndexRows(hazard, ())

    def _tick(self, now: float) -> None:
        """Do nothing: the index stays as it is."""


def hazard_of(requests: Iterable[Request], block_size: int = BLOCK) -> Floats:
    """Return the hazards of all classes over a whole trace.

    Raises: as :func:`~kvcache.prefix.simulation.replay.replay`.
    """
    requests, observer = as_requests(requests), _Observer()
    replay(requests, observer, None, block_size)
    return observer.observed(requests[-1].now if requests else 0.0)
