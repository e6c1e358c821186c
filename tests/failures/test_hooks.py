"""Any call of a framework fails: nothing has changed, and later calls do what they would have."""

from __future__ import annotations

import pytest

from . import layer_scenarios
from .comparison import hook_differences

SCENARIOS = layer_scenarios.SCENARIOS


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_a_failing_framework_changes_nothing(place, scenario):
    lines = hook_differences(scenario, place)
    assert not lines, "\n".join([f"{len(lines)} differences", *lines])
