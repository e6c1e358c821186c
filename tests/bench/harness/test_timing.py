"""Who is timed how often and how long, on a clock that only the contestants move."""

import gc
from itertools import pairwise

import pytest

from kvcache.bench.harness import timing
from kvcache.bench.harness.contest import Contestant
from kvcache.bench.harness.timing import BLOCK_MICROSECONDS, interleave


class Clock:
    """Stands still unless somebody works."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def contestant(self, name, us):
        def run(steps):
            self.log.append((name, "run", steps))
            self.now += steps * us * 1e-6

        def rewind(steps):
            self.log.append((name, "rewind", steps))
            self.now += 1.0

        return Contestant(name, run, rewind)


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(timing, "perf_counter", lambda: fake.now)
    monkeypatch.setattr(timing, "SLOW_EVERY", 10)
    return fake


def timed(clock, us, limit=256, rounds=3):
    (blocks,) = interleave([(clock.contestant("a", us), limit)], rounds, lambda: None, lambda: None)
    return blocks


@pytest.mark.parametrize("us", [0.5, 7.0, 90.0, 40_000.0])
def test_time_per_step_is_exact_and_leaves_rewinding_out(clock, us):
    assert timed(clock, us).us == pytest.approx([us] * len(timed(clock, us).us))


@pytest.mark.parametrize(
    ("us", "steps"), [(0.5, 256), (7.0, 64), (90.0, 4), (400.0, 1), (40_000.0, 1)]
)
def test_blocks_last_about_as_long_whatever_a_step_takes(clock, us, steps):
    blocks = timed(clock, us)
    assert blocks.steps == steps
    assert steps in {1, 256} or BLOCK_MICROSECONDS / 2 < us * steps <= BLOCK_MICROSECONDS


def test_a_block_never_exceeds_its_limit_and_is_rewound_first(clock):
    assert timed(clock, 0.5, limit=10).steps == 10
    # Untimed steps first: five of them before the ten.
    assert clock.log[-3:] == [("a", "rewind", 15), ("a", "run", 5), ("a", "run", 10)]


def test_the_slow_have_fewer_turns(clock):
    assert len(timed(clock, 4_900.0, rounds=21).us) == 21
    assert len(timed(clock, 5_100.0, rounds=21).us) == 3


def test_everyone_has_a_turn_in_every_round_in_changing_order(clock):
    names = "abcd"
    contestants = [(clock.contestant(name, 400.0), 1) for name in names]
    ticks = []
    interleave(contestants, 20, lambda: None, lambda: ticks.append(len(clock.log)))
    assert len(ticks) == 21
    orders = [
        "".join(name for name, what, _ in clock.log[start:stop] if what == "rewind")
        for start, stop in pairwise(ticks)
    ]
    assert all(sorted(order) == list(names) for order in orders)
    assert len(set(orders)) > 5


def test_a_device_is_waited_for_before_and_after_each_block(clock):
    contestant = clock.contestant("a", 400.0)
    wait = lambda: clock.log.append(("a", "wait", 0))  # noqa: E731
    interleave([(contestant, 1)], 1, wait, lambda: None)
    assert [what for _, what, _ in clock.log[-5:]] == ["rewind", "run", "wait", "run", "wait"]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_meanwhile_and_is_as_before_afterwards(clock, enabled):
    seen = []
    observer = Contestant("a", lambda _: seen.append(gc.isenabled()))
    was_on = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        interleave([(observer, 1)], 2, lambda: None, lambda: None)
        assert gc.isenabled() is enabled
        assert seen[-4:] == [False] * 4
    finally:
        (gc.enable if was_on else gc.disable)()


def test_the_collector_comes_back_after_an_error():
    def fail(steps):
        if not gc.isenabled():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interleave([(Contestant("a", fail), 1)], 1, lambda: None, lambda: None)
    assert gc.isenabled()
