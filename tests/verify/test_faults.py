"""Every broken cache is found, whatever is broken in it, and shown by a short conversation."""

import pytest

from kvcache.verify import verify

from .faults import FAULTS

FOUND_BY = {
    "position off by one after a restore": "returns",
    "window one too long": "at-once",
    "ring restored rotated": "returns",
    "recurrent state of the neighbour position": "returns",
    "stale rows after a cancelled pass": "cancels",
    "page of another tenant": "branches",
    "salt ignored": "tenants",
    "rotation lost after a restore": "returns",
    "hash without its parent": "edits",
    "sinks dropped in a chunked prefill": "at-once",
    "rows of a batch swapped": "batches",
    "values reversed on the return from the host": "evicted-device",
    "another page from the store": "evicted-host",
}
"""The first scenario that finds a fault, of all in their order."""


@pytest.fixture(scope="module", params=FAULTS, ids=lambda name: name.replace(" ", "-"))
def found(request):
    """The name of a fault, and the outcome of the scenario that finds it."""
    report = verify(FAULTS[request.param], runs=6, scenarios=[FOUND_BY[request.param]])
    assert not report.passed, f"{request.param} was not found"
    return request.param, report.faults[0]


def test_it_is_found(found):
    _, result = found
    assert result.verdict == ("different" if result.finding.divergence else "failed")


MOST = {"another page from the store": 8}
"""Operations that it takes: two conversations have to be stored, and pushed out."""


def test_the_conversation_is_short(found):
    name, result = found
    assert len(result.finding.script) <= MOST.get(name, 5)


UNEARNED = {"page of another tenant", "salt ignored"}


def test_what_is_wrong(found):
    name, result = found
    if name in UNEARNED:
        assert "tokens were reused that no conversation of the tenant has computed" in str(
            result.finding.message
        )
    else:
        assert result.finding.divergence.difference > 1e-3


LAYERS = {
    "position off by one after a restore": 0,
    "window one too long": 1,
    "ring restored rotated": 1,
    "recurrent state of the neighbour position": 0,
    "stale rows after a cancelled pass": 0,
    "rotation lost after a restore": 0,
    "sinks dropped in a chunked prefill": 1,
    "values reversed on the return from the host": 0,
    "another page from the store": 0,
}


def test_the_layer(found):
    name, result = found
    if name in LAYERS:
        assert result.finding.layer == LAYERS[name]


AT_FAULT_WHEN_COLD = {"window one too long", "sinks dropped in a chunked prefill"}


def test_what_it_is_compared_with(found):
    """A cache that is wrong without reuse as well differs from the run without a cache only."""
    name, result = found
    if name not in UNEARNED:
        cold = name in AT_FAULT_WHEN_COLD
        against = "run without a cache" if cold else "cold run"
        assert result.finding.divergence.against == against


@pytest.mark.matrix
@pytest.mark.parametrize("name", FAULTS)
def test_the_first_scenario_that_finds_it(name):
    report = verify(FAULTS[name], runs=6, first_only=True)
    assert [result.scenario for result in report.faults] == [FOUND_BY[name]]


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("name", FAULTS)
def test_whatever_the_seed(name, seed):
    assert not verify(FAULTS[name], runs=10, seed=seed, first_only=True).passed
