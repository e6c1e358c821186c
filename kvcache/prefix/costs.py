"""The cost gate: whether fetching tokens from a store beats computing them, as measured."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

_WEIGHT = 0.3
"""Share of the latest measurement in a mean: about five of them count."""
_FRESH_SECONDS = 30.0
"""Age at which the speed of a store is measured anew, so that one slow moment closes nothing."""


class Mean:
    """A moving mean of measurements, None before the first one."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        """Count one more measurement."""
        before = self.value
        self.value = value if before is None else (1 - _WEIGHT) * before + _WEIGHT * value


@dataclass(frozen=True)
class Costs:
    """Measured costs of fetching and computing; None for not yet."""

    bytes_per_second: float | None
    seconds_per_token: float | None


class CostGate:
    """Measured speed of one store and of one model, and the choice between the two.

    Where a figure is missing, or that of the store is old, fetching is worth a try: it measures.
    """

    def __init__(self) -> None:
        self._seconds_per_byte, self._seconds_per_token = Mean(), Mean()
        self._page_nbytes, self._state_nbytes = Mean(), Mean()
        self._measured = -math.inf

    @property
    def costs(self) -> Costs:
        """The figures of this moment."""
        seconds = self._seconds_per_byte.value
        return Costs(1 / seconds if seconds else None, self._seconds_per_token.value)

    def note_sizes(self, nbytes: int, *, state: bool) -> None:
        """Count the size of a page, or of a state."""
        (self._state_nbytes if state else self._page_nbytes).add(nbytes)

    def note_transfer(self, nbytes: int, seconds: float) -> None:
        """Count a read of so many bytes."""
        if nbytes:
            self._seconds_per_byte.add(max(seconds, 1e-9) / nbytes)
            self._measured = time.monotonic()

    def note_computed(self, tokens: int, seconds: float) -> None:
        """Count a prompt of which so many tokens were computed."""
        if tokens > 0 and seconds > 0:
            self._seconds_per_token.add(seconds / tokens)

    def seconds_to_fetch(self, pages: int, states: int) -> float | None:
        """Return the estimated time of a transfer; None if it is not known."""
        speed = self._seconds_per_byte.value
        if speed is None or time.monotonic() - self._measured > _FRESH_SECONDS:
            return None
        nbytes = 0.0
        for count, mean in ((pages, self._page_nbytes), (states, self._state_nbytes)):
            if count and mean.value is None:
                return None
            nbytes += count * (mean.value or 0.0)
        return nbytes * speed

    def pays(self, tokens: int, pages: int, states: int) -> bool:
        """Return whether fetching so many pages and states beats computing their `tokens`."""
        fetching, computing = self.seconds_to_fetch(pages, states), self._seconds_per_token.value
        return fetching is None or computing is None or fetching < tokens * computing

    def pages_within(self, seconds: float, pages: int) -> int:
        """Return how many of so many `pages` are expected to come within a time."""
        one = self.seconds_to_fetch(1, 0)
        return pages if not one or seconds == math.inf else min(pages, int(seconds / one))
