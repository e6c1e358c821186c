"""Prometheus metrics of a prefix cache, through the official client."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvcache.errors import BackendNotAvailableError

from .arguments import check_text
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

    Raises: BackendNotAvailableError without the package prometheus_client; TypeError for no
        prefix cache or registry, ValueError for a name that Prometheus refuses or has already.
    """
    if not isinstance(prefix, PrefixCache):
        raise TypeError(f"metrics are those of a PrefixCache; got {reprlib.repr(prefix)}.")
    if registry is not None and not callable(getattr(registry, "register", None)):
        raise TypeError(
            f"a registry is a prometheus_client.CollectorRegistry; got {reprlib.repr(registry)}."
        )
    check_text(name, "a name of metrics is text")
    if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", name):
        raise ValueError(
            f"names of metrics are letters, digits, _ and :, and no digit first; got {name!r}."
        )
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
    (prometheus_client.REGISTRY if registry is None else registry).register(collector)
    return collector
