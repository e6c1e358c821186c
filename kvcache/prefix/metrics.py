"""Prometheus metrics of a prefix cache, through the official client."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

from kvcache.errors import BackendNotAvailableError

from .arguments import check_text
from .cache import PrefixCache

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector, CollectorRegistry

Texts: TypeAlias = dict[str, tuple[str, str]]
"""Name and text of metrics by the field of the statistics."""


def _as_named(texts: dict[str, str]) -> Texts:
    """Return `texts` with the fields as names."""
    return {field: (field, text) for field, text in texts.items()}


COUNTERS = {
    "tokens": ("queries", "Prompt tokens asked for"),
    "matched": ("hits", "Prompt tokens reused instead of computed"),
    "sessions": ("sessions", "Requests begun"),
    "evictions": ("evictions", "Spans evicted"),
    "retained_evictions": ("retained_evictions", "Spans evicted though they were retained"),
}
GAUGES = {
    "active": ("active_sessions", "Requests open now"),
    "nbytes": ("bytes", "Bytes stored"),
    "pinned": ("pinned_bytes", "Bytes stored and in use by requests"),
    "resident": ("resident_bytes", "Bytes stored in the memory of the cache"),
    "index_nbytes": ("index_bytes", "Bytes of host memory taken outside the budget"),
    "spans": ("spans", "Spans stored"),
    "usage": ("usage_perc", "Share of the budget that is used, 0 to 1"),
}
"""One that is None is left out."""
EXPLAINED = "Prompt tokens not reused, of the sessions that were explained"
"""Left out until there is one."""
HISTOGRAMS = {
    "lifetime": ("lifetime_seconds", "Time a span was stored before it was evicted"),
    "idle": ("idle_before_evict_seconds", "Time from the last use of a span to its eviction"),
    "reuse_gap": ("reuse_gap_seconds", "Time between two uses of a stored span"),
}
STORE_COUNTERS = _as_named(
    {
        "written": "Pages that the store has taken",
        "dropped": "Pages not put, as too many waited, or the store did not take them",
        "fetched": "Pages read, decoded and checked",
        "fetched_tokens": "Prompt tokens restored from the store",
        "missed": "Requests for which the store had nothing more than memory",
        "failed": "Pages that were damaged, or of other caches",
        "late": "Requests that began without an answer of the store",
        "gated": "Requests for which computing was estimated to be faster",
    }
)
STORE_GAUGES = _as_named(
    {
        "bytes_per_second": "Measured speed of the store",
        "seconds_per_token": "Measured time to compute a prompt token",
    }
)
"""Left out until there is a measurement."""
CALL_COUNTERS = _as_named(
    {
        "hits": "Values read",
        "misses": "Keys read without a value",
        "corrupt": "Values that were damaged",
        "unavailable": "Keys without an answer",
        "refused": "Values not taken",
        "evicted": "Entries removed for the budget of the store",
        "bytes_read": "Bytes of values read",
        "bytes_written": "Bytes of values written, or there before",
    }
)
"""Of the store object, which others may use as well."""


def _read(begin: str, stats: object, kind: type, texts: Texts) -> Iterator[Metric]:
    """Yield the fields of some statistics as metrics, whose names begin with `begin`."""
    for field, (end, text) in texts.items():
        value = getattr(stats, field)
        if value is not None:
            yield kind(f"{begin}_{end}", text, value=value)


def register_metrics(
    prefix: PrefixCache, registry: CollectorRegistry | None = None, name: str = "kvcache"
) -> Collector:
    """Add the statistics of `prefix` to a Prometheus registry; return their collector.

    registry: of prometheus_client, its default one if None. name: beginning of all metrics' names:
    tokens are counted as ``prefix_cache_queries`` and ``prefix_cache_hits``, as in vLLM. Those of a
    store behind it begin with ``_store`` added to `name`. Times of spans are measured from here on.

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
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )
    except ImportError as error:
        raise BackendNotAvailableError(
            "metrics need prometheus_client. Install it: pip install 'kvcache[metrics]'."
        ) from error

    residency = prefix.measure_residency()

    class StatsCollector:
        def collect(self) -> Iterator[Metric]:
            stats, begin, store = prefix.stats, f"{name}_prefix_cache", f"{name}_store"
            yield from _read(begin, stats, CounterMetricFamily, COUNTERS)
            yield from _read(begin, stats, GaugeMetricFamily, GAUGES)
            if stats.explained:
                explained = CounterMetricFamily(f"{begin}_explained", EXPLAINED, labels=["reason"])
                for why, tokens in stats.explained.items():
                    explained.add_metric([why], tokens)
                yield explained
            if stats.store is not None:
                yield from _read(store, stats.store, CounterMetricFamily, STORE_COUNTERS)
                yield from _read(store, stats.store, GaugeMetricFamily, STORE_GAUGES)
                yield from _read(store, stats.store.store, CounterMetricFamily, CALL_COUNTERS)
            for field, (end, text) in HISTOGRAMS.items():
                buckets, total = getattr(residency, field).read()
                yield HistogramMetricFamily(f"{name}_kv_block_{end}", text, buckets, total)

    # Read when it is scraped: the prefix cache pushes nothing.
    collector = StatsCollector()
    (prometheus_client.REGISTRY if registry is None else registry).register(collector)
    return collector
