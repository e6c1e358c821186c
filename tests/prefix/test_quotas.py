"""Quotas of salts, and random sessions: what is evicted had to go, to the byte."""

import os
import random
import threading

import pytest

import kvcache

from .retaining import INF, ROW, Model, RetainingSessions
from .served import MODELS, Server, all_spans, check_accounts, check_nothing_left

NUMPY = kvcache.get_backend("numpy")
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"


@pytest.mark.parametrize("seed", range(100 if THOROUGH else 1))
def test_random_sessions_evict_what_may_go_to_the_byte(seed):
    sessions = RetainingSessions(seed)
    for _ in range(250):
        sessions.step()
    for session in sessions.open:
        sessions.end(session)
    sessions.oracle.check()
    assert sessions.oracle.retained_evictions
    check_accounts(sessions.model)


@pytest.mark.parametrize("name", ["full", "per-layer"])
def test_threads_that_retain_and_drop_do_not_wait_for_each_other_for_ever(name):
    server = Server(MODELS[name](NUMPY), budget=2_000, quota=lambda salt: 600 if salt else None)
    errors, passes = [], threading.Lock()

    def serve(number):
        chance = random.Random(number)
        try:
            for _ in range(25):
                ids = [chance.randrange(3) for _ in range(chance.randrange(1, 12))]
                salt, pair = chance.choice(["", "a"]), (chance.randrange(1, 101), INF)
                with passes:  # one at a time, as a runner does; the pool has two sequences
                    session = server.begin(ids, salt=salt, retain=pair)
                    server.compute(session, ids, session.matched)
                    session.commit()
                if chance.random() < 0.3:
                    session.drop_branch(chance.randrange(len(ids)))
                session.close()
                server.prefix.drop_branch(ids, chance.randrange(len(ids)), salt=salt)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test fails
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors
    assert server.prefix.stats.nbytes <= 2_000
    check_accounts(server)
    check_nothing_left(server)


def test_a_salt_above_its_quota_evicts_its_own():
    model = Model(quota=lambda salt: 30 * ROW if salt else None)
    for number in range(5):
        model.now += 1.0
        model.ask([number, *range(9)])
        model.ask([number, *range(9)], salt="a")
    assert [model.stored([n, *range(9)]) for n in range(5)] == [10] * 5
    assert [model.stored([n, *range(9)], salt="a") for n in range(5)] == [0, 0, 10, 10, 10]
    assert model.prefix.stats.nbytes == 80 * ROW


def test_a_quota_takes_the_least_retained_first():
    model = Model(quota=30 * ROW)
    for first, priority in [(1, 9), (2, 8)]:
        model.ask([first, *range(9)], retain=(priority, 60.0))
    for first in (3, 4):
        model.ask([first, *range(9)])
    assert [model.stored([n, *range(9)]) for n in (1, 2, 3, 4)] == [10, 10, 0, 10]
    assert model.prefix.stats.retained_evictions == 0
    model.ask([5, *range(9)], retain=(50, INF))
    model.ask([6, *range(9)], retain=(50, INF))
    assert [model.stored([n, *range(9)]) for n in (1, 2, 4, 5, 6)] == [10, 0, 0, 10, 10]
    assert model.prefix.stats.retained_evictions == 1


def test_a_quota_of_nothing_stores_nothing():
    model = Model(quota=0)
    assert not model.ask([1, 2, 3]).matched
    assert model.prefix.stats.nbytes == 0
    assert model.stored([1, 2, 3]) == 0


def test_more_than_a_quota_is_stored_only_while_it_is_in_use():
    model, ids = Model(quota=10 * ROW), list(range(10))
    model.ask(ids)
    session = model.begin([*ids, 10])
    other = model.begin([*ids, 11])
    model.compute(session, [*ids, 10], 10)
    session.commit()
    assert model.stored([*ids, 10]) == 10, "the last token went, which nobody used"
    model.ask([20, 21])
    assert model.prefix.stats.nbytes == 10 * ROW
    for opened in (session, other):
        opened.close(store=False)
    model.ask([30])
    assert model.prefix.stats.nbytes <= 10 * ROW


def test_under_a_quota_the_newest_turn_outlasts_windows_of_older_ones():
    server = Server(MODELS["rotating"](NUMPY), quota=lambda salt: None if salt else 300)
    ids = []
    for turn in range(5):
        known = len(ids)
        ids += [turn + 1, 7, 8]
        assert server.ask(ids) == known
        assert server.prefix.stats.nbytes <= 300


def test_the_memory_of_quotas_is_counted_and_goes_with_the_salt():
    limited, plain = Model(quota=10 * ROW), Model()
    for model in (limited, plain):
        for number in range(30):
            model.ask([number, 1], salt=str(number))
            model.ask([number, 2], salt=str(number), retain=(5, 60.0))
    more = limited.prefix.stats.index_nbytes - plain.prefix.stats.index_nbytes
    assert 30 * 300 < more < 30 * 1_500
    for model in (limited, plain):
        model.prefix.clear()
        assert not all_spans(model.prefix)
    more = limited.prefix.stats.index_nbytes - plain.prefix.stats.index_nbytes
    assert abs(more) < 1_000, "tables of the trees that are gone"


@pytest.mark.parametrize("error", [ZeroDivisionError("no"), KeyboardInterrupt()])
def test_a_function_of_quotas_that_raises_stores_nothing(error):
    def quota(salt):
        raise error

    model = Model(quota=quota)
    session = model.begin([1, 2])
    model.compute(session, [1, 2], 0)
    with pytest.raises(type(error)):
        session.close()
    stats = model.prefix.stats
    assert (stats.active, stats.nbytes, stats.spans) == (0, 0, 0)


@pytest.mark.parametrize(
    ("quota", "error", "message"),
    [
        (True, TypeError, "a quota must be an integer; got True. Give bytes, or None"),
        (1.5, TypeError, "a quota must be an integer; got 1.5"),
        (-1, ValueError, "a quota is bytes >= 0 for a salt, or None for no limit; got -1"),
    ],
)
def test_what_is_no_quota(quota, error, message):
    with pytest.raises(error, match=message):
        Model(quota=quota)
    model = Model(quota=lambda _: quota)
    with pytest.raises(error, match=message):
        model.ask([1, 2])
