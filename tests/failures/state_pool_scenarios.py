"""Scenarios of recurrent states in pools, alone and beside keys and values."""

from __future__ import annotations

import numpy as np

from kvcache import CausalCache, RecurrentCache

from .. import peek
from .observation import Bits, attempt, parts
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
from .pool_world import PoolWorld, gives_up, goes_on, held
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
            (run.sequence, position): self._states(
                tokens, [run.start + position - run.position - 1], len(arrays)
            )
            for run in self.cache.runs
            for position in run.cuts
        }
        self.cache.put_states(*self._states(tokens, ends, len(arrays)), kept=at_cuts)

    def _states(self, tokens, index, count):
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
    arrays = world.cache.get()
    return [None if array is None else Bits(world.backend.to_host(array)) for array in arrays]


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


STATES = {
    "new states": _pool,
    "no states": lambda place: StateWorld(place, RecurrentCache()),
    "states": _filled,
    "crowded states": _crowded,
    "states beside keys": lambda place: _filled(place, CausalCache(window=3), CausalCache()),
}


def _get(world):
    world.cache.get_states()


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
        *BETWEEN,
    ],
}


def _scenario(state, act):
    passes = act.name.startswith(("start_forward", "put", "get", "reserve"))
    return Scenario(
        state, STATES[state], act, (goes_on, gives_up) if passes else (goes_on,), passes
    )


SCENARIOS = [_scenario(state, act) for state, acts in ACTS.items() for act in acts]
"""Every scenario of recurrent states in pools."""
