"""One small report per backend, shared: measuring is what takes time."""

from functools import cache

import pytest

from kvcache.bench import run_append
from kvcache.bench.harness import timing

CAPACITIES = (32, 8)


@pytest.fixture(autouse=True, scope="session")
def _all_take_every_turn():
    """The slow as well: whether somebody is depends on what else this machine does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SLOW_EVERY", 1)
        yield


@cache
def measured(spec):
    """Returns a report of two capacities, two dtypes and two rounds on that backend."""
    return run_append([spec], capacities=CAPACITIES, heads=2, head_dim=4, rounds=2)


@pytest.fixture
def report(backend):
    """What was measured on each backend in turn."""
    return measured(backend.spec)


@pytest.fixture
def numpy_report():
    """What was measured on NumPy."""
    return measured("numpy")
