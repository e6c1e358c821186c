"""Prometheus metrics of a prefix cache, through the official client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvcache.errors import BackendNotAvailableError

from .cache import PrefixCache

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector, CollectorRegistry

COUNTERS = {
    "sessions": "Requests begun",
    "tokens": "Tokens of all prompts",
    "matched": "Prompt tokens reused instead of computed",
    "evictions": "Spans evicted",
}
GAUGES = {
    "active": "Requests open now",
    "nbytes": "Bytes stored",
    "index_nbytes": "Bytes of host memory taken outside the budget",
    "pinned": "Bytes stored and in use by requests",
    "resident": "Bytes stored in the memory of the cache",
    "spans": "Spans stored",
}


def register_metrics(
    prefix: PrefixCache, registry: CollectorRegistry | None = None, name: str = "kvcache_prefix"
) -> Collector:
    """Add the statistics of `prefix` to a Prometheus registry; return their collector.

    registry: of prometheus_client, its default one if None. name: beginning of all metrics' names.

    Raises: BackendNotAvailableError without the package prometheus_client.
    """
    try:
        import prometheus_client
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    except ImportError as error:
        raise BackendNotAvailableError(
            "metrics need prometheus_client. Install it: pip install 'kvcache[metrics]'."
        ) from error

    class StatsCollector:
        def collect(self) -> Iterator[Metric]:
            stats = prefix.stats
            for field, text in COUNTERS.items():
                yield CounterMetricFamily(f"{name}_{field}", text, value=getattr(stats, field))
            for field, text in GAUGES.items():
                yield GaugeMetricFamily(f"{name}_{field}", text, value=getattr(stats, field))

    # Read when it is scraped: the prefix cache pushes nothing.
    collector = StatsCollector()
    (registry or prometheus_client.REGISTRY).register(collector)
    return collector
