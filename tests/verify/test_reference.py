"""Caches of kvcache under the reference models: warm equals cold."""

import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")

from kvcache.errors import BackendNotAvailableError
from kvcache.verify import SCENARIOS, verify
from kvcache.verify.targets.reference import LAYERS, POOLS, LayersTarget, PoolTarget

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
    assert lacking == {"evicted-store"} | ({"evicted-device"} if form == "layers" else set())
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
    report = verify(PoolTarget("mixed"), runs=2, scenarios=["returns", "branches", "edits"])
    assert all(result.reused > 10 for result in report.results)
    assert {result.scenario for result in report.results} < set(SCENARIOS)
