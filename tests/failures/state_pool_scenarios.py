"""Scenarios of recurrent states in pools, alone and beside keys and values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvcache import CausalCache, RecurrentCache, WrapperCache, functional

from .. import peek
from .observation import Bits, attempt, attended, parts
from .pool_scenarios import (
    BETWEEN,
    CLOSE,
    ON_HOST,
    ONE,
    PAIR,
    RESERVE,
    STARTS,
    in_pass,
    init,
    puts,
    start,
)
from .pool_world import LAYERS, Got, PoolWorld, following, gives_up, goes_on, held
from .scenario import Act, Scenario


class StateWorld(PoolWorld):
    """A pool with recurrent layers. The state behind a token is its stamp and position."""

    def put(self, arrays, frames):
        cache = getattr(self.cache, "underlying_cache", self.cache)
        if not isinstance(cache, RecurrentCache):
            super().put(arrays, frames)
            return
        tokens = np.asarray(self.backend.to_host(arrays[0]))[0]
        ends = [run.stop - 1 for run in self.cache.runs]
        at_cuts = {
            (run.sequence, position): self.states(
                tokens, [run.start + position - run.position - 1], len(arrays)
            )
            for run in self.cache.runs
            for position in run.cuts
        }
        self.cache.put_states(*self.states(tokens, ends, len(arrays)), kept=at_cuts)

    def states(self, tokens, index, count):
        """Return states of `count` arrays behind the tokens at `index`."""
        return [self.array(tokens[index] * (number + 1)) for number in range(count)]

    def fill(self, arrays, frames):
        """Get and put all layers; one that was put last of all is put once only."""
        seen = []
        for cache, layer in self.layers():
            if isinstance(cache, RecurrentCache):
                seen.append(attempt(_states_seen, self))
            error = attempt(self.put, arrays if layer == 0 else arrays[:1], frames)
            seen.append(error if isinstance(cache, RecurrentCache) else attempt(_got, self))
        return seen

    def orphans(self):
        known = {id(rows) for rows in self.known_rows()}
        pinned = [
            rows
            for cache in parts(self.cache)
            if isinstance(cache, RecurrentCache)
            for rows in peek.state_rows(cache)
        ]
        return super().orphans() + sum(id(rows) not in known for rows in pinned)


def _states_seen(world):
    states = world.cache.get_states()
    return None if states is None else [Bits(world.backend.to_host(array)) for array in states]


def _got(world):
    return attended(world.backend, world.cache)


# Programs.


def _tokens(tokens):
    """Return a preparation of a batch."""

    def prepare(world):
        positions = {s: following(world.cache, s, count) for s, count in tokens.items()}
        world.given, world.arrays, _ = world.batch(positions)
        stops = np.cumsum([*tokens.values()])
        world.ends = (stops - 1).tolist()

    return prepare


def _plan(world):
    world.plan = world.cache.plan(world.given)


def _plan_steps(world):
    world.plan = world.cache.plan_steps(world.given, 2)


def _by_program(world, step=None):
    """Apply the plan of this world, or one of its steps; observe what the program is given."""
    several = isinstance(world.cache, WrapperCache)
    plans = world.plan if several else [world.plan]
    triples = zip(parts(world.cache), plans, _each(world.cache.program_state), strict=True)
    written = [_applied(world, *triple, step) for triple in triples]
    after = tuple(state for state, _ in written)
    world.cache.program_state = after if several else after[0]
    return [seen for _, seen in written]


def _each(states):
    return states if isinstance(states, tuple) else [states]


def _applied(world, cache, plan, state, step):
    """Return the state that a program makes of the buffers of one cache, and what it was given."""
    if step is not None:
        plan = type(plan)(*(_nth(leaf, step) for leaf in plan))
    hosts, seen = np.asarray(world.backend.to_host(world.arrays[0]))[0], []
    for layer in range(LAYERS):
        count = 2 if layer == 0 else 1
        if isinstance(cache, RecurrentCache):
            given = functional.get_states(state, plan, layer)
            seen.append([Bits(world.backend.to_host(array)) for array in given])
            news = world.states(hosts, world.ends, count)
            state = functional.put_states(state, plan, layer, *news)
        else:
            state = functional.put(state, plan, layer, *world.arrays[:count])
            seen.append(attended(world.backend, Got(functional.get(state, plan, layer))))
    return state, seen


def _nth(leaf, step):
    if leaf is None:
        return None
    if isinstance(leaf, dict):
        return {key: _nth(own, step) for key, own in leaf.items()}
    return leaf[step] if isinstance(leaf, list) else leaf[step, ...]


def _finish_plan(world):
    world.seen = _by_program(world)


def _finish_steps(world):
    world.seen = [_by_program(world, step) for step in range(2)]


def _take_state(world):
    world.state = world.cache.program_state


def _state_given(world):
    """Let a program make a pass, whose result is still to be assigned."""
    _tokens(PAIR)(world)
    _plan(world)
    states = world.cache.program_state
    plans = world.plan if isinstance(states, tuple) else [world.plan]
    triples = zip(parts(world.cache), plans, _each(states), strict=True)
    written = tuple(_applied(world, *triple, None)[0] for triple in triples)
    world.state = written if isinstance(states, tuple) else written[0]


def _assign_state(world):
    world.cache.program_state = world.state


PROGRAMS = [
    Act("plan", _plan, _tokens(PAIR), _finish_plan),
    Act("plan_steps", _plan_steps, _tokens({0: 1, 1: 1}), _finish_steps),
    Act("take program_state", _take_state, silent=True),
    Act("assign program_state", _assign_state, _state_given),
]

# States.


def _pool(place, *caches, resume_points=4):
    recurrent = RecurrentCache(resume_points)
    return StateWorld(place, recurrent, *caches, capacity=7).initialised()


def _filled(place, *caches):
    """Fill two sequences with a common prefix, and keep a snapshot of one in its slots."""
    world = _pool(place, *caches)
    world.cache.schedule(0, [1, 2, 7])
    world.run({0: range(4)})
    world.cache.copy_prefix(0, 1, 2)
    world.run({1: [2]})
    world.run({0: [4], 1: [3]})
    return held(world, 0)


def _crowded(place):
    """Leave no slot free but those that give way: of a snapshot, and of kept states."""
    world = _pool(place, resume_points=3)
    world.cache.schedule(0, [1, 2, 3])
    world.run({0: range(4)})
    held(world, 0)
    world.cache.remove(0, 2)
    world.cache.schedule(1, [1, 2])
    world.run({1: range(3)})
    world.run({2: range(2)})
    return held(world, 1, "second")


def _drafted(place, *caches):
    """Leave a complete draft behind, of which nothing was accepted yet."""
    world = _pool(place, *caches, resume_points=6)
    world.cache.schedule(0, [1, 2, 6])
    world.run({0: range(4), 1: range(2)})
    world.cache.checkpoint(0)
    world.run({0: range(4, 7)})
    return held(world, 0)


STATES = {
    "new states": _pool,
    "no states": lambda place: StateWorld(place, RecurrentCache()),
    "states": _filled,
    "crowded states": _crowded,
    "states beside keys": lambda place: _filled(place, CausalCache(window=3), CausalCache()),
    "drafted states": _drafted,
    "drafted states beside keys": lambda place: _drafted(place, CausalCache()),
}


def _get(world):
    world.cache.get_states()


def _checkpoint(world):
    world.cache.checkpoint(0)


def _marked(act):
    """Return an act whose pass is a draft."""

    def prepare(world):
        _checkpoint(world)
        act.prepare(world)

    return replace(act, name=f"{act.name} draft", prepare=prepare)


DRAFTS = [
    Act("checkpoint", _checkpoint),
    Act("remove rejected", lambda world: world.cache.remove(0, 5)),
    _marked(start("pair", {0: 3, 1: 1})),
    *map(_marked, puts("pair", {0: 3, 1: 1})),
    *map(_marked, PROGRAMS[:2]),
]
CUT = {0: 3}
GET = in_pass("get", PAIR, 0, _get)
ACTS = {
    "no states": [Act("init", init)],
    "new states": [start("first", {0: 3}), *puts("first", {0: 3})],
    "states": [
        *STARTS,
        start("cut", CUT),
        *puts("one", ONE),
        *puts("pair", PAIR),
        *puts("cut", CUT),
        GET,
        RESERVE,
        *PROGRAMS,
        *BETWEEN,
    ],
    "crowded states": [
        start("spill", {0: 3, 1: 1, 2: 1}),
        *puts("spill", {0: 3, 1: 1, 2: 1}),
        ON_HOST,
        CLOSE,
    ],
    "states beside keys": [
        *STARTS,
        *(act for number in range(1, 4) for act in puts("pair", PAIR, [number])),
        *PROGRAMS,
        *BETWEEN,
    ],
    "drafted states": [*DRAFTS, *STARTS, *puts("pair", PAIR), *PROGRAMS[:2], *BETWEEN],
    "drafted states beside keys": DRAFTS,
}


def _scenario(state, act):
    passes = act.name.startswith(("start_forward", "put", "get", "reserve", "plan"))
    return Scenario(
        state, STATES[state], act, (goes_on, gives_up) if passes else (goes_on,), passes
    )


SCENARIOS = [_scenario(state, act) for state, acts in ACTS.items() for act in acts]
"""Every scenario of recurrent states in pools."""
