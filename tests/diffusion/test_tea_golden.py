"""Recorded traces of the original TeaCache: what ours does alike, and what on purpose not.

Each fault of the original that ours leaves out can be switched in a small model of it. With all of
them the model is the recording, with none it is ours: so nothing else differs. Every trace counts
its steps upwards and gives finite timesteps, as both demand.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import pytest

from kvcache.diffusion import Accumulated, Limits, Recipe, TeaCache, TimestepChange

DATA = Path(__file__).parents[1] / "data" / "teacache.json.gz"
TRACES = json.loads(gzip.decompress(DATA.read_bytes()))
each_trace = pytest.mark.parametrize("trace", TRACES, ids=lambda trace: str(trace["seed"]))

TWICE = "what was skipped counts again"
"""A change is that since the last computed step, and so are those before it, each added up."""
WAITS = "a time counts once it is updated"
"""A step that is computed, but never updated, leaves the time where it was."""
SURVIVES = "drift survives a free"
HALF = "half a pair is nothing"
"""With one output of a pair, every step is computed."""
READS = "reads and updates are counted"
"""Hits are reads, also of nothing; misses are updates. Ours are decisions."""
FAULTS = frozenset({TWICE, WAITS, SURVIVES, HALF, READS})

SLOTS = {"get_cached": ["output"], "get_cfg_cached": ["cond", "uncond"]}
UPDATES = {
    "update_cache": {"output": "array"},
    "update_cfg_cache": {"cond": "pos", "uncond": "neg"},
}


def settings_of(trace):
    """Threshold, factor and early steps, as float32."""
    config = trace["config"]
    if config is None:
        return float(np.float32(0.1)), 1.0, 0
    threshold, factor = np.float32([config["threshold"], config["rescale_factor"]])
    return float(threshold), float(factor), config["skip_early_steps"]


class Model:
    """The original, in float32, with such of its faults as are asked for."""

    def __init__(self, trace, faults):
        self.threshold, self.factor, self.early = settings_of(trace)
        self.faults = faults
        self.slots = dict.fromkeys(("output", "cond", "uncond"))
        self.drift = self.time = np.float32(0)
        self.counts = Counter[str]()

    def do(self, op):
        name = op["op"]
        if name in SLOTS:
            self.counts["hits"] += READS in self.faults
            found = [self.slots[slot] for slot in SLOTS[name]]
            return found if len(found) > 1 else found[0]
        if name in UPDATES:
            self.slots |= {slot: op[argument] for slot, argument in UPDATES[name].items()}
            self.time = np.float32(op["timestep"])
            self.counts["misses"] += READS in self.faults
        match name:
            case "should_compute":
                return self.decide(op["step"], np.float32(op["timestep"]))
            case "has_cfg_cache":
                return None not in (self.slots["cond"], self.slots["uncond"])
            case "arrays":
                return self.held()
            case "free":
                self.slots = dict.fromkeys(self.slots)
                self.drift = self.drift if SURVIVES in self.faults else np.float32(0)
        return None

    def decide(self, step, time):
        computes = step < self.early or not self.any_held()
        if not computes:
            self.drift = self.drift + abs(time - self.time) * np.float32(self.factor)
            computes = bool(self.drift >= np.float32(self.threshold))
            self.drift = np.float32(0) if computes else self.drift
        if (WAITS if computes else TWICE) not in self.faults:
            self.time = time
        self.counts["misses" if computes else "hits"] += READS not in self.faults
        return computes

    def any_held(self):
        pair = (self.slots["cond"] is not None) + (self.slots["uncond"] is not None)
        return self.slots["output"] is not None or pair >= 1 + (HALF in self.faults)

    def held(self):
        return [number for number in self.slots.values() if number is not None]

    def shown(self):
        return float(self.drift), self.counts["hits"], self.counts["misses"]


@each_trace
def test_with_all_its_faults_the_model_is_the_original(trace):
    model = Model(trace, FAULTS)
    for op in trace["ops"]:
        assert model.do(op) == op["result"]
        recorded = np.float32([op["accumulated_diff"], op["prev_timestep"]])
        assert (model.drift, model.time) == tuple(recorded)
        assert model.shown()[1:] == (op["hits"], op["misses"])


# Ours.


@dataclass(eq=False)
class Output:
    """An array, as far as the cache is concerned."""

    number: int


class Replay:
    """A cache that goes through a trace, and alone holds the arrays."""

    def __init__(self, trace):
        if trace["config"] is None:  # ours has the same defaults, but for float32
            assert TeaCache()._recipe.policy == Accumulated(0.1, (1.0, 0.0), TimestepChange())
            assert TeaCache()._recipe.limits == Limits(max_consecutive_skips=4)
        self.cache = TeaCache(
            *settings_of(trace), streams=("output", "cond", "uncond"), max_consecutive_skips=10**6
        )
        self.alive = WeakValueDictionary()

    def do(self, op):
        """What the cache returns, with numbers for arrays."""
        cache, name = self.cache, op["op"]
        if name in SLOTS:
            found = [number(cache.get(slot)) for slot in SLOTS[name]]
            return found if len(found) > 1 else found[0]
        if name in UPDATES:
            for slot, argument in UPDATES[name].items():
                cache.update(self.array(op[argument]), slot)
        match name:
            case "should_compute":
                return cache.should_compute(op["step"], np.float32(op["timestep"]))
            case "has_cfg_cache":
                return None not in (cache.get("cond"), cache.get("uncond"))
            case "arrays":
                return list(map(number, cache.arrays()))
            case "free":
                cache.free()
        return None

    def array(self, which):
        return which and self.alive.setdefault(which, Output(which))

    def shown(self):
        return self.cache.drift, *self.cache.stats


def number(array):
    return None if array is None else array.number


@each_trace
def test_without_its_faults_the_model_is_ours(trace):
    model, replay = Model(trace, frozenset()), Replay(trace)
    for op in trace["ops"]:
        before = set(replay.alive)
        assert replay.do(op) == model.do(op)
        assert replay.shown() == model.shown()
        assert set(replay.alive) == set(model.held()), "alive is what is held"
        assert sorted(op["freed"]) == sorted(before - set(replay.alive))


def differences(trace, faults):
    """What these faults alone change of what is seen after each op."""
    sound, faulty = Model(trace, frozenset()), Model(trace, faults)
    for op in trace["ops"]:
        if sound.do(op) != faulty.do(op):
            yield f"{op['op']} answers"
        (ours, *counts), (theirs, *reads) = sound.shown(), faulty.shown()
        if op["op"] == "should_compute" and ours != theirs:
            yield "drift"
        if counts != reads:
            yield "counters"


def counted(*faults):
    return sum((Counter(differences(trace, frozenset(faults))) for trace in TRACES), Counter())


DIFFERENT = {
    TWICE: {"should_compute answers": 67, "drift": 195, "counters": 409},
    WAITS: {"should_compute answers": 41, "drift": 129, "counters": 100},
    SURVIVES: {"should_compute answers": 1, "drift": 5, "counters": 29},
    HALF: {"should_compute answers": 7, "drift": 47, "counters": 91},
    READS: {"counters": 1125},
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_how_often_a_fault_makes_a_difference(fault):
    assert counted(fault) == DIFFERENT[fault]


def test_how_often_ours_differs():
    ops = [op["op"] for trace in TRACES for op in trace["ops"]]
    assert (len(TRACES), len(ops), ops.count("should_compute")) == (30, 1450, 674)
    found = counted(*FAULTS)
    assert found == {"should_compute answers": 81, "drift": 217, "counters": 1125}


# The original's rule for drift, by the parts ours is made of.


def decided_by_parts(trace):
    """Each decision: as recorded, and what a recipe makes of changes since the last update."""
    threshold, factor, early = settings_of(trace)
    measure = TimestepChange(since="computed")
    policy = Accumulated(threshold, (factor, 0.0), measure)
    recipe = Recipe(policy, limits=Limits(warmup=early, max_consecutive_skips=10**6))
    past, reference, model = recipe.start(), np.float32(0), Model(trace, FAULTS)
    for op in trace["ops"]:
        if op["op"] == "should_compute":
            past = past if model.any_held() else recipe.start()
            change = measure.change(np, measure.pick(None, np.float32(op["timestep"])), reference)
            computes, past = recipe.decide(np, past, np.int32(op["step"]), change)
            yield op, bool(computes), past.memory[0]
        elif op["op"] in UPDATES:
            reference = np.float32(op["timestep"])
        model.do(op)


def test_the_parts_decide_as_the_original_did():
    """Also in float32, bit by bit; but no recipe lets drift survive a free."""
    found = Counter[str]()
    for trace in TRACES:
        model = Model(trace, FAULTS - {SURVIVES})
        decided = {op["step"]: (computes, drift) for op, computes, drift in decided_by_parts(trace)}
        for op in trace["ops"]:
            answer = model.do(op)
            if op["op"] == "should_compute":
                assert decided[op["step"]] == (answer, model.drift)
                recorded = op["result"], np.float32(op["accumulated_diff"])
                found["same" if decided[op["step"]] == recorded else SURVIVES] += 1
    assert found == {"same": 664, SURVIVES: 10}
