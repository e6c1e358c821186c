"""Prometheus metrics of a prefix cache, through the official client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvcache.errors import BackendNotAvailableError

if TYPE_CHECKING:
    from .cache import PrefixCache

COUNTERS = {
    "sessions": "Requests that were begun",
    "tokens": "Tokens of all prompts",
    "matched": "Tokens of prompts that did not have to be computed",
    "evictions": "Spans that were evicted",
}
GAUGES = {
    "active": "Requests that have not ended",
    "nbytes": "Bytes that all that is stored takes",
    "pinned": "Bytes of it that requests use now",
    "resident": "Bytes of it in the memory of the cache",
    "spans": "Spans that are stored",
}


def register_metrics(
    prefix: PrefixCache, registry: Any = None, name: str = "kvcache_prefix"
) -> Any:
    """Let a Prometheus registry collect the statistics of `prefix`; returns the collector.

    registry: of prometheus_client, its default one if None. name: what all metrics begin with.

    Raises: BackendNotAvailableError without the package prometheus_client.
    """
    try:
        import prometheus_client
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    except ImportError as error:
        raise BackendNotAvailableError(
            "metrics need prometheus_client. Install it: pip install 'kvcache[metrics]'."
        ) from error

    class Collector:
        def collect(self) -> Iterator[Any]:
            stats = prefix.stats
            for field, text in COUNTERS.items():
                yield CounterMetricFamily(f"{name}_{field}", text, value=getattr(stats, field))
            for field, text in GAUGES.items():
                yield GaugeMetricFamily(f"{name}_{field}", text, value=getattr(stats, field))

    collector = Collector()
    (registry or prometheus_client.REGISTRY).register(collector)
    return collector
