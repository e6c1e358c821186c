"""Caches that are right give no false alarm: every conversation is equal bit for bit."""

import pytest

from kvcache.verify import SCENARIOS, verify, verify_reuse

from .faults import RIGHT


def check(name, runs, seed):
    """Runs so many conversations of every scenario that the target can do."""
    report = verify(RIGHT[name], runs=runs, seed=seed)
    assert report.passed, report.to_text()
    for result in report.results:
        assert result.equal == result.runs, report.to_text()
    return sum(result.runs for result in report.results)


@pytest.mark.parametrize("name", RIGHT)
def test_no_false_alarm(name):
    assert check(name, 1, seed=7) >= 17


@pytest.mark.matrix
@pytest.mark.parametrize("name", RIGHT)
def test_no_false_alarm_in_a_thousand_conversations(name):
    assert check(name, 60, seed=0) >= 1000


REUSING = ("returns", "branches", "evicted-device", "evicted-host", "evicted-store")


@pytest.mark.parametrize("name", RIGHT)
def test_every_scenario_reuses_or_computes(name):
    """A bench that never reuses anything would find nothing."""
    report = verify_reuse(RIGHT[name], runs=3, scenarios=[*REUSING])
    assert all(result.reused for result in report.results), report.to_text()


def test_scenarios_are_explained():
    assert all(scenario.meaning and scenario.name == name for name, scenario in SCENARIOS.items())
