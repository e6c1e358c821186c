"""Events over ZeroMQ: what a router receives, and what it is spared."""

import gc
import json
import pickle
import re
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

import kvcache.prefix
from kvcache import (
    BackendNotAvailableError,
    EndpointError,
    KVCache,
    KVCacheError,
    NotSupportedError,
    PrefixCache,
)
from kvcache.prefix import BlockStored, ZmqEventPublisher, adapter_salt, events, publishing

msgspec = pytest.importorskip("msgspec")
zmq = pytest.importorskip("zmq")

from .block_names import hashes  # noqa: E402
from .event_structs import KVEventBatch  # noqa: E402
from .random_sessions import Asked, RandomSessions  # noqa: E402
from .subscriber import SECONDS, Subscriber  # noqa: E402

ANY = "tcp://127.0.0.1:*"
RECORDED = json.loads((Path(__file__).parents[1] / "data" / "kv_events.json").read_text())


def publisher_of(prefix, **options):
    return ZmqEventPublisher(prefix.events, ANY, **({"replay_endpoint": ANY} | options))


@pytest.fixture
def prefix():
    return PrefixCache([KVCache("numpy")])


@pytest.fixture
def routed():
    """Make routers of publishers; they are closed in the end."""
    routers = []

    def make(publisher, **options):
        routers.append(Subscriber(publisher, KVEventBatch, **options))
        return routers[-1]

    yield make
    for router in routers:
        router.close()


def serve(prefix, ids, **options):
    """A session that computes a prompt."""
    with prefix.session(ids, **options) as session:
        rows = np.zeros((1, 1, session.remaining.size, 1), np.float32)
        session.caches[0].update(rows, rows)


def store(prefix, number):
    """Store one block, which is one event."""
    serve(prefix, [number] * 16)


def heard(prefix, router, number=1_000):
    """Store blocks until a router has heard of one, live; return how many were stored."""
    for count in range(1, 1_000):
        store(prefix, number + count)
        if router.receive(0.02):
            return count
    raise AssertionError("no router heard of any event")


def until(condition):
    """Wait for another thread."""
    waiting = threading.Event()
    for _ in range(SECONDS * 100):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("the condition never held")


@pytest.mark.parametrize(("block_size", "seed"), [(16, 1), (4, 2), (1, 3)])
def test_a_router_knows_what_is_stored(block_size, seed, routed):
    sessions = RandomSessions(seed, block_size, namespace="" if seed == 1 else "m")
    count = []
    sessions.prefix.events.subscribe(count.append)
    with publisher_of(sessions.prefix) as publisher:
        router = routed(publisher)
        for _ in range(5):
            for _ in range(40):
                sessions.run()
            router.follow(publisher, len(count))
            assert set(router.blocks) == sessions.stored(hashes)
        kinds = [type(event).__name__ for event in router.events]
        assert kinds == [type(event).__name__ for event in count]
        assert {"BlockStored", "BlockRemoved"} <= set(kinds)
        assert publisher.sent == len(count)
        assert publisher.dropped == 0


def test_a_late_router_fills_the_gap(prefix, routed):
    with publisher_of(prefix, topic="kv@host@model", data_parallel_rank=3) as publisher:
        for number in range(5):
            store(prefix, number)
        router = routed(publisher, topic="kv@")
        count = heard(prefix, router)
        router.follow(publisher, 5 + count)
        assert [event.token_ids[0] for event in router.events[:5]] == list(range(5))
        stored = [*range(5), *range(1_001, 1_001 + count)]
        assert list(router.blocks) == [name for number in stored for name in hashes([number] * 16)]
        assert router.topics == {b"kv@host@model"}
        assert router.decoder.decode(next(iter(everything(router)))).data_parallel_rank == 3


def everything(router):
    """All messages in the buffer of a publisher."""
    router.again.send_multipart([b"", bytes(8)])
    return [payload for _, payload in router.replayed()]


def test_a_message_is_what_vllm_encodes(prefix, routed):
    with publisher_of(prefix) as publisher:
        store(prefix, 300)
        router = routed(publisher)
        router.follow(publisher, 1)
        [payload] = everything(router)
        [name] = hashes([300] * 16)
        moment, [event], rank = msgspec.msgpack.decode(payload)
        assert event == {
            "type": "BlockStored",
            "block_hashes": [name],
            "parent_block_hash": None,
            "token_ids": [300] * 16,
            "block_size": 16,
            "lora_id": None,
            "medium": "CPU",
            "lora_name": None,
        }
        assert next(iter(event)) == "type"
        assert isinstance(moment, float)
        assert rank == 0


@pytest.mark.parametrize("case", RECORDED["events"], ids=lambda case: case["name"])
def test_events_are_encoded_as_by_the_classes_of_vllm(case):
    kind, values = case["type"], {name: value_of(case, name) for name in case["fields"]}
    event = getattr(kvcache.prefix, kind)(**values)
    encoded = msgspec.msgpack.encode([case["ts"], [publishing.as_map(event)], case["rank"]])
    assert encoded.hex() == case["encoded"]
    [decoded] = msgspec.msgpack.decode(encoded, type=KVEventBatch).events
    assert type(decoded).__name__ == kind
    for field, value in values.items():
        assert plain(getattr(decoded, field)) == plain(value)


def value_of(case, field):
    """The value of a field, which JSON has without bytes and tuples."""
    value = case["fields"][field]
    if field == "extra_keys":
        return [keys and tuple(map(as_key, keys)) for keys in value]
    if isinstance(value, str) and field.endswith("hash"):
        return bytes.fromhex(value)
    return [bytes.fromhex(name) for name in value] if field.endswith("hashes") else value


def as_key(key):
    return tuple(key) if isinstance(key, list) else key


def plain(value):
    """Lists in the place of tuples."""
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("case", RECORDED["hashes"], ids=lambda case: case["name"])
def test_blocks_are_named_as_by_the_functions_of_vllm(case):
    sessions = RandomSessions(0, case["block_size"], namespace=case["namespace"])
    told = []
    sessions.prefix.events.subscribe(told.append)
    media = [tuple(medium) for medium in case["media"]]
    asked = Asked(case["ids"], media, case["salt"], tuple(case["adapter"]))
    serve(sessions.prefix, asked.ids, **asked.options)
    [event] = told
    assert [name.hex() for name in event.block_hashes] == case["names"]
    assert plain(event.extra_keys or [None] * len(event.block_hashes)) == case["extra_keys"]
    assert event.token_ids == case["ids"][: len(event.token_ids)]


def test_a_replay_has_the_newest_batches_only(prefix, routed):
    with publisher_of(prefix, buffer_steps=2) as publisher:
        for number in range(5):
            store(prefix, number)
            until(lambda number=number: publisher.sent == number + 1)
        router = routed(publisher)
        router.replay()
        assert [event.token_ids[0] for event in router.events] == [3, 4]
        router.replay()
        assert len(router.events) == 2


def test_requests_of_strangers_are_ignored(prefix, routed, caplog):
    with publisher_of(prefix) as publisher:
        router = routed(publisher)
        router.again.send_multipart([b"", b"a", b"b", b"c"])
        store(prefix, 1)
        router.follow(publisher, 1)
        assert "a replay is asked for by a number" in caplog.text


def gated(monkeypatch):
    """Let the thread of publishers wait at its next event for the gate that is returned."""
    gate, reached, as_map = threading.Event(), threading.Event(), publishing.as_map

    def wait(event):
        reached.set()
        assert gate.wait(SECONDS)
        return as_map(event)

    monkeypatch.setattr(publishing, "as_map", wait)
    return gate, reached


def test_no_session_waits_and_what_is_dropped_shows_as_a_gap(prefix, routed, monkeypatch):
    gate, reached = gated(monkeypatch)
    with publisher_of(prefix, max_queue_size=2) as publisher:
        store(prefix, 0)
        assert reached.wait(SECONDS)
        for number in range(1, 6):
            store(prefix, number)
        assert publisher.dropped == 3
        gate.set()
        until(lambda: publisher.sent == 3)
        store(prefix, 6)
        router = routed(publisher)
        router.follow(publisher, 4)
        assert [event.token_ids[0] for event in router.events] == [0, 1, 2, 6]
        assert router.next == 4, "batches 0, 1 and 3: number 2 is missing"
        assert len(everything(router)) == 3
        assert publisher.dropped == 3


def test_an_event_that_cannot_be_encoded_stops_nothing(prefix, routed, monkeypatch, caplog):
    as_map = publishing.as_map

    def fail(_):
        monkeypatch.setattr(publishing, "as_map", as_map)
        raise RuntimeError("no map")

    monkeypatch.setattr(publishing, "as_map", fail)
    with publisher_of(prefix) as publisher:
        store(prefix, 0)
        until(lambda: publisher.dropped == 1)
        store(prefix, 1)
        router = routed(publisher)
        router.follow(publisher, 1)
        assert router.next == 2
        assert "1 events could not be published" in caplog.text


def test_closing_sends_what_waits(prefix, routed, monkeypatch):
    gate, _ = gated(monkeypatch)
    publisher = publisher_of(prefix)
    router = routed(publisher)
    gate.set()
    count = heard(prefix, router)
    gate.clear()
    for number in range(5):
        store(prefix, number)
    gate.set()
    publisher.close()
    while len(router.events) < count + 5:
        assert router.receive()
    publisher.close()
    store(prefix, 7)
    assert publisher.sent == count + 5, "nothing is published after the end"


def test_a_publisher_lives_as_long_as_the_prefix_cache():
    others, prefix = set(threading.enumerate()), PrefixCache([KVCache("numpy")])
    reference = weakref.ref(publisher_of(prefix))
    [thread] = set(threading.enumerate()) - others
    gc.collect()
    assert reference() is not None
    del prefix
    gc.collect()
    until(lambda: not thread.is_alive())


def test_a_publisher_connects_where_a_router_is_bound(prefix):
    context = zmq.Context()
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    with ZmqEventPublisher(prefix.events, f"tcp://127.0.0.1:{port}", connect=True) as publisher:
        assert publisher.endpoint == f"tcp://127.0.0.1:{port}"
        assert publisher.replay_endpoint is None
        for number in range(1_000):
            store(prefix, number)
            if socket.poll(20):
                break
        assert len(socket.recv_multipart()) == 3
    context.destroy(linger=0)


def test_only_this_machine_hears_unless_told_otherwise(prefix):
    with ZmqEventPublisher(prefix.events, ANY) as publisher:
        assert publisher.endpoint.startswith("tcp://127.0.0.1:")
        assert not publisher.endpoint.endswith("*")
        with pytest.raises(EndpointError, match=r"that ZeroMQ can bind, .* in use"):
            ZmqEventPublisher(prefix.events, publisher.endpoint)


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1", "tcp://nowhere.invalid:*", "smoke://x"])
@pytest.mark.parametrize("which", ["endpoint", "replay_endpoint"])
def test_endpoints_that_are_none(prefix, endpoint, which):
    message = f"an endpoint is an address .* got {re.escape(repr(endpoint))}: "
    with pytest.raises(EndpointError, match=message):
        ZmqEventPublisher(prefix.events, **({"endpoint": ANY} | {which: endpoint}))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"endpoint": 5557}, TypeError, "endpoints and topics are text, a str; got 5557"),
        ({"topic": b"kv"}, TypeError, "endpoints and topics are text"),
        ({"topic": "\udc80"}, ValueError, "valid Unicode; got"),
        ({"replay_endpoint": "\udc80"}, ValueError, "valid Unicode; got"),
        ({"data_parallel_rank": -1}, ValueError, r"data_parallel_rank must be 0 to 2\*\*31 - 1"),
        ({"hwm": 2**31}, ValueError, r"hwm must be 0 to 2\*\*31 - 1; got 2147483648"),
        ({"data_parallel_rank": "0"}, TypeError, "data_parallel_rank must be an integer"),
        ({"buffer_steps": 0}, ValueError, "buffer_steps must be >= 1"),
        ({"hwm": 0}, ValueError, "hwm must be >= 1"),
        ({"max_queue_size": 1.5}, TypeError, "max_queue_size must be an integer"),
    ],
)
def test_odd_arguments(prefix, options, error, message):
    with pytest.raises(error, match=message):
        ZmqEventPublisher(prefix.events, **({"endpoint": ANY} | options))


def test_the_largest_sizes(prefix, routed):
    largest = 2**31 - 1
    sizes = {"buffer_steps": largest, "hwm": largest, "max_queue_size": largest}
    with publisher_of(prefix, **sizes, data_parallel_rank=largest) as publisher:
        store(prefix, 1)
        routed(publisher).follow(publisher, 1)


def test_a_publisher_takes_events(prefix):
    with pytest.raises(TypeError, match="a publisher takes the events of a prefix cache; got"):
        ZmqEventPublisher(prefix, ANY)


def test_a_publisher_is_not_copied(prefix):
    with publisher_of(prefix) as publisher, pytest.raises(NotSupportedError, match="owns sockets"):
        pickle.dumps(publisher)


@pytest.mark.parametrize("package", ["zmq", "msgspec"])
def test_without_the_packages(prefix, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendNotAvailableError, match=r"pip install 'kvcache\[events\]'"):
        ZmqEventPublisher(prefix.events, ANY)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_an_image_that_is_stored_in_two_parts(prefix, size):
    """By two sessions, the first of which ends within it."""
    told, ids = [], [1, 2, *[99] * 6, 3, 4, 5, 6]
    prefix.events.block_size = size
    prefix.events.subscribe(told.append)
    media = {(2, 8): "a cat"}
    with prefix.session(ids, media=media) as session:
        rows = np.zeros((1, 1, 5, 1), np.float32)
        session.caches[0].update(rows, rows)
    assert prefix.lookup(ids, media=media).stored == 5
    serve(prefix, ids, media=media)
    names = hashes(ids, size=size, media=[(2, 8, "a cat")])
    assert [name for event in told for name in event.block_hashes] == names
    assert [token for event in told for token in event.token_ids] == ids


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (("",), ValueError, "the name of an adapter is text, and neither"),
        (("a\0b",), ValueError, "has a zero character; got 'a.x00b', ''"),
        (("a", "\0"), ValueError, "has a zero character"),
        ((7,), TypeError, "name, path and salt of an adapter are str; got 7"),
        (("a", None), TypeError, "are str; got None"),
    ],
)
def test_adapters_that_are_none(adapter, error, message):
    with pytest.raises(error, match=message):
        adapter_salt(*adapter)


def test_adapters_and_tenants_share_nothing(prefix):
    salts = [
        "",
        "a",
        "sql",
        *(
            adapter_salt(name, path, salt=salt)
            for name, path, salt in (
                ("sql", "", ""),
                ("sql", "/1", ""),
                ("sql", "", "a"),
                ("law", "", ""),
                ("law", "", "a\0b"),
            )
        ),
    ]
    told = []
    prefix.events.subscribe(told.append)
    for salt in salts:
        serve(prefix, [1] * 16, salt=salt)
        serve(prefix, [1] * 16, salt=salt)
    assert len({name for event in told for name in event.block_hashes}) == len(told) == len(salts)
    assert [event.lora_name for event in told] == [None] * 3 + ["sql"] * 3 + ["law"] * 2


@pytest.mark.parametrize("text", ["\udc80", "\0lora", "\0lora\0a\0b", "\0", "a\0lora\0b\0c\0d"])
def test_texts_of_any_kind_are_hashed(text):
    told = []
    prefix = PrefixCache([KVCache("numpy")], namespace=text)
    prefix.events.subscribe(told.append)
    serve(prefix, [1] * 16, salt=text, media={(2, 4): text})
    [event] = told
    seen = "edb280" if text == "\udc80" else text
    assert event.extra_keys == [((seen, 2), seen)]
    assert event.block_hashes == hashes([1] * 16, seen, seen, media=[(2, 4, seen)])


@pytest.mark.parametrize(("digest", "seen"), [(b"a cat", "a cat"), (b"\xff\x00", "ff00")])
def test_digests_of_bytes_are_told_as_text(prefix, digest, seen):
    told = []
    prefix.events.subscribe(told.append)
    serve(prefix, [1] * 16, media={(2, 4): digest})
    assert told[0].block_hashes == hashes([1] * 16, media=[(2, 4, seen)])


def test_without_subscribers_nothing_is_hashed(prefix, monkeypatch):
    monkeypatch.setattr(events, "chained_hashes", None)  # would raise
    store(prefix, 1)
    prefix.clear()


def test_the_size_of_blocks_is_set_before_anybody_subscribes(prefix):
    told = []
    prefix.events.block_size = 4
    leave = prefix.events.subscribe(told.append)
    store(prefix, 1)
    assert told == [BlockStored(hashes([1] * 16, size=4), None, [1] * 16, 4, medium="CPU")]
    with pytest.raises(KVCacheError, match="stays while somebody subscribes; got 8 with 1"):
        prefix.events.block_size = 8
    leave()
    for odd, error in ((0, ValueError), ("4", TypeError), (1.5, TypeError)):
        with pytest.raises(error, match="block_size must be"):
            prefix.events.block_size = odd
    prefix.events.block_size = 8
    prefix.events.subscribe(told.append)
    serve(prefix, [1] * 16 + [2] * 8)
    names = hashes([1] * 16 + [2] * 8, size=8)
    assert told[1] == BlockStored(names[2:], names[1], [2] * 8, 8, medium="CPU")
