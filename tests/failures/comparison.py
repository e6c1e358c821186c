"""Comparison of a world in which a call failed with twins in which nothing failed."""

from __future__ import annotations

from typing import NamedTuple

from .injection import InjectedError, Moments, hooks, interrupt, lines, numbered, telling
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


def hook_differences(scenario, place):
    """Return a line for each difference that a failing hook call leaves."""
    reference = Reference(scenario, place)
    names = list(numbered(moments_of_hooks(scenario, place).names))
    return [
        f"{name} fails, {line}"
        for number, name in enumerate(names, 1)
        for line in _after_hook(scenario, place, reference, number)
    ]


def moments_of_hooks(scenario, place):
    """Return the moments of a call in which no hook fails."""
    world, moments = scenario.start(place), Moments()
    with hooks(place.backends, moments):
        scenario.act.run(world)
    return moments


def _after_hook(scenario, place, reference, number):
    for later, calls in enumerate(scenario.laters):
        for retried in (False, True):
            world = scenario.start(place)
            moments = Moments(number)
            raised = _fails(scenario, world, hooks(place.backends, moments), moments)
            if isinstance(raised, str):
                yield raised
                return
            if raised:
                lines = _after_failure(scenario, world, reference, later, calls, retried, moments)
            else:  # swallowed, so the call has to have done everything
                scenario.act.finish(world)
                lines = _compared("the call returned", world, reference.after, later, calls)
            yield from lines


def _after_failure(scenario, world, reference, later, calls, retried, moments):
    is_done = moments.struck in DONE_BEFORE_FREE and _is(world, reference.after)
    if retried and not is_done:
        error = _attempted(scenario, world)
        return [error] if error else _compared("retried", world, reference.after, later, calls)
    expected = reference.after if is_done else reference.before
    return _compared("given up", world, expected, later, calls)


def _is(world, expected):
    return not differences(expected.state, world.look())


def _fails(scenario, world, injection, moments):
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
    """Return the differences of a world from `expected`, those of its later calls included."""
    state = differences(expected.state, world.look())
    if state:
        return [f"{moment}: {_first_of(state)}"]
    followed = differences(expected.later[later], calls(world))
    return [f"{moment}, later: {_first_of(followed)}"] if followed else []


def _first_of(differing):
    """Return the first difference in full, and the number of the others."""
    others = len(differing) - 1
    return differing[0] + (f" (and {others} more)" if others else "")


# Interrupts.


def interrupt_differences(scenario, place, repeats=None, stride=1):
    """Return a line for each difference that Ctrl-C leaves at some line of the package."""
    reference = Reference(scenario, place)
    names = moments_of_lines(scenario, place).names
    described = list(numbered(names))
    return [
        f"before {described[number - 1]}, {line}"
        for number in telling(names, repeats)[::stride]
        for line in _after_interrupt(scenario, place, reference, number)
    ]


def moments_of_lines(scenario, place):
    """Return the moments of a call without interrupts."""
    world, moments = scenario.start(place), Moments()
    with lines(moments):
        scenario.act.run(world)
    return moments


def _after_interrupt(scenario, place, reference, number):
    """Yield differences: nothing has changed, or everything is done."""
    later = number % len(scenario.laters)
    calls = scenario.laters[later]
    world = scenario.start(place)
    moments = Moments(number, interrupt)
    raised = _fails(scenario, world, lines(moments), moments)
    if isinstance(raised, str):
        yield raised
    elif not raised:
        scenario.act.finish(world)
        yield from _compared("the call returned", world, reference.after, later, calls)
    elif scenario.in_pass:
        yield from _after_interrupt_in_pass(scenario, world, reference, later, calls)
    else:
        yield from _before_or_after(scenario, world, reference, later, calls)


def _before_or_after(scenario, world, reference, later, calls):
    state = world.look()
    if not differences(reference.before.state, state):
        error = _attempted(scenario, world)
        yield from [error] if error else _compared(
            "retried", world, reference.after, later, calls
        )
        return
    for done in (reference.after, reference.lost):
        if not differences(done.state, state):
            return
    yield f"neither before nor after: {_first_of(differences(reference.before.state, state))}"


def _after_interrupt_in_pass(scenario, world, reference, later, calls):
    """Yield differences where looking ends the pass: the call is made again first."""
    error = _attempted(scenario, world)
    yield from [error] if error else _compared("retried", world, reference.after, later, calls)
