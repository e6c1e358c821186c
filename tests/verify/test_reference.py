"""Caches of kvcache under the reference models: warm equals cold."""

from itertools import count

import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")

from kvcache.errors import BackendNotAvailableError
from kvcache.stores import FileStore, Hit, MemoryStore
from kvcache.verify import SCENARIOS, verify
from kvcache.verify.cold import measure_noise
from kvcache.verify.judge import Judge
from kvcache.verify.operations import Evict
from kvcache.verify.targets.reference import LAYERS, POOLS, LayersTarget, PoolTarget

from .. import peek

FORMS = {"layers": LayersTarget, "pool": PoolTarget}
CELLS = [("layers", kind) for kind in LAYERS] + [("pool", kind) for kind in POOLS]
IN_CI = {("pool", "mixed"), ("layers", "hybrid")}
OTHERS = ["torch", "mlx", "jax"]


def marked(cells):
    return [
        pytest.param(*cell, marks=() if cell in IN_CI else pytest.mark.matrix) for cell in cells
    ]


def verified(form, kind, backend, runs, scenarios=None):
    try:
        target = FORMS[form](kind, backend)
    except BackendNotAvailableError as error:
        pytest.skip(str(error))
    report = verify(target, runs=runs, scenarios=scenarios)
    assert report.passed, report.to_text()
    return report


@pytest.mark.parametrize(("form", "kind"), marked(CELLS))
def test_on_numpy(form, kind):
    report = verified(form, kind, "numpy", 1)
    lacking = {result.scenario for result in report.results if result.verdict == "not supported"}
    lacking -= {"batches"} if kind == "hybrid" else set()  # states know no padding
    assert lacking == ({"evicted-device"} if form == "layers" else set())
    if kind != "hybrid":  # which computes in float32, in pieces that end where a pass does
        assert all(result.equal == result.runs for result in report.results), report.to_text()


@pytest.mark.matrix
@pytest.mark.parametrize(("form", "kind"), CELLS)
def test_in_a_thousand_conversations(form, kind):
    report = verified(form, kind, "numpy", 60)
    assert sum(result.runs for result in report.results) >= 950


@pytest.mark.matrix
@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize(("form", "kind"), CELLS)
def test_on_other_backends(form, kind, backend):
    if backend == "jax":  # where each length is compiled by itself, for seconds
        verified(form, kind, backend, 1, scenarios=["returns"])
    else:
        verified(form, kind, backend, 3)


def test_every_scenario_reuses_tokens():
    names = ["returns", "branches", "edits", "evicted-device", "evicted-host", "evicted-store"]
    report = verify(PoolTarget("mixed"), runs=2, scenarios=names)
    assert all(result.reused > 10 for result in report.results)
    assert {result.scenario for result in report.results} < set(SCENARIOS)


class MixedUp(MemoryStore):
    """Returns the value of another key: the one used longest ago of those that fit in its place."""

    def _get(self, keys, deadline):
        return [self._other(outcome, deadline) for outcome in super()._get(keys, deadline)]

    def _other(self, outcome, deadline):
        if not isinstance(outcome, Hit):
            return outcome
        labels = {entry.key: entry.label for entry in self.entries()}
        places = {key: label._replace(parent=outcome.label.parent) for key, label in labels.items()}
        oldest = next(key for key, label in places.items() if label == outcome.label)
        [other] = super()._get([oldest], deadline)
        return Hit(other.value, outcome.label)


class AlwaysFetched(PoolTarget):
    """Fetches what its store has, however fast computing it was measured to be."""

    def trial(self):
        trial = super().trial()
        peek.cost_gate(trial.prefix).pays = lambda *_: True
        return trial


@pytest.fixture(scope="module")
def mixed_up():
    """A target whose store returns values that were put, whole, and of the right positions."""
    return AlwaysFetched("full", store=MixedUp)


def test_a_store_that_returns_other_pages_is_found(mixed_up):
    judge = Judge(mixed_up, measure_noise(mixed_up, 0))
    scripts = [SCENARIOS["evicted-host"].script(mixed_up, 0, number) for number in range(4)]
    outcomes = [judge.outcome(script) for script in scripts]
    wrong = [outcome for outcome in outcomes if not outcome.good]
    assert {outcome.kind for outcome in wrong} == {"different"}
    assert {outcome.divergence.against for outcome in wrong} == {"cold run"}
    right = Judge(AlwaysFetched("full"), judge.noise)
    assert {right.outcome(script).kind for script in scripts} == {"equal"}


@pytest.mark.matrix
def test_the_conversation_that_shows_it_is_short(mixed_up):
    [result] = verify(mixed_up, runs=6, scenarios=["evicted-host"]).results
    assert any(isinstance(operation, Evict) for operation in result.finding.script)
    assert len(result.finding.script) <= 8


@pytest.mark.matrix
@pytest.mark.parametrize(("form", "kind"), CELLS)
def test_with_files_as_a_store(form, kind, tmp_path):
    numbers = count()
    target = FORMS[form](kind, store=lambda: FileStore(tmp_path / str(next(numbers))))
    scenarios = ["evicted-host", "evicted-store", "tenants", "mixed"]
    report = verify(target, runs=4, scenarios=scenarios)
    assert report.passed, report.to_text()
    assert report.results[0].reused
