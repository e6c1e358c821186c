"""The metrics that pages and the dashboard name are those that there are."""

import json
import re
from pathlib import Path

import pytest

from kvcache import KVCache, PrefixCache
from kvcache.prefix import register_metrics

client = pytest.importorskip("prometheus_client")

pytestmark = pytest.mark.docs
DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD = json.loads((DOCS / "grafana.json").read_text())
NAME = re.compile(r"kvcache_\w+")


@pytest.fixture(scope="module")
def families():
    """Names as they are scraped, without the endings of histograms, and their types."""
    registry = client.CollectorRegistry()
    register_metrics(PrefixCache([KVCache("numpy")]), registry)
    lines = client.generate_latest(registry).decode().splitlines()
    return dict(line.split()[2:] for line in lines if line.startswith("# TYPE"))


def expressions():
    targets = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return [*targets, *(variable["query"] for variable in DASHBOARD["templating"]["list"])]


def test_the_dashboard_shows_metrics_that_there_are(families):
    shown = {name for expression in expressions() for name in NAME.findall(expression)}
    known = families | {
        f"{name}_bucket": kind for name, kind in families.items() if kind == "histogram"
    }
    assert not shown - set(known)
    assert len(shown) > 10


def test_the_dashboard_takes_rates_of_counters_and_no_gauges(families):
    for expression in expressions():
        for name in re.findall(r"rate\((kvcache_\w+)", expression):
            assert name.endswith("_bucket") or families[name] == "counter"


def test_the_dashboard_is_laid_out_without_overlaps():
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert len({(place["x"], place["y"]) for place in places}) == len(places)
    assert {place["x"] + place["w"] <= 24 for place in places} == {True}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)


def test_the_page_lists_every_metric_with_its_type(families):
    text = (DOCS / "routers.md").read_text()
    assert dict(re.findall(r"^\| `(kvcache_\w+)` \| (\w+) \|", text, re.MULTILINE)) == families
    for expression in re.findall(r"`(rate\(.*)`", text):
        assert set(NAME.findall(expression)) <= set(families)
