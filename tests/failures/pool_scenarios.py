"""Scenarios of multi-sequence caches: one call each, in a pass or between passes."""

from __future__ import annotations

from kvcache import functional

from .pool_world import LAYERS, STATES, by_program, following, gives_up, goes_on
from .scenario import Act, Scenario

# Acts in passes.


def _tokens_given(tokens):
    """Return a preparation of a batch. tokens: number of next tokens by sequence."""

    def prepare(world):
        positions = {s: following(world.cache, s, count) for s, count in tokens.items()}
        world.given, world.arrays, world.frames = world.batch(positions)

    return prepare


def _finish(world):
    """Put and get all layers of the pass."""
    world.seen = world.fill(world.arrays, world.frames)


def start(name, tokens):
    return Act(
        f"start_forward {name}",
        lambda world: world.cache.start_forward(world.given),
        _tokens_given(tokens),
        _finish,
    )


def in_pass(name, tokens, layers, run, **kind):
    """Return a call in a pass of which some layers have been put. run: the call."""

    def prepare(world):
        _tokens_given(tokens)(world)
        world.cache.start_forward(world.given)
        for count, (_, layer) in enumerate(world.layers(), 1):
            world.layer = layer
            if count > layers:
                return
            world.put(world.arrays if layer == 0 else world.arrays[:1], world.frames)

    return Act(name, run, prepare, _finish, **kind)


def _put(world):
    world.put(world.arrays if world.layer == 0 else world.arrays[:1], world.frames)


def puts(name, tokens, layers=(0, 1)):
    return [in_pass(f"put {name} {layer}", tokens, layer, _put) for layer in layers]


def _get(world):
    world.cache.get()


def _gets(tokens):
    return [in_pass("get", tokens, LAYERS, _get, silent=True)]


def _set_causal(world):
    world.cache.set_causal([0])


ONE, THREE, PAIR = {0: 1}, {2: 3}, {0: 1, 1: 2}
STARTS = [start("one", ONE), start("three", THREE), start("pair", PAIR)]
PUTS = [*puts("one", ONE), *puts("pair", PAIR)]
SET_CAUSAL = in_pass("set_causal", {0: 1, 1: 2}, LAYERS, _set_causal, silent=True)
RESERVE = Act(
    "reserve",
    lambda world: world.cache.start_forward(world.given, reserve=True),
    _tokens_given(PAIR),
    _finish,
    silent=True,
)

# Acts of programs.


def _plan(world):
    world.plan = world.cache.plan(world.given)


def _plan_steps(steps):
    def run(world):
        world.plan = world.cache.plan_steps(world.given, steps)

    return run


def _finish_plan(world):
    world.seen = by_program(world, world.arrays)


def _of_step(leaf, step):
    """Part of a leaf of stacked plans that is that of one step; a list where nothing is traced."""
    if leaf is None or isinstance(leaf, list):
        return leaf and leaf[step]
    return leaf[step, ...]


def _finish_steps(world):
    """Run a program for each step."""
    plans, world.seen = world.plan, []
    for step in range(len(world.backend.to_host(plans.cells))):
        world.plan = type(plans)(*(_of_step(leaf, step) for leaf in plans))
        world.seen.append(by_program(world, world.arrays))


def _take_state(world):
    world.state = world.cache.program_state


def _steps_given(world):
    _tokens_given(PAIR_OF_STEPS)(world)


PAIR_OF_STEPS = {0: 1, 1: 1}
PROGRAMS = [
    Act("plan", _plan, _tokens_given(PAIR), _finish_plan),
    Act("plan_steps", _plan_steps(2), _steps_given, _finish_steps),
]
TIGHT_STEPS = Act("plan_steps tight", _plan_steps(2), _tokens_given({1: 1, 2: 1}), _finish_steps)
TAKE_STATE = Act("take program_state", _take_state, silent=True)


def _state_given(world):
    """Let a program make a pass, whose result is still to be assigned."""
    _tokens_given(PAIR)(world)
    world.plan = world.cache.plan(world.given)
    world.state = world.cache.program_state
    for layer in range(LAYERS):
        pair = world.arrays if layer == 0 else world.arrays[:1]
        world.state = functional.put(world.state, world.plan, layer, *pair)


def _assign_state(world):
    world.cache.program_state = world.state


ASSIGN_STATE = Act("assign program_state", _assign_state, _state_given)

# Acts between passes.


def _source(world):
    """Take snapshots of a sequence: one in its cells, and one on the host."""
    world.snapshots["resident"] = world.cache.snapshot(0)
    world.snapshots["host"] = world.cache.snapshot(0).to_host()


def _restoring(name):
    return Act(f"restore {name}", lambda w: w.cache.restore(2, w.snapshots[name]), _source)


def init(world):
    world.initialised()


def _allocate(world):
    world.cache.allocate(range(LAYERS), 1, 2, 1)


RESTORES = [_restoring("resident"), _restoring("host")]
CLOSE = Act("close", lambda world: world.cache.close())
CHANGES = [
    Act("remove whole", lambda world: world.cache.remove(0, 0)),
    Act("copy_prefix", lambda world: world.cache.copy_prefix(0, 2, 5)),
    Act("snapshot", lambda world: world.cache.snapshot(0), resource=True),
    Act("schedule", lambda world: world.cache.schedule(0, [7, 9]), silent=True),
    Act("to_backend", lambda world: world.cache.to_backend(world.place.other)),
    CLOSE,
]
CUTS = [
    Act("remove tail", lambda world: world.cache.remove(0, 1)),
    Act("truncate", lambda world: world.cache.copy_prefix(0, 0, 2)),
]
BETWEEN = [*CHANGES, *CUTS, *RESTORES]
REMOVE_MIDDLE = Act("remove middle", lambda world: world.cache.remove(0, 1, 2))
RESTORE_HELD = Act("restore held", lambda world: world.cache.restore(0, world.snapshots["held"]))
ON_HOST = Act(
    "snapshot to_host", lambda world: world.snapshots["held"].to_host() and None, silent=True
)

ACTS = {
    "uninitialised": [Act("init", init)],
    "new wrapper": [Act("init", init)],
    "new": [
        Act("allocate", _allocate, silent=True),
        start("first", {0: 3}),
        *puts("first", {0: 3}),
    ],
    "plain": [
        *STARTS,
        *PUTS,
        *_gets(PAIR),
        SET_CAUSAL,
        RESERVE,
        *PROGRAMS,
        TAKE_STATE,
        ASSIGN_STATE,
        *BETWEEN,
    ],
    "crowded": [
        start("spill", {0: 3}),
        start("spill one", {0: 1}),
        TIGHT_STEPS,
        RESTORE_HELD,
        ON_HOST,
        CLOSE,
    ],
    "windowed": [*STARTS, *PUTS[2:], *PROGRAMS, *BETWEEN],
    "paged": [
        start("second", {1: 1}),
        start("pair", {0: 1, 1: 2}),
        *puts("pair", {0: 1, 1: 2}, (0,)),
        PROGRAMS[0],
        *RESTORES,
    ],
    "one window": [start("one", ONE), start("three", {0: 3}), *PUTS[:2], PROGRAMS[0]],
    "scattered": [*puts("scattered", {1: 4}), REMOVE_MIDDLE, PROGRAMS[0]],
    "arriving": [
        *puts("one", ONE),
        *_gets(ONE),
        REMOVE_MIDDLE,
        TAKE_STATE,
        PROGRAMS[0],
        *CHANGES,
        *CUTS,
    ],
    "wrapper": [
        *STARTS,
        *(a for n in range(1, 4) for a in puts("pair", PAIR, [n])),
        *puts("image", {2: 2}, [4, 5]),
        *BETWEEN,
    ],
    "shifting wrapper": [REMOVE_MIDDLE, *puts("pair", PAIR, [2])],
    "encoder": [*puts("image", THREE), *_gets(PAIR), *CHANGES, *RESTORES],
    "bfloat16": [TAKE_STATE, ASSIGN_STATE, PROGRAMS[0]],
}

IN_PASS = ("start_forward", "put", "get", "set_causal", "reserve", "plan")


def _scenario(state, act):
    in_pass = act.name.startswith(IN_PASS)
    laters = (
        (goes_on, gives_up) if in_pass and state in ("plain", "windowed", "wrapper") else (goes_on,)
    )
    return Scenario(state, STATES[state], act, laters, in_pass)


SCENARIOS = [_scenario(state, act) for state, acts in ACTS.items() for act in acts]
