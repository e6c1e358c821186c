"""The one rule of attention, against a loop over positions."""

import itertools

import numpy as np
import pytest

from kvcache.snapshots.visibility import Visibility

RULES = [
    Visibility(window, chunk, sinks)
    for window, chunk, sinks in itertools.product((None, 0, 1, 3), (None, 1, 4), (0, 2))
]
POSITIONS = range(14)


def sees(rule, query, column):
    """By the words of the docstring, one token at a time."""
    if not 0 <= column <= query:
        return False
    if column < rule.sinks:
        return True
    in_window = rule.window is None or query - column <= rule.window
    in_chunk = rule.chunk is None or query // rule.chunk == column // rule.chunk
    return in_window and in_chunk


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_sees(rule):
    queries, columns = np.arange(14)[:, None], np.arange(-1, 14)[None, :]
    expected = [[sees(rule, q, c) for c in range(-1, 14)] for q in POSITIONS]
    np.testing.assert_array_equal(rule.sees(queries, columns), expected)
    # A traced number of sinks stands for that of the rule.
    plain, sinks = rule._replace(sinks=0), np.asarray(rule.sinks)
    np.testing.assert_array_equal(plain.sees(queries, columns, sinks), expected)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_lowest_is_the_first_position_seen_sinks_aside(rule):
    plain = rule._replace(sinks=0)
    expected = [min(c for c in range(q + 1) if sees(plain, q, c)) for q in POSITIONS]
    assert rule.lowest(np.arange(14, dtype=np.int32)).tolist() == expected
    assert int(rule.lowest(np.array(13))) == expected[13]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_needed_is_all_that_the_next_token_sees(rule):
    """With chunks the last token, too: a sequence knows its position from it."""
    held = np.arange(14, dtype=np.int32)
    for position in POSITIONS:
        seen = [c for c in range(position) if sees(rule, position, c)]
        knows = [position - 1] if position and rule.chunk and rule.window != 0 else []
        needed = held[rule.needed(held, position)].tolist()
        if rule.window == 0:  # nothing is needed, but sinks
            assert needed == list(range(min(rule.sinks, position)))
        else:
            assert set(seen) <= set(needed)
            assert set(needed) <= {*seen, *knows, *range(min(rule.sinks, position))}
            assert set(knows) <= set(needed)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_last_resumable_is_the_last_position_whose_needs_are_held(rule):
    random = np.random.default_rng(0)
    for density in (0.2, 0.6, 0.95):
        held = np.flatnonzero(random.random(14) < density).astype(np.int32)
        for limit in range(14):
            found = rule.last_resumable(held, limit)
            if rule.window == 0:
                assert found == limit
                continue
            possible = [
                p
                for p in range(1, limit + 1)
                if p - 1 in held
                and set(np.arange(14)[rule.needed(np.arange(14), p)]) <= set(held.tolist())
            ]
            assert found == max(possible, default=0)


@pytest.mark.parametrize("rule", [rule for rule in RULES if not rule.resumable_anywhere], ids=str)
def test_what_several_points_need_is_what_one_of_them_needs(rule):
    random, every = np.random.default_rng(1), np.arange(14, dtype=np.int32)
    assert rule.lowest_needed_by(every).tolist() == [rule.lowest_needed(p) for p in POSITIONS]
    for density in (0.1, 0.3, 0.8):
        points = np.flatnonzero(random.random(14) < density).astype(np.int32) + 1
        for held in (every, every[random.random(14) < 0.6]):
            if points.size:
                needed = np.any([rule.needed(held, int(p)) for p in points], axis=0)
                assert rule.needed_by(held, points).tolist() == needed.tolist()


@pytest.mark.parametrize("rule", [rule for rule in RULES if not rule.resumable_anywhere], ids=str)
@pytest.mark.parametrize("start", [0, 1, 5])
def test_points_to_resume_at_are_those_whose_needs_are_held_or_before(rule, start):
    random, every = np.random.default_rng(2), np.arange(start, 14, dtype=np.int32)
    for density in (0.2, 0.6, 0.95):
        held = every[random.random(every.size) < density]
        points = np.arange(start + 1, 15, dtype=np.int32)
        before = {*range(start), *held.tolist()}
        expected = [set(np.arange(14)[rule.needed(np.arange(14), p)]) <= before for p in points]
        assert rule.resumable_at(held, points, start).tolist() == expected


def test_where_every_prefix_is_of_use():
    assert [rule.resumable_anywhere for rule in (Visibility(), Visibility(0), Visibility(2))] == [
        True,
        True,
        False,
    ]
