"""Backends of their own for failures: nobody else's calls are counted, and shapes stay small."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from kvcache import CacheConfig

from .every_scenario import SCENARIOS
from .scenario import Place

HERE = Path(__file__).parent
# One in so many scenarios runs: above their adapters, the backends have all code in common.
SHARES = {"torch": 3, "mlx": 3, "array_api": 5, "jax": 9}
NUMBERS = {id(scenario): number for number, scenario in enumerate(SCENARIOS)}


def pytest_collection_modifyitems(config, items):
    """Leaves out most scenarios where a backend costs more, except in the thorough profile."""
    if settings.get_current_profile_name() == "thorough":
        return
    left_out = [item for item in items if item.path.parent == HERE and _is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    dropped = set(left_out)
    items[:] = [item for item in items if item not in dropped]


def _is_left_out(item):
    params = getattr(item, "callspec", None) and item.callspec.params
    if not params or "scenario" not in params:
        return False
    share = SHARES.get(str(params["backend"]).partition(":")[0], 1)
    return NUMBERS[id(params["scenario"])] % share > 0


@pytest.fixture
def place(request, backend, tmp_path):
    """A place with two instances of one backend."""
    scenario = request.node.callspec.params.get("scenario")
    if scenario is not None and scenario.state == "bfloat16" and "bfloat16" not in backend.dtypes:
        pytest.skip(f"{backend.name} has no bfloat16")
    return Place(_small(backend), _small(backend), tmp_path)


def _small(backend):
    """Return a new backend like `backend`; where programs are compiled, for few short lengths."""
    fresh = type(backend).__new__(type(backend))
    vars(fresh).update(vars(backend))
    if not backend.slices_are_views:
        fresh.config = CacheConfig(padding=4)
    return fresh
