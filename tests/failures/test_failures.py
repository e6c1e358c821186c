"""A call that raises has changed nothing, whatever raised, and wherever.

Each scenario is one public call of a cache in some state. It fails at every call of a hook of the
backend, and is interrupted at lines of the package; each time, everything that can be seen is
compared with a twin in which nothing failed: at once, after the call is made again, and after later
calls. ``HYPOTHESIS_PROFILE=thorough`` does so at every moment of every scenario, on every backend.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

from .comparison import hook_differences, interrupt_differences
from .every_scenario import SCENARIOS
from .injection import send_signal
from .observation import differences

# Lines interrupted in each call. Other backends run the same lines above their adapter.
INTERRUPTS = {"numpy": 6}
FEW_INTERRUPTS = 2
EVERY_LINE = {("numpy", "ring without snapshots")}  # it undoes its updates in a way of its own
THOROUGH = settings.get_current_profile_name() == "thorough"

every_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
some_scenarios = pytest.mark.parametrize("scenario", SCENARIOS[::9], ids=str)


def check(lines):
    assert not lines, "\n".join([f"{len(lines)} differences", *lines])


@pytest.mark.slow
@every_scenario
def test_a_framework_fails(place, scenario):
    check(hook_differences(scenario, place, every=THOROUGH))


# A file that was opened but has not reached its `with` is closed as it is freed, and Python warns.
UNCLOSED = "ignore:Exception ignored in. <_io:pytest.PytestUnraisableExceptionWarning"


@pytest.mark.filterwarnings(UNCLOSED)
@pytest.mark.slow
@every_scenario
def test_an_interrupt_comes_between_two_lines(place, scenario):
    name, limit = place.backend.name, INTERRUPTS.get(place.backend.name, FEW_INTERRUPTS)
    every = THOROUGH or (name, scenario.state) in EVERY_LINE
    check(interrupt_differences(scenario, place, None if every else limit))


@pytest.mark.slow
@some_scenarios
def test_a_signal_comes_before_a_framework_does_its_work(place, scenario):
    check(hook_differences(scenario, place, send_signal, every=THOROUGH))


# The comparison itself.


@every_scenario
def test_the_call_can_be_seen(place, scenario):
    """Otherwise the tests above would compare nothing."""
    before, after = scenario.start(place).look(), done(place, scenario)
    assert differences(before, scenario.start(place).look()) == []
    assert differences(after, done(place, scenario)) == []
    assert (before == after) == scenario.act.silent


def done(place, scenario):
    """Observe a world in which the call was made."""
    world = scenario.start(place)
    scenario.complete(world)
    return world.look()
