"""Scenarios of recurrent layers, alone and beside layers with keys and values."""

from __future__ import annotations

from kvcache import KVCache, RotatingKVCache, StateCache, functional

from .layer_scenarios import (
    CONCAT,
    FEWER,
    FOR_ANY,
    MORE,
    PAD_ALL,
    PADDING,
    REORDER,
    RESTORE,
    RING,
    ROLLBACKS,
    SELECT_ALL,
    SPLIT,
    STEP,
    LayerWorld,
    goes_on,
    rolls_back,
    state_behind,
)
from .observation import attempt
from .scenario import Act, Scenario


def _recurrent(place, *counts, points=(), backend=True, rows=1):
    world = LayerWorld(place, StateCache(place.backend if backend else None), rows=rows)
    world.caches.schedule(points)
    world.feed(*counts)
    return world


def _hybrid(place, *counts, points=(), rows=1, padding=()):
    world = LayerWorld(
        place,
        StateCache(place.backend),
        KVCache(place.backend, step=STEP),
        RotatingKVCache(**RING, backend=place.backend),
        rows=rows,
    )
    world.caches.pad(padding)
    world.caches.schedule(points)
    world.feed(*counts)
    return world


def _held(world):
    """Take a snapshot that stays resident, and go on."""
    world.snapshots["held"] = world.caches.snapshot()
    world.feed(1)
    return world


def _with_checkpoint(world, *counts):
    world.caches.checkpoint()
    world.feed(*counts)
    return world


def _announced(world, recorded=True):
    """Announce an update of 4 tokens, and record one state inside of it."""
    [pair, *_] = world.tokens(4)
    cuts = world.cache.cuts(4)
    if recorded:
        world.cache.record(cuts[0], *state_behind(pair, 1))
    return world


STATES = {
    "no state": _recurrent,
    "unbound state": lambda place: _recurrent(place, backend=False),
    "state": lambda place: _held(_recurrent(place, 2)),
    "state kept": lambda place: _held(_recurrent(place, 3, 4, points=[2, 5, 7, 20])),
    "state checkpoint": lambda place: _held(_with_checkpoint(_recurrent(place, 3), 1, 2)),
    "state announced": lambda place: _announced(_recurrent(place, 3, points=[4, 6])),
    "no state announced": lambda place: _announced(_recurrent(place, points=[1], backend=False)),
    "state to record": lambda place: _announced(_recurrent(place, 3, points=[4, 6]), False),
    "first state to record": lambda place: _announced(
        _recurrent(place, points=[1], backend=False), False
    ),
    "empty hybrid": _hybrid,
    "hybrid": lambda place: _held(_hybrid(place, 2, 1, points=[1, 3])),
    "hybrid checkpoint": lambda place: _held(_with_checkpoint(_hybrid(place, 7, points=[8]), 1, 2)),
    "rows of states": lambda place: _held(_recurrent(place, 3, 4, points=[2, 5, 7, 20], rows=3)),
    "rows announced": lambda place: _announced(_recurrent(place, points=[1], rows=3)),
    "padded hybrid": lambda place: _held(
        _hybrid(place, 7, 1, points=[4, 8], rows=3, padding=PADDING)
    ),
    "hybrid rows checkpoint": lambda place: _held(
        _with_checkpoint(_hybrid(place, 7, points=[8], rows=3), 1, 2)
    ),
}


def _given(count):
    def prepare(world):
        [world.given, *_] = world.tokens(count)

    return prepare


def _advancing(count):
    def run(world):
        world.cache.advance(count, *state_behind(world.given, count))

    return Act(f"advance {count}", run, _given(count))


def _record(world):
    world.cache.record(world.cache.offset + 1, *state_behind(world.given, 1))


def _announce_again(world):
    world.cache.cuts(3)


def _export(world):
    world.given = world.cache.export_state()


def _step(world):
    """Let a program take a step with an exported state."""
    [pair, *_] = world.tokens(1)
    world.given = functional.advance(world.given, 1, *state_behind(pair, 1))


def _lend(world):
    _export(world)
    _step(world)


def _give_back(world):
    world.cache.import_state(world.given)


def _come_back(world):
    _step(world)
    _give_back(world)


def _comes_as_announced(world):
    """Let the update announced come, and see what was recorded inside of it."""
    [pair, *_] = world.tokens(4)
    error = attempt(world.cache.advance, 4, *state_behind(pair, 4))
    return {"error": error, "state": world.look(), "later": goes_on(world)}


ADVANCES = [_advancing(count) for count in (1, 4)]
RECORD = Act("record", _record, _given(1))
ANNOUNCE = Act("cuts", _announce_again)
# The states of the draft before are dropped.
CHECKPOINT_ANEW = Act("checkpoint", lambda world: world.caches.checkpoint())
TRIM = Act("trim", lambda world: world.caches.trim(1))
PROGRAMS = [
    Act("export_state", _export, finish=_come_back),
    Act("import_state", _give_back, _lend),
]

ACTS = {
    "no state": [ADVANCES[0], RESTORE],
    "unbound state": [ADVANCES[1], RESTORE],
    "state": [*ADVANCES, *FOR_ANY, *PROGRAMS],
    "state kept": [*ADVANCES, TRIM, *FOR_ANY, *PROGRAMS],
    "state checkpoint": [*ADVANCES, *ROLLBACKS, TRIM, FOR_ANY[1], PROGRAMS[1]],
    "state announced": [*ADVANCES, ANNOUNCE, FOR_ANY[1]],
    "no state announced": [*ADVANCES, FOR_ANY[1]],
    "state to record": [RECORD],
    "first state to record": [RECORD],
    "empty hybrid": [RESTORE, PAD_ALL],
    "hybrid": [TRIM, *FOR_ANY],
    "hybrid checkpoint": [*ROLLBACKS, CHECKPOINT_ANEW, *FOR_ANY[1:]],
    "rows of states": [REORDER, FEWER, SPLIT],
    "rows announced": [MORE],
    "padded hybrid": [SELECT_ALL, SPLIT, CONCAT],
    "hybrid rows checkpoint": [SELECT_ALL],
}


def _laters(state, act):
    if "checkpoint" in act.name:
        return (rolls_back(0),)
    if "checkpoint" in state:
        return (goes_on, rolls_back(1))
    return (goes_on, _comes_as_announced) if "record" in act.name else (goes_on,)


SCENARIOS = [
    Scenario(state, STATES[state], act, _laters(state, act))
    for state, acts in ACTS.items()
    for act in acts
]
"""Every scenario of recurrent layers."""
