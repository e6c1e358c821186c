"""Metrics for Prometheus, times of spans, and the usage of one request."""

import json
import random
import re
import sys

import numpy as np
import pytest

from kvcache import BackendNotAvailableError, KVCache, PrefixCache, RotatingKVCache
from kvcache.prefix import Usage, register_metrics
from kvcache.prefix.metrics import CALL_COUNTERS, STORE_COUNTERS, STORE_GAUGES
from kvcache.prefix.residency import BUCKETS, Histogram
from kvcache.stores import MemoryStore

ROW = 8
"""Bytes of a token."""


class Time:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


def serve(prefix, ids, reply=(), then=lambda _: None, **options):
    """A session that computes a prompt and a reply; returns its usage."""
    with prefix.session(ids, **options) as session:
        session.extend(list(reply))
        for layer in session.caches:
            rows = np.zeros((1, 1, session.remaining.size + len(reply), 1), np.float32)
            layer.update(rows, rows)
        then(session)
    return session.usage


def values_of(registry):
    """The values of all samples by name and bound."""
    client = pytest.importorskip("prometheus_client")
    text = client.generate_latest(registry).decode()
    lines = re.findall(r"^(\w+)(?:\{le=\"(.*)\"\})? (\S+)$", text, re.MULTILINE)
    return {(name, bound) if bound else name: float(value) for name, bound, value in lines}


@pytest.fixture
def client():
    return pytest.importorskip("prometheus_client")


def test_metrics_are_the_statistics(client):
    chance, registry = random.Random(1), client.CollectorRegistry()
    prefix = PrefixCache([KVCache("numpy")], budget=100 * ROW)
    collector = register_metrics(prefix, registry, "mine")
    for _ in range(20):
        ids = [chance.randrange(3) for _ in range(chance.randrange(1, 60))]
        serve(prefix, ids, retain=(5, 1e6))
    _open = prefix.session([1, 2, 0, 1])
    values, stats = values_of(registry), prefix.stats
    assert stats.evictions >= stats.retained_evictions > 0
    assert stats.active == 1
    expected = {
        "queries_total": stats.tokens,
        "hits_total": stats.matched,
        "sessions_total": stats.sessions,
        "evictions_total": stats.evictions,
        "retained_evictions_total": stats.retained_evictions,
        "active_sessions": 1,
        "bytes": stats.nbytes,
        "pinned_bytes": stats.pinned,
        "resident_bytes": stats.resident,
        "spans": stats.spans,
        "usage_perc": stats.nbytes / (100 * ROW),
    }
    for name, value in expected.items():
        assert values[f"mine_prefix_cache_{name}"] == value
    assert values["mine_prefix_cache_index_bytes"] > 0
    assert values["mine_kv_block_lifetime_seconds_bucket", "+Inf"] == stats.evictions
    types = client.generate_latest(registry).decode()
    assert "# TYPE mine_prefix_cache_hits_total counter" in types
    assert "# TYPE mine_prefix_cache_bytes gauge" in types
    assert "# TYPE mine_kv_block_reuse_gap_seconds histogram" in types
    registry.unregister(collector)
    assert not client.generate_latest(registry)


def test_without_a_budget_there_is_no_share_of_it(client):
    registry = client.CollectorRegistry()
    register_metrics(PrefixCache([KVCache("numpy")], budget=None), registry)
    assert "kvcache_prefix_cache_bytes" in values_of(registry)
    assert "kvcache_prefix_cache_usage_perc" not in values_of(registry)


def test_metrics_of_a_store(client):
    store, registry = MemoryStore(), client.CollectorRegistry()
    for number in range(2):
        prefix = PrefixCache([KVCache("numpy")], store=store, namespace="tiny", page_tokens=4)
        register_metrics(prefix, registry, f"mine{number}")
        assert f"mine{number}_store_bytes_per_second" not in values_of(registry), "not measured yet"
        serve(prefix, range(40))
        prefix.flush()
    values, stats = values_of(registry), prefix.stats.store
    assert stats.fetched_tokens == 39
    for field in STORE_COUNTERS:
        assert values[f"mine1_store_{field}_total"] == getattr(stats, field)
    for field in STORE_GAUGES:
        measured = getattr(stats, field)
        assert values.get(f"mine1_store_{field}") == pytest.approx(measured), field
    for field in CALL_COUNTERS:
        assert values[f"mine1_store_{field}_total"] == getattr(stats.store, field)
    prefix.close()
    assert b"mine1_store" not in client.generate_latest(registry)


def test_metrics_in_the_default_registry(client):
    prefix = PrefixCache([KVCache("numpy")])
    collector = register_metrics(prefix)
    assert values_of(client.REGISTRY)["kvcache_prefix_cache_sessions_total"] == 0
    with pytest.raises(ValueError, match="Duplicated"):
        register_metrics(prefix)
    client.REGISTRY.unregister(collector)


def test_without_prometheus(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(BackendNotAvailableError, match=r"pip install 'kvcache\[metrics\]'"):
        register_metrics(PrefixCache([KVCache("numpy")]))


# Times of spans.


def test_times_of_a_span(client):
    time, registry = Time(), client.CollectorRegistry()
    prefix = PrefixCache([KVCache("numpy")], clock=time)
    register_metrics(prefix, registry)
    for moment in (10.0, 10.25, 14.25):
        time.now = moment
        serve(prefix, [1, 2, 3])
    time.now = 100.0
    prefix.clear()
    values = values_of(registry)
    for name, seconds, count in (
        ("lifetime", [90.0], 1),
        ("idle_before_evict", [85.75], 1),
        ("reuse_gap", [0.25, 4.0], 2),
    ):
        metric = f"kvcache_kv_block_{name}_seconds"
        assert values[f"{metric}_count"] == count
        assert values[f"{metric}_sum"] == sum(seconds)
        for bound in BUCKETS:
            under = sum(each <= bound for each in seconds)
            assert values[f"{metric}_bucket", str(bound)] == under


def test_parts_of_a_span_are_as_old_as_the_whole():
    time = Time()
    prefix = PrefixCache([KVCache("numpy")], clock=time)
    residency = prefix.measure_residency()
    assert prefix.measure_residency() is residency
    time.now = 5.0
    serve(prefix, [1, 2, 3, 4])
    time.now = 30.0
    serve(prefix, [1, 2, 9])
    time.now = 31.0
    prefix.clear()
    assert residency.lifetime.total == 26 + 26 + 1
    assert residency.idle.total == 1 + 1 + 1


def test_a_span_that_comes_back_is_young():
    time = Time()
    prefix = PrefixCache([KVCache("numpy")], clock=time)
    residency = prefix.measure_residency()
    serve(prefix, [1, 2, 3])
    prefix.trim(0)
    time.now = 50.0
    serve(prefix, [1, 2, 3])
    time.now = 57.0
    prefix.trim(0)
    assert residency.lifetime.total == 7
    assert residency.reuse_gap.total == 0, "a ghost is not in use"


def test_nothing_is_measured_unless_somebody_asks():
    prefix = PrefixCache([KVCache("numpy")])
    serve(prefix, [1, 2, 3])
    prefix.clear()
    assert prefix.measure_residency().lifetime.read()[0][-1] == ("+Inf", 0.0)


def test_a_bound_is_in_its_bucket():
    histogram = Histogram()
    for seconds in (0.0, 0.001, 0.0011, 1800.0, 1801.0):
        histogram.observe(seconds)
    counts = dict(histogram.read()[0])
    assert counts["0.001"] == 2
    assert counts["0.002"] == 3
    assert counts["1800.0"] == 4
    assert counts["+Inf"] == 5


# Usage.


def test_usage_of_a_request_that_finds_nothing():
    prefix = PrefixCache([KVCache("numpy")])
    usage = serve(prefix, range(10), reply=range(5))
    assert usage == Usage(prompt_tokens=10, cached_tokens=0, created_cache_tokens=10)
    assert usage.as_openai() == {"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 0}}
    assert usage.as_anthropic() == {
        "input_tokens": 0,
        "cache_creation_input_tokens": 10,
        "cache_read_input_tokens": 0,
    }


@pytest.mark.parametrize(
    ("ids", "cached", "created"),
    [
        (range(10), 9, 0),  # the last token is computed again, and is stored already
        ([*range(10), 50, 51], 10, 2),
        ([*range(6), 50], 6, 1),
        ([70], 0, 1),
    ],
)
def test_usage_of_a_request_after_another(ids, cached, created):
    prefix = PrefixCache([KVCache("numpy")])
    serve(prefix, range(10))
    usage = serve(prefix, ids, reply=[90, 91])
    assert usage == Usage(len(ids), cached, created)
    assert sum(usage.as_anthropic().values()) == len(ids)
    assert json.dumps(usage.as_openai())


def test_usage_grows_with_what_is_stored():
    prefix, seen = PrefixCache([KVCache("numpy")]), []

    def commit(session):
        seen.append(session.usage.created_cache_tokens)
        session.commit()
        seen.append(session.usage.created_cache_tokens)

    assert serve(prefix, range(10), reply=[1], then=commit).created_cache_tokens == 10
    assert seen == [0, 10]


def test_what_is_evicted_and_stored_again_counts_once():
    prefix = PrefixCache([KVCache("numpy")])

    def commit(session):
        session.commit()
        prefix.trim(0)

    assert serve(prefix, range(10), then=commit) == Usage(10, 0, 10)


def test_a_session_that_stores_nothing_created_nothing():
    prefix = PrefixCache([KVCache("numpy")])
    session = prefix.session([1, 2, 3])
    session.close(store=False)
    assert session.usage == Usage(3, 0, 0)


def test_rows_that_a_window_had_dropped_are_no_new_tokens():
    prefix = PrefixCache([RotatingKVCache(4, backend="numpy")])
    first = serve(prefix, range(12))
    assert (first.cached_tokens, first.created_cache_tokens) == (0, 12)
    again = serve(prefix, range(8))
    assert again.created_cache_tokens == 0
    assert sum(again.as_anthropic().values()) == 8
