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
STORE_COUNTERS = {
    "written": "Pages that the store has taken",
    "dropped": "Pages not put, as too many waited, or the store did not take them",
    "fetched": "Pages read, decoded and checked",
    "fetched_tokens": "Prompt tokens restored from the store",
    "missed": "Requests for which the store had nothing more than memory",
    "failed": "Pages that were damaged, or of other caches",
    "late": "Requests that began without an answer of the store",
    "gated": "Requests for which computing was estimated to be faster",
}
STORE_GAUGES = {
    "bytes_per_second": "Measured speed of the store",
    "seconds_per_token": "Measured time to compute a prompt token",
}
"""Left out until there is a measurement."""
CALL_COUNTERS = {
    "hits": "Values read",
    "misses": "Keys read without a value",
    "corrupt": "Values that were damaged",
    "unavailable": "Keys without an answer",
    "refused": "Values not taken",
    "evicted": "Entries removed for the budget of the store",
    "bytes_read": "Bytes of values read",
    "bytes_written": "Bytes of values written, or there before",
}
"""Of the store object, which others may use as well."""


def register_metrics(
    prefix: PrefixCache, registry: CollectorRegistry | None = None, name: str = "kvcache_prefix"
) -> Collector:
    """Add the statistics of `prefix` to a Prometheus registry; return their collector.

    registry: of prometheus_client, its default one if None. name: beginning of all metrics' names.
    Those of a store behind it follow, with ``_store`` added to `name`.

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

    def metrics(begin: str, stats: object, kind: type, texts: dict[str, str]) -> Iterator[Metric]:
        values = {field: getattr(stats, field) for field in texts}
        for field, value in values.items():
            if value is not None:
                yield kind(f"{begin}_{field}", texts[field], value=value)

    class StatsCollector:
        def collect(self) -> Iterator[Metric]:
            stats, store = prefix.stats, f"{name}_store"
            yield from metrics(name, stats, CounterMetricFamily, COUNTERS)
            yield from metrics(name, stats, GaugeMetricFamily, GAUGES)
            if stats.store is not None:
                yield from metrics(store, stats.store, CounterMetricFamily, STORE_COUNTERS)
                yield from metrics(store, stats.store, GaugeMetricFamily, STORE_GAUGES)
                yield from metrics(store, stats.store.store, CounterMetricFamily, CALL_COUNTERS)

    # Read when it is scraped: the prefix cache pushes nothing.
    collector = StatsCollector()
    (prometheus_client.REGISTRY if registry is None else registry).register(collector)
    return collector
