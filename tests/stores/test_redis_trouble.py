"""RedisStore and servers that stop, die, move their keys, or are slow."""

import json
import os
import random
import threading
import time

import pytest

pytest.importorskip("redis")

from redis.crc import key_slot

from kvcache.stores import Deadline, Miss, Stored, Unavailable
from kvcache.stores.redis import RedisStore
from kvcache.stores.redis.breaker import Breaker

from .scripts import started
from .servers import Proxy, RunningCluster, RunningServer, running, wait_for
from .values import is_right, item_of, key_of

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
AT_LENGTH = pytest.mark.skipif(not THOROUGH, reason="runs with HYPOTHESIS_PROFILE=thorough")
CHUNK = 1 << 16
LARGE = 40 * CHUNK
SOON = 0.15
ENOUGH = 1.5
SLACK = 3.0
"""Seconds that a busy machine may add to a deadline; what hangs would take the 5 of `timeout`."""


@pytest.fixture
def own_server(tmp_path):
    with running(RunningServer, "redis", tmp_path) as server:
        yield server


def get_one(store, number, deadline=None):
    [outcome] = store.get([key_of(number)], deadline=deadline or Deadline.after(20))
    return outcome


def put(store, *numbers, nbytes=LARGE):
    items = [item_of(number, nbytes) for number in numbers]
    assert store.put(items) == [Stored()] * len(items)


def seconds_of(call):
    started = time.monotonic()
    outcome = call()
    return outcome, time.monotonic() - started


def calls_of(store):
    return {
        "get": lambda deadline: store.get([key_of(1)], deadline=deadline),
        "put": lambda deadline: store.put([item_of(2, LARGE)], deadline=deadline),
        "contains": lambda deadline: store.contains([key_of(1)], deadline=deadline),
        "delete": lambda deadline: store.delete([key_of(3)], deadline=deadline),
        "usage": lambda deadline: [store.usage(deadline=deadline)],
    }


@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("call", ["get", "put", "contains", "delete", "usage"])
def test_a_stopped_server_takes_one_deadline(redis_server, call, connected):
    with RedisStore(redis_server.url, chunk_nbytes=CHUNK) as store:
        if connected:
            put(store, 1)
        redis_server.stop()
        try:
            ask = calls_of(store)[call]
            [outcome], seconds = seconds_of(lambda: ask(Deadline.after(SOON)))
        finally:
            redis_server.go_on()
        assert isinstance(outcome, Unavailable)
        assert seconds < SOON + SLACK
        put(store, 1)
        assert is_right(get_one(store, 1), 1), "a reply that came too late is nobody's"
        redis_server.clear()


def test_without_a_deadline_a_stopped_server_takes_the_timeout(redis_server):
    with RedisStore(redis_server.url, timeout=SOON) as store:
        put(store, 1)
        redis_server.stop()
        try:
            [outcome], seconds = seconds_of(lambda: store.get([key_of(1)]))
        finally:
            redis_server.go_on()
    assert isinstance(outcome, Unavailable)
    assert seconds < SOON + SLACK


@pytest.mark.parametrize("ends", [True, False], ids=["dies", "hangs"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_a_server_that_ends_in_the_middle_of_a_get(redis_server, share, ends):
    with (
        running(Proxy, redis_server.port) as proxy,
        RedisStore(proxy.url, chunk_nbytes=CHUNK) as store,
    ):
        put(store, 1)
        proxy.let_through(int(share * LARGE) + 1, ends=ends)
        outcome, seconds = seconds_of(lambda: get_one(store, 1, Deadline.after(SOON)))
        assert isinstance(outcome, Unavailable)
        assert seconds < SOON + SLACK
    with RedisStore(redis_server.url) as store:
        assert is_right(get_one(store, 1), 1), "it is still there"
    redis_server.clear()


def test_a_put_that_ends_in_the_middle_leaves_no_value(redis_server):
    with (
        running(Proxy, redis_server.port) as proxy,
        RedisStore(proxy.url, chunk_nbytes=CHUNK) as store,
    ):
        proxy.let_through(50)
        [outcome] = store.put([item_of(1, LARGE)], deadline=Deadline.after(SOON))
        assert isinstance(outcome, Unavailable)
    with RedisStore(redis_server.url) as store:
        assert get_one(store, 1) == Miss()
        assert all(redis_server.ask("PTTL", name) > 0 for name in redis_server.names())
    redis_server.clear()


def test_the_breaker_opens_and_closes(own_server):
    with RedisStore(own_server.url) as store:
        put(store, 1)
        own_server.stop()
        for _ in range(3):
            assert isinstance(get_one(store, 1, Deadline.after(SOON)), Unavailable)

        def refused_at_once():
            outcome, seconds = seconds_of(lambda: get_one(store, 1, Deadline.after(60)))
            assert isinstance(outcome, Unavailable)
            # Where a quarter of a second went by since the third call, this one was a probe.
            return "breaker is open" in outcome.reason and seconds < SLACK

        wait_for(refused_at_once, "the breaker opens")
        own_server.go_on()
        wait_for(lambda: is_right(get_one(store, 1), 1), "the breaker closes")
        own_server.kill()
        outcomes = [get_one(store, 1) for _ in range(5)]
        assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
        own_server.start()
        wait_for(lambda: get_one(store, 1) == Miss(), "the breaker closes")
        put(store, 1)
        assert store.stats.unavailable >= 9


def test_a_restarted_server_is_found_by_the_first_call(own_server):
    """Connections that ended while they were idle are no failure."""
    with RedisStore(own_server.url, chunk_nbytes=CHUNK) as store:
        put(store, 1)
        own_server.kill()
        own_server.start()
        assert get_one(store, 1) == Miss()
        assert store.stats.unavailable == 0


def test_a_breaker_lets_one_probe_through(monkeypatch):
    now = 100.0
    monkeypatch.setattr("kvcache.stores.redis.breaker.time.monotonic", lambda: now)
    breaker = Breaker()
    for _ in range(3):
        assert breaker.admits()
        breaker.failed()
    assert not breaker.admits()
    for pause in (0.25, 0.5, 1, 2, 4, 8, 8):
        now += pause - 0.01
        assert not breaker.admits()
        now += 0.02
        assert breaker.admits()
        assert not breaker.admits(), "one probe at a time"
        breaker.failed()
    now += 10
    assert breaker.admits()
    breaker.gave_up()
    assert breaker.admits()
    breaker.succeeded()
    assert breaker.admits()
    assert breaker.admits()


def test_a_deadline_that_is_too_short_says_nothing_of_the_server(redis_server):
    with RedisStore(redis_server.url) as store:
        put(store, 1)
        for _ in range(20):
            store.get([key_of(1)], deadline=Deadline.after(1e-5))
        assert is_right(get_one(store, 1), 1)
    redis_server.clear()


# Clusters.


@pytest.fixture
def cluster(redis_cluster):
    redis_cluster.clear()
    yield redis_cluster
    redis_cluster.clear()


def numbers_of(cluster, master, count):
    """Return numbers of which a master has the keys."""
    numbers = (number for number in range(10_000) if at(cluster, number) is master)
    return [next(numbers) for _ in range(count)]


def at(cluster, number):
    slot = key_slot(b"{" + key_of(number).hex().encode() + b"}")
    return next(
        master for index, master in enumerate(cluster.masters) if slot < (index + 1) * 16384 // 3
    )


@pytest.mark.slow
def test_a_stopped_master_keeps_nobody_from_the_others(cluster):
    with RedisStore(cluster.url, chunk_nbytes=CHUNK) as store:
        numbers = [numbers_of(cluster, master, 1)[0] for master in cluster.masters]
        put(store, *numbers)
        cluster.masters[1].stop()
        try:
            outcomes, seconds = seconds_of(
                # Not SOON: on a busy machine the others need time for their megabytes, too.
                lambda: store.get(map(key_of, numbers), deadline=Deadline.after(ENOUGH))
            )
        finally:
            cluster.masters[1].go_on()
        assert is_right(outcomes[0], numbers[0])
        assert isinstance(outcomes[1], Unavailable)
        assert is_right(outcomes[2], numbers[2])
        assert seconds < ENOUGH + SLACK
        wait_for(lambda: all(map(cluster.is_fine, cluster.servers)), "the cluster is fine")
        wait_for(lambda: is_right(get_one(store, numbers[1]), numbers[1]), "it is found again")


@pytest.mark.slow
def test_a_master_killed_under_load(cluster):
    """No wrong value; the other masters answer all the time, and the dead one when it is back."""
    lost = cluster.masters[2]
    numbers = [number for master in cluster.masters for number in numbers_of(cluster, master, 4)]
    wrong, failed = [], []
    done = threading.Event()

    def work(seed):
        choices = random.Random(seed)
        while not done.is_set():
            number = choices.choice(numbers)
            if choices.random() < 0.3:
                store.put([item_of(number, LARGE)], deadline=Deadline.after(20))
                continue
            outcome = get_one(store, number)
            if isinstance(outcome, Unavailable):
                failed.append((number, outcome.reason))
            elif outcome != Miss() and not is_right(outcome, number):
                wrong.append(outcome)

    with RedisStore(cluster.url, chunk_nbytes=CHUNK) as store:
        put(store, *numbers)
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        try:
            wait_for(lambda: store.stats.hits > 40, "there is load")
            lost.kill()
            wait_for(lambda: len(failed) > 10, "its keys are missed")
            hits = store.stats.hits
            wait_for(lambda: store.stats.hits > hits + 40, "the others go on")
            lost.start()
            wait_for(lambda: all(map(cluster.is_fine, cluster.servers)), "the cluster is fine")
            number = numbers[-1]
            wait_for(lambda: store.put([item_of(number, LARGE)]) == [Stored()], "it takes values")
            assert is_right(get_one(store, number), number)
        finally:
            done.set()
            for thread in threads:
                thread.join()
    assert wrong == []
    assert [failure for failure in failed if failure[0] not in numbers[8:]] == []


def test_keys_that_have_moved(cluster):
    """A slot that another master takes over, as reshards do, is found by the redirection."""
    source, target, other = cluster.masters
    number = numbers_of(cluster, source, 10)[-1]  # of a slot that no other test uses
    slot = key_slot(b"{" + key_of(number).hex().encode() + b"}")
    names = {server: server.ask("CLUSTER MYID").decode() for server in cluster.masters}
    with RedisStore(cluster.url, chunk_nbytes=CHUNK) as store:
        put(store, number)
        target.ask("CLUSTER SETSLOT", slot, "IMPORTING", names[source])
        source.ask("CLUSTER SETSLOT", slot, "MIGRATING", names[target])
        try:
            assert is_right(get_one(store, number), number), "not moved yet"
            store.delete([key_of(number)])
            put(store, number)  # ASK: what is new goes to the target
            assert source.names() == []
            assert len(target.names()) == 1 + LARGE // CHUNK
            assert is_right(get_one(store, number), number)
            for server in (target, source, other):
                server.ask("CLUSTER SETSLOT", slot, "NODE", names[target])
            assert is_right(get_one(store, number), number)  # MOVED
            assert store.stats.unavailable == 0
        finally:
            target.clear()
            for server in (source, target, other):
                server.ask("CLUSTER SETSLOT", slot, "NODE", names[source])


def test_any_server_of_the_cluster_will_do(cluster):
    first, last = cluster.masters[0], cluster.masters[2]
    url = f"redis+cluster://127.0.0.1:{last.port}"
    with RedisStore(url) as store:
        [number] = numbers_of(cluster, first, 1)
        put(store, number)
        assert is_right(get_one(store, number), number)
        assert first.names()


def test_a_single_server_is_no_cluster(redis_server):
    with RedisStore(redis_server.url.replace("redis:", "redis+cluster:")) as store:
        outcome = get_one(store, 1)
    assert isinstance(outcome, Unavailable)
    assert "no server has slot" in outcome.reason


@AT_LENGTH
def test_replicas_take_over(tmp_path):
    with running(RunningCluster, "redis", tmp_path, True) as cluster:
        numbers = range(30)
        with RedisStore(cluster.url, chunk_nbytes=CHUNK) as store:
            put(store, *numbers, nbytes=4 * CHUNK)
            for master in cluster.masters:
                master.ask("WAIT", 1, 5000)
            cluster.masters[0].kill()
            keys = [key_of(number) for number in numbers]

            def all_are_read():
                outcomes = store.get(keys, deadline=Deadline.after(1))
                assert not any(outcome == Miss() for outcome in outcomes)
                return all(map(is_right, outcomes, numbers))

            wait_for(all_are_read, "a replica takes over")
            assert store.stats.corrupt == 0


# Processes.


@pytest.mark.slow
@pytest.mark.parametrize("server", ["redis_server", pytest.param("redis_cluster", marks=AT_LENGTH)])
def test_eight_processes_under_load(server, request):
    server = request.getfixturevalue(server)
    seconds = 60 if THOROUGH else 0
    processes = [started("redis_load.py", server.url, seed, seconds) for seed in range(8)]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, outputs
    reports = [json.loads(output) for output, _ in outputs]
    server.clear()
    assert [troubles for troubles, _ in reports if troubles] == []
    assert sum(hits for _, hits in reports) > 100
