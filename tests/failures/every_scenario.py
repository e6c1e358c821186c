"""Every scenario there is."""

from . import (
    layer_scenarios,
    pool_scenarios,
    prefix_scenarios,
    state_pool_scenarios,
    state_scenarios,
)

SCENARIOS = [
    *layer_scenarios.SCENARIOS,
    *state_scenarios.SCENARIOS,
    *pool_scenarios.SCENARIOS,
    *state_pool_scenarios.SCENARIOS,
    *prefix_scenarios.SCENARIOS,
]
