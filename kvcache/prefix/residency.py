"""How long spans stay, and wait to be used again: histograms, as vLLM has of its blocks."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import Any

from .spans import Span

BUCKETS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0),
)
"""Upper bounds in seconds, those of vLLM; the last bucket has none."""


class Histogram:
    """Numbers of seconds, counted by size. total: sum of all of them."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one number."""
        self._counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """Return how many were no larger than each bound, by its text, and the sum of all.

        The last bound is infinity, as in the format of Prometheus.
        """
        bounds = [*map(str, BUCKETS), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True)), self.total


class Residency:
    """Histograms of stored spans, in seconds of the clock of their prefix cache.

    lifetime: from when a span was stored until it was evicted. idle: from its last use until then.
    reuse_gap: between two uses of it, the first of which stored it.
    """

    def __init__(self) -> None:
        self.lifetime, self.idle, self.reuse_gap = Histogram(), Histogram(), Histogram()

    def use(self, span: Span[Any], now: float) -> None:
        """Observe a use; call it before the span knows of it."""
        if span.payload is not None:
            self.reuse_gap.observe(now - span.used)

    def evict(self, span: Span[Any], now: float) -> None:
        """Observe an eviction."""
        self.lifetime.observe(now - span.born)
        self.idle.observe(now - span.used)
