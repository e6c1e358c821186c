"""Recorded traces of the Go caches that these ones stand in for.

``imagegen_kv`` replays exactly. ``imagegen_rotating`` is replayed against the truth instead: its
recordings themselves show where the original loses, misplaces or invents tokens.
"""

import gzip
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcache import KVCache, RotatingKVCache

from .oracle import Oracle, Token, check_columns, check_state, host_rows, rows

DATA = Path(__file__).parents[1] / "data"
Host = np.ndarray[Any, Any]


@cache
def traces(kind):
    """The traces of one kind."""
    with gzip.open(DATA / f"{kind}.json.gz", "rt") as file:
        return json.load(file)


def incoming(op):
    """Keys and values of a recorded update: consecutive numbers."""
    parts = ((op["k_first"], op["k_shape"]), (op["v_first"], op["v_shape"]))
    keys, values = (
        np.arange(first, first + np.prod(shape), dtype=np.float32).reshape(shape)
        for first, shape in parts
    )
    return keys, values


def outgoing(op):
    """Keys and values that the original returned."""
    keys, values = (
        np.array(op[f"out_{part}"], np.float32).reshape(op[f"out_{part}_shape"]) for part in "kv"
    )
    return keys, values


def test_imagegen_kv_replays_exactly(backend):
    updates = 0
    for trace in traces("imagegen_kv"):
        cache = KVCache(backend, step=trace["step"])
        for op in trace["ops"]:
            if op["op"] == "reset":
                cache.reset()
                assert cache.state == ()
                assert cache.nbytes == 0
            else:
                updates += 1
                _replay(backend, cache, op)
            assert (cache.offset, cache.len) == (op["offset"], op["len"])
    assert updates > 450


def _replay(backend, cache, op):
    keys, values = incoming(op)
    returned = cache.update(backend.from_host(keys), backend.from_host(values))
    for got, recorded in zip(returned, outgoing(op), strict=True):
        columns = backend.to_host(got)
        if backend.config.padding == 1:
            assert columns.shape == recorded.shape
        np.testing.assert_array_equal(columns[:, :, : op["len"]], recorded)
    for got, recorded in zip(cache.state, outgoing(op), strict=True):
        np.testing.assert_array_equal(backend.to_host(got)[:, :, : op["len"]], recorded)
    # The growth of the allocation differs on purpose; it must only never be too small.
    assert cache.nbytes >= keys[:, :, :1].nbytes * op["len"] + values[:, :, :1].nbytes * op["len"]


def test_every_query_of_imagegen_rotating_sees_its_true_window(backend):
    queries = 0
    recorded = traces("imagegen_rotating")
    if backend.name == "jax":
        recorded = recorded[::6]  # every shape is compiled: all of them would take half a minute
    for trace in recorded:
        cache = RotatingKVCache(trace["max_size"], backend=backend, step=trace["step"])
        oracle = Oracle(trace["max_size"])
        for op in trace["ops"]:
            if op["op"] == "reset":
                cache.reset()
                oracle.cut(0)
            else:
                keys, values = incoming(op)
                device = backend.from_host(keys), backend.from_host(values)
                columns = host_rows(backend, cache.update(*device))
                oracle.tokens += map(Token, rows(keys), rows(values))
                check_columns(cache, oracle, columns, op["seq_len"])
                queries += op["seq_len"]
            check_state(cache, oracle)
            assert (cache.offset, cache.len) == (op["offset"], min(op["offset"], trace["max_size"]))
    assert queries > (400 if backend.name == "jax" else 1000)


# What the original does instead.

ZERO = None
"""A column that no token was ever written to."""


def recorded_positions(history, op):
    """Positions of the columns that the original returned."""
    where = {token: position for position, token in enumerate(history)}
    columns = [Token(*row) for row in zip(*map(rows, outgoing(op)), strict=True)]
    zero = Token(bytes(len(columns[0].key)), bytes(len(columns[0].value)))
    return [ZERO if column == zero else where[column] for column in columns]


def deviations(trace):
    """For each recorded update, by its index among the ops, how it deviates from the true window.

    "cut": the oldest tokens of some query's window are missing. A prefill is cut down to max_size
        before attention, so that only its last query sees its whole window.
    "misplaced": a token of the window is missing although an older one is there, or the columns
        of several tokens are out of order, so that a causal mask hides the wrong ones. A prefill
        after rotation takes the order in the ring for the order of age.
    "zero": a column was never written. Decoding allocates ahead, a prefill appends behind that.
    """
    found = []
    history = []
    for index, op in enumerate(trace["ops"]):
        if op["op"] == "reset":
            history = []
            continue
        oldest = max(0, len(history) - trace["max_size"] + 1)
        history += [Token(*row) for row in zip(*map(rows, incoming(op)), strict=True)]
        columns = recorded_positions(history, op)
        seen = [position for position in columns if position is not None]
        missing = set(range(oldest, len(history))) - set(seen)
        first = min(seen, default=len(history))
        kinds = {
            "cut": any(position < first for position in missing),
            "misplaced": any(position > first for position in missing)
            or (op["seq_len"] > 1 and seen != sorted(seen)),
            "zero": ZERO in columns,
        }
        found.append((index, {kind for kind, is_so in kinds.items() if is_so}))
    return found


EXAMPLES = {
    "cut": ("prefill > max, decode", 0),
    "misplaced": ("prefill again after rotation (order no longer by age)", 7),
    "zero": ("decode first: zero slots in front of prefill", 3),
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_original_deviates_in_a_named_trace(kind):
    name, index = EXAMPLES[kind]
    (trace,) = (trace for trace in traces("imagegen_rotating") if trace["name"] == name)
    assert kind in dict(deviations(trace))[index]


def test_how_often_the_original_deviates():
    """The numbers that docs/semantics.md cites."""
    found = [[kinds for _, kinds in deviations(trace)] for trace in traces("imagegen_rotating")]
    updates = Counter(kind for trace in found for kinds in trace for kind in kinds)
    deviating = Counter(kind for trace in found for kind in set().union(*trace))
    assert updates == {"cut": 276, "misplaced": 97, "zero": 28}
    assert deviating == {"cut": 48, "misplaced": 29, "zero": 10}
    assert sum(map(len, found)) == 1076
    assert sum(bool(kinds) for trace in found for kinds in trace) == 340
    assert sum(any(trace) for trace in found) == 50
    assert len(found) == 55
