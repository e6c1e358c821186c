"""Recorded traces of the original step cache: what ours does alike, and what on purpose not.

The replay holds arrays through the cache alone, so that one is gone when the cache lets go of it.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import pytest

from kvcache import BoundsError
from kvcache.diffusion.step_cache import StepCache

DATA = Path(__file__).parents[1] / "data" / "step.json.gz"
TRACES = json.loads(gzip.decompress(DATA.read_bytes()))


@dataclass(eq=False)
class Feature:
    """An array, as far as the cache is concerned."""

    number: int


class Replay:
    """A cache that goes through a trace, and which array each slot must hold by now."""

    def __init__(self, trace):
        self.cache = StepCache(trace["num_layers"])
        self.alive = WeakValueDictionary()
        self.slots = {}

    def step(self, op):
        """Does `op` as recorded; returns in what way ours differs, "" if it does not."""
        before = set(self.alive)
        result, error = self._attempt(op)
        if error is None and op["op"].startswith("set"):
            self.slots[slot(op)] = op["array"]
        if op["op"] == "free":
            self.slots.clear()
        held = set(self.slots.values()) - {None}
        assert set(self.alive) == held, "alive is what is held, no more and no less"
        if error is not None:
            assert not op["freed"]
            assert before == held, "a call that raises loses nothing"
            return refused(op, error, self.cache.num_layers)
        assert not op["err"]
        return told_twice(op, result) or freed_otherwise(op, before - held, held)

    def _attempt(self, op):
        try:
            return self._do(op), None
        except (BoundsError, ValueError) as error:
            return None, error.with_traceback(None)  # whose frames hold the array

    def _do(self, op):
        """What the cache returns, with numbers for arrays."""
        cache, name = self.cache, op["op"]
        match name:
            case "get" | "get2":
                return number(cache.get(op["layer"], int(name == "get2")))
            case "set" | "set2":
                return cache.set(op["layer"], self._array(op), int(name == "set2"))
            case "get_constant":
                return number(cache.constant)
            case "set_constant":
                cache.constant = self._array(op)
                return None
            case "should_refresh":
                return cache.should_refresh(op["step"], op["interval"])
            case "arrays":
                return list(map(number, cache.arrays()))
            case "num_layers":
                return cache.num_layers
            case "free":
                return cache.free()
        raise AssertionError(name)

    def _array(self, op):
        which = op["array"]
        return which and self.alive.setdefault(which, Feature(which))


def number(array):
    return None if array is None else array.number


def slot(op):
    return op["op"], op.get("layer")


# The differences. Each function asserts the whole of what it names.


def refused(op, error, num_layers):
    """An address or interval that makes no sense: ignored, answered or a panic there."""
    if op["op"] == "should_refresh":
        assert isinstance(error, ValueError)
        if op["interval"] == 0:
            assert op["err"] == "panic: runtime error: integer divide by zero"
            return "interval 0"
        assert not op["err"]
        assert op["result"] is (op["step"] % op["interval"] == 0)
        return "negative step" if op["step"] < 0 else "negative interval"
    assert isinstance(error, BoundsError)
    if op["layer"] < 0:
        assert op["err"] == f"panic: runtime error: index out of range [{op['layer']}]"
        return "negative layer"
    assert op["layer"] >= num_layers
    assert (op["result"], op["err"]) == (None, "")
    return "layer beyond: " + ("set" if op["op"].startswith("set") else "get")


def told_twice(op, result):
    """`arrays` lists an array once for each slot there."""
    if result == op["result"]:
        return ""
    assert (op["op"], op["freed"]) == ("arrays", [])
    assert result == list(dict.fromkeys(op["result"]))
    return "listed twice"


def freed_otherwise(op, freed, held):
    """There an array is freed by the first of its slots that lets go of it, here by the last."""
    if sorted(op["freed"]) == sorted(freed):  # in what order memory goes is the interpreter's
        return ""
    assert freed == set(op["freed"]) - held
    assert held & set(op["freed"])
    return "freed while held"


def replayed(trace):
    replay = Replay(trace)
    return Counter(replay.step(op) for op in trace["ops"])


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: str(trace["seed"]))
def test_replays(trace):
    assert sum(replayed(trace).values()) == len(trace["ops"])


def test_how_often_ours_differs():
    found = sum(map(replayed, TRACES), Counter())
    assert found == {
        "": 663,
        "layer beyond: set": 179,
        "layer beyond: get": 99,
        "negative layer": 12,
        "negative interval": 6,
        "negative step": 3,
        "interval 0": 2,
        "freed while held": 4,
        "listed twice": 4,
    }
    assert found.total() == 972
    assert len(TRACES) == 24
