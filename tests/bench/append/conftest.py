"""One small report per backend, shared: measuring is what takes time."""

from functools import cache

import pytest

from kvcache.bench import run_append

CAPACITIES = (32, 8)


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
