"""RedisStore on real servers: the public suite, damage, lifetimes, full servers."""

import gc
import logging
import os
import random
import signal
import subprocess
import sys
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("redis")

from redis.crc import key_slot

from kvcache.errors import StoreError
from kvcache.stores import (
    Corrupt,
    Deadline,
    Deleted,
    Hit,
    Item,
    Miss,
    Stored,
    Unavailable,
    Usage,
    open_store,
)
from kvcache.stores.redis import RedisStore
from kvcache.stores.redis.manifest import Names, parse
from kvcache.testing import StoreSuite

from .servers import Garbage, RunningServer, free_port, running, wait_for
from .values import is_right, item_of, key_of, value_of

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
CHUNK = 1 << 16
LARGE = 5 * CHUNK + 7


class ServerSuite(StoreSuite):
    """The rules of stores, each in names of its own on a shared server."""

    has_budget = False
    chunk_nbytes = 1 << 20

    @pytest.fixture(autouse=True)
    def _with_server(self, request):
        self.server = request.getfixturevalue(self.fixture)
        yield
        self.server.clear()

    def open_store(self, place, budget):
        return RedisStore(self.server.url, prefix=f"{place}:", chunk_nbytes=self.chunk_nbytes)

    def damage(self, store, key, change):
        [name] = [
            name for name in self.server.names() if name.endswith(b"{%b}" % key.hex().encode())
        ]
        self.server.write(name, change(self.server.read(name)))


class TestRedis(ServerSuite):
    fixture = "redis_server"


class TestValkey(ServerSuite):
    fixture = "valkey_server"


class TestCluster(ServerSuite):
    fixture = "redis_cluster"


class TestChunks(ServerSuite):
    """All values are in chunks, and chunks are damaged."""

    fixture = "redis_server"
    chunk_nbytes = 256

    def damage(self, store, key, change):
        names = [name for name in self.server.names() if b"{%b}:" % key.hex().encode() in name]
        name = sorted(names)[len(names) // 2]
        self.server.write(name, change(self.server.read(name)))


@pytest.fixture
def server(redis_server):
    redis_server.clear()
    return redis_server


@pytest.fixture
def store(server):
    with RedisStore(server.url, chunk_nbytes=CHUNK) as store:
        yield store


def chunks_of(server, number):
    names = [name for name in server.names() if b"{%b}:" % key_of(number).hex().encode() in name]
    return sorted(names, key=lambda name: int(name.rpartition(b":")[2]))


def manifest_of(number):
    return Names("kvcache:").manifest(key_of(number))


def get_one(store, number, **options):
    [outcome] = store.get([key_of(number)], **options)
    return outcome


def swap(server, first, second):
    one, other = server.read(first), server.read(second)
    server.write(first, other)
    server.write(second, one)


def put(store, *numbers, nbytes=LARGE):
    items = [item_of(number, nbytes) for number in numbers]
    assert store.put(items) == [Stored()] * len(items)


# Form and content.


def test_a_large_value_is_in_chunks_of_one_slot(store, server):
    put(store, 1)
    assert [len(server.read(name)) for name in chunks_of(server, 1)] == [CHUNK] * 5 + [7]
    assert len({key_slot(name) for name in server.names()}) == 1
    assert is_right(get_one(store, 1), 1)


def test_a_socket_takes_less_than_all(server):
    """Chunks of 4 MiB on a new connection, whose buffers the system has not enlarged yet."""
    nbytes = (20 << 20) + 7
    with RedisStore(server.url, chunk_nbytes=4 << 20) as store:
        assert store.put([item_of(0, nbytes)]) == [Stored()]
        [hit] = store.get([key_of(0)])
    assert is_right(hit, 0)


def test_chunks_cut_across_buffers(store):
    value = value_of(1, LARGE)
    cuts = [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 5, LARGE]
    buffers = [value[start:stop] for start, stop in pairwise(cuts)]
    assert store.put([Item(key_of(1), buffers)]) == [Stored()]
    assert is_right(get_one(store, 1), 1)


def test_swapped_chunks(store, server):
    store.put([Item(key_of(1), [os.urandom(LARGE)])])
    swap(server, *chunks_of(server, 1)[:2])
    assert isinstance(get_one(store, 1), Corrupt)


def test_stale_chunks(store, server):
    """Chunks of a value that was there before."""
    put(store, 1)
    stale = server.read(chunks_of(server, 1)[0])
    store.delete([key_of(1)])
    store.put([Item(key_of(1), [os.urandom(LARGE)])])
    server.write(chunks_of(server, 1)[0], stale)
    assert isinstance(get_one(store, 1), Corrupt)
    assert server.names() == []


def test_a_manifest_of_another_version(store, server):
    put(store, 1)
    data = bytearray(server.read(manifest_of(1)))
    data[8] = 2
    server.write(manifest_of(1), bytes(data))
    outcome = get_one(store, 1)
    assert isinstance(outcome, Corrupt)
    assert "version" in outcome.reason


def test_a_missing_chunk_is_a_miss_and_the_rest_goes(store, server):
    put(store, 1)
    server.ask("DEL", chunks_of(server, 1)[3])
    assert get_one(store, 1) == Miss()
    assert server.names() == []
    put(store, 1)
    assert is_right(get_one(store, 1), 1)


def test_putting_again_mends_what_lost_a_chunk(store, server):
    put(store, 1)
    server.ask("DEL", chunks_of(server, 1)[3])
    put(store, 1)
    assert is_right(get_one(store, 1), 1)
    assert len(server.names()) == 7


@pytest.mark.parametrize("nbytes", [1000, LARGE])
def test_another_type_of_the_server(store, server, nbytes):
    server.ask("LPUSH", manifest_of(1), "something else")
    assert isinstance(get_one(store, 1), Corrupt)
    assert get_one(store, 1) == Miss()
    put(store, 1, nbytes=nbytes)
    assert is_right(get_one(store, 1), 1)


def test_a_huge_foreign_value_is_thrown_away(store, server):
    server.ask("SETRANGE", manifest_of(1), 70 << 20, "x")
    assert isinstance(get_one(store, 1), Corrupt)
    assert get_one(store, 1) == Miss()


def test_delete_removes_all(store, server):
    put(store, 1, 2)
    assert store.delete([key_of(1), key_of(2), key_of(3)]) == [Deleted(), Deleted(), Miss()]
    assert server.names() == []


@pytest.fixture
def no_collection():
    """Leave cycles of references alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("nbytes", [5, LARGE])
def test_values_leave_memory_with_their_last_reference(store, nbytes):
    array = np.zeros(nbytes, np.uint8)
    written = weakref.ref(array)
    store.put([Item(key_of(0), [array.data])])
    del array
    assert written() is None
    [hit] = store.get([key_of(0)])
    read = weakref.ref(hit.value.obj)
    del hit
    assert read() is None


@pytest.mark.usefixtures("no_collection")
def test_values_that_did_not_arrive_leave_memory():
    array = np.zeros(LARGE, np.uint8)
    written = weakref.ref(array)
    store = RedisStore(f"redis://127.0.0.1:{free_port()}")
    [outcome] = store.put([Item(key_of(0), [array.data])])
    assert isinstance(outcome, Unavailable)
    del array
    assert written() is None


def test_many_keys_in_one_call(store):
    items = [item_of(number, 3000 * number) for number in range(60)]
    assert store.put(items) == [Stored()] * 60
    outcomes = store.get([item.key for item in items])
    assert all(is_right(outcome, number) for number, outcome in enumerate(outcomes))


def test_names_of_others_are_not_listed(server):
    with RedisStore(server.url, prefix="a*[b:") as one, RedisStore(server.url) as other:
        put(one, 1)
        put(other, 2)
        server.ask("SET", "a*[b:{" + "x" * 64 + "}", "foreign")
        server.ask("LPUSH", "a*[b:{" + key_of(3).hex() + "}", "foreign")
        assert [entry.key for entry in one.entries()] == [key_of(1)]
        assert [entry.key for entry in other.entries()] == [key_of(2)]
        assert one.get([key_of(2)]) == [Miss()]


# Lifetimes.


def lifetimes(server):
    return [server.ask("PTTL", name) / 1000 for name in server.names()]


@pytest.mark.parametrize("nbytes", [1000, LARGE])
def test_lifetimes(server, nbytes):
    with RedisStore(server.url, ttl=1000, chunk_nbytes=CHUNK) as store:
        put(store, 1, nbytes=nbytes)
        assert 900 < server.ask("PTTL", manifest_of(1)) / 1000 <= 1000
        assert all(900 < seconds <= 1060 for seconds in lifetimes(server))
        for name in server.names():
            server.ask("PEXPIRE", name, 5000)
        put(store, 1, nbytes=nbytes)
        assert all(seconds > 900 for seconds in lifetimes(server)), "it is renewed"


@pytest.mark.parametrize("nbytes", [1000, LARGE])
def test_no_lifetime(server, nbytes):
    with RedisStore(server.url, ttl=None, chunk_nbytes=CHUNK) as store:
        put(store, 1, nbytes=nbytes)
        put(store, 1, nbytes=nbytes)
        assert set(lifetimes(server)) == {-0.001}


def test_expired_is_missed(server):
    with RedisStore(server.url, ttl=0.001) as store:
        store.put([item_of(1)])
        wait_for(lambda: get_one(store, 1) == Miss(), "it expires")


def test_writers_killed_at_any_point_leave_nothing_that_stays(server, tmp_path):
    """No half value is read, and chunks without a manifest have a lifetime."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from values import item_of;"
        "from kvcache.stores.redis import RedisStore; store = RedisStore(sys.argv[1], ttl=None);"
        "print(store.contains([item_of(0).key]), flush=True)\n"
        "for n in range(10**6): store.put([item_of(n, 2_000_000 + n)])"
    )
    command = [sys.executable, "-c", code, server.url, str(Path(__file__).parent)]
    with RedisStore(server.url) as store:
        for seed in range(40 if THOROUGH else 2):
            writer = subprocess.Popen(command, stdout=subprocess.PIPE)
            writer.stdout.readline()
            target = random.Random(seed).randrange(3, 60)
            while len(server.names()) < target:
                pass
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
            outcomes = [get_one(store, number) for number in range(60)]
            assert all(
                outcome == Miss() or is_right(outcome, number)
                for number, outcome in enumerate(outcomes)
            )
            names = server.names()
            orphans = [name for name in names if name[: name.index(b"}") + 1] not in names]
            assert all(server.ask("PTTL", name) > 0 for name in orphans)
            server.clear()


# Servers in trouble.


def test_a_full_server(tmp_path, caplog):
    with (
        running(RunningServer, "redis", tmp_path, "--maxmemory", "6mb") as server,
        RedisStore(server.url, chunk_nbytes=CHUNK) as store,
    ):
        put(store, 1)
        with caplog.at_level(logging.WARNING, "kvcache.stores"):
            outcomes = [store.put([item_of(2, 8 << 20)])[0] for _ in range(3)]
        assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
        assert "OutOfMemoryError" in outcomes[0].reason
        assert len(caplog.records) == 1
        assert store.stats.unavailable == 3
        assert is_right(get_one(store, 1), 1)
        assert chunks_of(server, 2) == [], "what was written of it is removed"
        usage = store.usage()
        assert isinstance(usage, Usage)
        assert usage.budget == 6 << 20
        server.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        outcomes = []
        for number in range(3, 40):
            put(store, number)
            outcomes += store.get([key_of(number)])
        # The server picks what it evicts from a sample, which may be what was put last.
        assert all(
            outcome == Miss() or is_right(outcome, number)
            for number, outcome in enumerate(outcomes, start=3)
        )
        assert sum(map(is_right, outcomes, range(3, 40))) > 20
        assert get_one(store, 3) == Miss(), "the server has evicted it"


def test_passwords(tmp_path, caplog):
    with running(RunningServer, "redis", tmp_path) as server:
        server.ask("CONFIG", "SET", "requirepass", "secret word")
        address = server.url.removeprefix("redis://")
        with RedisStore(f"redis://:secret%20word@{address}/1") as store:
            put(store, 1)
            assert is_right(get_one(store, 1), 1)
            assert "secret" not in repr(store)
        for user in ("", ":wrong@", "nobody:wrong@"):
            with RedisStore(f"redis://{user}{address}") as store:
                outcome = get_one(store, 1)
                assert isinstance(outcome, Unavailable), outcome
                assert "wrong" not in outcome.reason
                assert isinstance(store.put([item_of(1)])[0], Unavailable)
        assert all("wrong" not in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"$x\r\n",
        b"$3\r\nabcdef\r\n",
        b"*99999999999\r\n",
        b"+OK\r\n",
        b":1\r\n",
        b"*1\r\n$1\r\nx\r\n",
        b"-MOVED nonsense\r\n",
        b"-ERR whatever\r\n",
        b"-LOADING Redis is loading the dataset in memory\r\n",
        b"x" * 100_000,
        b"\0" * 1000 + b"\r\n",
    ],
    ids=lambda reply: repr(reply[:12]),
)
def test_what_is_no_server(reply):
    with running(Garbage, reply) as garbage, RedisStore(garbage.url, timeout=0.05) as store:
        soon = Deadline.after(5)
        outcomes = [
            *store.get([key_of(1)], deadline=soon),
            *store.put([item_of(1, LARGE), item_of(2)], deadline=soon),
            *store.contains([key_of(1)], deadline=soon),
            *store.delete([key_of(1)], deadline=soon),
        ]
        assert not isinstance(outcomes[0], Hit)
        with pytest.raises(OSError, match=r"cannot be listed|does not"):
            list(store.entries(deadline=soon))
        assert isinstance(store.usage(deadline=soon), Unavailable)


def test_nothing_is_connected_before_the_first_call():
    with RedisStore(f"redis://127.0.0.1:{free_port()}") as store:
        assert isinstance(get_one(store, 1), Unavailable)
        assert store.stats.unavailable == 1


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # of JAX, if it is loaded
def test_a_forked_child_has_connections_of_its_own(store):
    put(store, 1, 2)
    child = os.fork()
    if not child:
        rights = [is_right(get_one(store, 1), 1) for _ in range(50)]
        os._exit(0 if all(rights) else 1)
    rights = [is_right(get_one(store, 2), 2) for _ in range(50)]
    _, status = os.waitpid(child, 0)
    assert all(rights)
    assert status == 0


# Arguments.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ttl": 0}, "ttl is a number of seconds above 0; got 0"),
        ({"timeout": float("inf")}, "timeout is a number of seconds above 0; got inf"),
        ({"connections": 0}, "at least 1; got 0"),
        ({"chunk_nbytes": 1 << 23}, "chunk_nbytes is at most 4194304; got 8388608"),
        ({"prefix": "a{b"}, "a prefix has no braces"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        RedisStore(**options)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost",
        "redis://:secret@localhost?colour=blue",
        "redis+cluster://:secret@localhost:x",
        "redis+cluster://:secret@localhost,other:99999999",
    ],
)
def test_wrong_urls(url):
    with pytest.raises(StoreError, match="the client redis refuses the URL") as caught:
        RedisStore(url)
    assert "secret" not in str(caught.value)


def test_stores_by_url(server):
    with open_store(server.url, ttl=100, prefix="x:") as store:
        assert isinstance(store, RedisStore)
        put(store, 1)
        assert b"x:{%b}" % key_of(1).hex().encode() in server.names()
    with pytest.raises(TypeError, match="colour"):
        open_store(server.url, colour="blue")


def test_manifests_are_parsed_or_refused(store, server):
    put(store, 1)
    data = server.read(manifest_of(1))
    manifest = parse(key_of(1), memoryview(data))
    assert (manifest.nbytes, manifest.chunk_nbytes, manifest.chunks) == (LARGE, CHUNK, 6)
    for stop in range(len(data)):
        assert isinstance(parse(key_of(1), memoryview(data[:stop])), Corrupt)
