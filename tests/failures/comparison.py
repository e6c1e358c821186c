"""Comparison of a world in which a call failed with twins in which nothing failed."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from .injection import (
    InjectedError,
    Moments,
    chosen_of,
    fail,
    hooks,
    interrupt,
    lines,
    numbered,
    send_signal,
)
from .observation import differences

DONE_BEFORE_FREE = ("free",)
"""Hooks that give memory up: called when the change is made, and so allowed to fail after it."""


class Course(NamedTuple):
    """What is seen of a world: its state, and each kind of later calls, by number."""

    state: dict
    later: list


class Reference:
    """What is seen where nothing fails.

    before: of a twin without the call. after: of a twin that made the call.
    lost: of a twin that made the call and lost its result.
    instead: of a twin that made the call that a failure may turn into; None if there is none.
    """

    def __init__(self, scenario, place):
        def make(world):
            scenario.complete(world)

        def lose(world):
            make(world)
            world.lose()

        self.before = course(scenario, place, lambda _: None)
        self.after = course(scenario, place, make)
        self.lost = course(scenario, place, lose) if scenario.act.resource else self.after
        instead = scenario.act.instead
        self.instead = None if instead is None else course(scenario, place, instead)

    def expected_after_failure(self, world, moments):
        """Return the twin that a failed call has to equal.

        It is the one without the call, unless the failure turned into another call, or came when
        the change was made: where memory was given up, or a signal had been held back until then.
        """
        if self.instead is not None and _is(world, self.instead):
            return self.instead
        late = moments.struck in DONE_BEFORE_FREE or moments.strike is send_signal
        tells = self.after.state != self.before.state  # or both would be what is seen
        return self.after if late and tells and _is(world, self.after) else self.before


def course(scenario, place, step):
    """Return what is seen of a world after `step`, once for each kind of later calls."""
    state, later = None, []
    for calls in scenario.laters:
        world = scenario.start(place)
        step(world)
        state = world.look()
        later.append(calls(world))
    return Course(state, later)


# Hooks.


def hook_differences(scenario, place, strike=fail, every=True):
    """Return a line for each difference that a failing hook call leaves. strike: how it fails.

    every: let each call fail, once for each kind of later calls, which come after the failed call
        is given up, and after it is made again. Otherwise the first and the last call of each hook
        fail, with one of these continuations in turn.
    """
    reference = Reference(scenario, place)
    names = moments_of_hooks(scenario, place).names
    described = list(numbered(names))
    ways = list(itertools.product(range(len(scenario.laters)), (True, False)))
    return [
        f"{described[number - 1]} fails, {line}"
        for turn, number in enumerate(chosen_of(names, None if every else len(names) + 1))
        for later, retried in (ways if every else [ways[turn % len(ways)]])
        for line in _after_hook(scenario, place, reference, Moments(number, strike), later, retried)
    ]


def moments_of_hooks(scenario, place):
    """Return the moments of a call in which no hook fails."""
    world, moments = scenario.start(place), Moments()
    with hooks(place.backends, moments):
        scenario.act.run(world)
    return moments


def _after_hook(scenario, place, reference, moments, later, retried):
    world, calls = scenario.start(place), scenario.laters[later]
    raised = _fails(scenario, world, hooks(place.backends, moments))
    if isinstance(raised, str):
        return [raised]
    if not raised:  # swallowed, so the call has to have done everything, or what it turns into
        scenario.act.finish(world)
        turned = reference.instead is not None and _is(world, reference.instead)
        expected = reference.instead if turned else reference.after
        return _compared("returned", world, expected, later, calls)
    if scenario.in_pass and retried:  # looking first would end the pass
        return _retried(scenario, world, reference, later, calls)
    expected = reference.expected_after_failure(world, moments)
    if not retried or expected is not reference.before:
        return _compared("given up", world, expected, later, calls)
    unlike = _compared("given up", world, expected, later, None)
    return unlike or _retried(scenario, world, reference, later, calls)


def _retried(scenario, world, reference, later, calls):
    error = _attempted(scenario, world)
    return [error] if error else _compared("retried", world, reference.after, later, calls)


def _is(world, expected):
    return expected.state == world.look()


def _fails(scenario, world, injection):
    """Make the call under injection; return whether it raised, or words for a wrong error."""
    try:
        with injection:
            world.result = scenario.act.run(world)
    except (InjectedError, KeyboardInterrupt):
        return True
    except BaseException as error:  # noqa: BLE001
        return f"the call raised {type(error).__name__}: {error}"
    return False


def _attempted(scenario, world):
    """Make the call again; return words for an error, or None."""
    try:
        scenario.complete(world)
    except BaseException as error:  # noqa: BLE001
        return f"retried: the call raised {type(error).__name__}: {error}"
    return None


def _compared(moment, world, expected, later, calls):
    """Return the differences of a world from `expected`, in its state or in later calls.

    calls: the later calls; None to leave them out.
    """
    state = differences(expected.state, world.look())
    if state:
        return [f"{moment}: {_first_of(state)}"]
    if calls is None:
        return []
    followed = differences(expected.later[later], calls(world))
    return [f"{moment}, later: {_first_of(followed)}"] if followed else []


def _first_of(differing):
    """Return the first difference in full, and the number of the others."""
    others = len(differing) - 1
    return differing[0] + (f" (and {others} more)" if others else "")


# Interrupts.

LOOK_AHEAD = 8
"""Later calls are compared after one of so many interrupts: the state says nearly everything."""


def interrupt_differences(scenario, place, limit=None):
    """Return a line for each difference that Ctrl-C leaves at some line of the package.

    limit: most lines to interrupt, evenly spread over those that run; None for every line, each
        time that it runs.
    """
    reference = Reference(scenario, place)
    names = moments_of_lines(scenario, place).names
    described = list(numbered(names))
    return [
        f"before {described[number - 1]}, {line}"
        for turn, number in enumerate(chosen_of(names, limit))
        for line in _after_interrupt(scenario, place, reference, number, turn % LOOK_AHEAD == 0)
    ]


def moments_of_lines(scenario, place):
    """Return the moments of a call without interrupts."""
    scenario.act.run(scenario.start(place))  # fills the caches of functions
    world, moments = scenario.start(place), Moments()
    with lines(moments):
        scenario.act.run(world)
    return moments


def _after_interrupt(scenario, place, reference, number, ahead):
    """Return differences: nothing has changed, or everything is done."""
    world, moments = scenario.start(place), Moments(number, interrupt)
    raised = _fails(scenario, world, lines(moments))
    if isinstance(raised, str):
        return [raised]
    later = number % len(scenario.laters)
    calls = scenario.laters[later] if ahead else None
    if not raised:
        scenario.act.finish(world)
        turned = reference.instead is not None and _is(world, reference.instead)
        expected = reference.instead if turned else reference.after
        return _compared("returned", world, expected, later, calls)
    if scenario.in_pass and not world.cache.pass_complete():  # looking first would end the pass
        return _retried(scenario, world, reference, later, calls)
    if scenario.in_pass and world.look() != reference.before.state:
        scenario.act.finish(world)  # the pass has begun, and has no layers to wait for
    return _before_or_after(scenario, world, reference, later, calls)


def _before_or_after(scenario, world, reference, later, calls):
    state = world.look()
    if reference.before.state == state:
        return _retried(scenario, world, reference, later, calls)
    done = (reference.after, reference.lost, reference.instead)
    if any(course is not None and course.state == state for course in done):
        return []
    lines = differences(reference.before.state, state)
    return [f"neither before nor after: {_first_of(lines)}"]
