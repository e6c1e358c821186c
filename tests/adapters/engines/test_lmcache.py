"""A store as an L2 adapter of LMCache, made by its factory and driven as its controllers do.

This needs the wheel of LMCache without its dependencies, native part included, and a few packages,
and no GPU: `nox -s engines` puts them there.
"""

import hashlib
import importlib
import json
import select
import threading
import time

import numpy as np
import pytest

from kvcache.stores import MemoryStore

from ...stores.servers import RunningServer, running, wait_for
from ...stores.trouble import LIES, Hanging, Lying, coded
from .packages import imported_or_skipped
from .signatures import abstract_calls, moved

pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("ignore")]
SHAPE = (2, 4, 8, 16)
NBYTES = 2 * 4 * 8 * 16 * 2
PATIENCE_MS = 20_000


@pytest.fixture(scope="module")
def lmcache():
    name = "lmcache.v1.distributed.l2_adapters.plugin_l2_adapter"
    imported_or_skipped(lambda: importlib.import_module(name), name)
    from lmcache.v1 import memory_management
    from lmcache.v1.distributed import api, internal_api, l2_adapters
    from lmcache.v1.distributed.l2_adapters import base, config
    from lmcache.v1.platform.event_notifier import consume_fd

    class Modules:
        pass

    modules = Modules()
    for module in (memory_management, api, internal_api, l2_adapters, base, config):
        vars(modules).update({k: v for k, v in vars(module).items() if not k.startswith("_")})
    modules.consume_fd = consume_fd
    return modules


class Driver:
    """A controller of LMCache: it submits, waits for the signal, and asks for the result."""

    def __init__(self, lmcache, adapter):
        self.lmcache, self.adapter = lmcache, adapter
        self.results = {}

    def _wait(self, descriptor):
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert poll.poll(PATIENCE_MS), "no signal"
        self.lmcache.consume_fd(descriptor)

    def store(self, keys, objects):
        task = self.adapter.submit_store_task(keys, objects)
        while task not in self.results:
            self._wait(self.adapter.get_store_event_fd())
            self.results |= self.adapter.pop_completed_store_tasks()
        return self.results.pop(task)

    def look_up(self, keys):
        task = self.adapter.submit_lookup_and_lock_task(keys, {})
        found = self._query(
            task,
            self.adapter.get_lookup_and_lock_event_fd(),
            self.adapter.query_lookup_and_lock_result,
        )
        self.adapter.submit_unlock(keys)
        return found

    def load(self, keys, objects):
        task = self.adapter.submit_load_task(keys, objects)
        return self._query(task, self.adapter.get_load_event_fd(), self.adapter.query_load_result)

    def _query(self, task, descriptor, query):
        while (bitmap := query(task)) is None:
            self._wait(descriptor)
        assert query(task) is None  # a result is given once
        return [bitmap.test(index) for index in range(bitmap.size())]


@pytest.fixture
def make_driver(lmcache):
    """Adapters made by LMCache's factory of its command line, closed behind the test."""
    made = []

    def make_driver(url, **params):
        params = {"url": url, "timeout": 20, "lookup_timeout": 20, **params}
        plugin = {
            "type": "plugin",
            "module_path": "kvcache.adapters.lmcache",
            "class_name": "KVCacheAdapter",
            "adapter_params": params,
        }
        config_class = lmcache.get_l2_adapter_config_class("plugin")
        adapter = lmcache.create_l2_adapter(config_class.from_dict(plugin))
        made.append((adapter, url))
        return Driver(lmcache, adapter)

    yield make_driver
    for adapter, url in made:
        if isinstance(url, Hanging):
            url.go_on.set()
        adapter.close()


def key_of(lmcache, number, **other):
    digest = hashlib.sha256(str(number).encode()).digest()
    fields = {"chunk_hash": digest, "model_name": "org/model", "kv_rank": 0x01000100}
    return lmcache.ObjectKey(**fields | other)


def object_of(lmcache, number=None, dtype="bfloat16", padding=64, shape=SHAPE):
    """An object of LMCache, with padding behind it as its allocator makes them."""
    import torch

    nbytes = 2 * int(np.prod(shape))
    data = np.zeros(nbytes + padding, np.uint8) if number is None else coded(number, nbytes)
    raw = torch.from_numpy(np.resize(data, nbytes + padding).copy())
    shape, dtype = torch.Size(shape), getattr(torch, dtype)
    metadata = lmcache.MemoryObjMetadata(
        shape, dtype, 0, raw.numel(), 1, shapes=[shape], dtypes=[dtype]
    )
    return lmcache.TensorMemoryObj(raw, metadata, None)


def is_right(obj, number):
    content = np.frombuffer(obj.byte_array, np.uint8)
    return np.array_equal(content, coded(number, content.nbytes))


def is_blank(obj):
    return not obj.raw_data.any()


def store(lmcache, driver, numbers):
    keys = [key_of(lmcache, number) for number in numbers]
    return driver.store(keys, [object_of(lmcache, number) for number in numbers])


def load(lmcache, driver, numbers, **form):
    objects = [object_of(lmcache, **form) for _ in numbers]
    return driver.load([key_of(lmcache, number) for number in numbers], objects), objects


def test_the_protocol_is_the_one_that_the_adapter_was_written_for(lmcache):
    assert abstract_calls(lmcache.L2AdapterInterface) == [
        "close",
        "get_load_event_fd",
        "get_lookup_and_lock_event_fd",
        "get_store_event_fd",
        "pop_completed_store_tasks",
        "query_load_result",
        "query_lookup_and_lock_result",
        "submit_load_task",
        "submit_lookup_and_lock_task",
        "submit_store_task",
        "submit_unlock",
    ], "LMCache has other abstract calls of an L2 adapter"
    changed = moved(
        lmcache.L2AdapterInterface,
        {
            "__init__": "max_capacity_bytes=",
            "submit_store_task": "keys, objects",
            "pop_completed_store_tasks": "",
            "submit_lookup_and_lock_task": "keys, group_layout_descs",
            "query_lookup_and_lock_result": "task_id",
            "submit_unlock": "keys",
            "submit_load_task": "keys, objects",
            "query_load_result": "task_id",
            "delete": "keys",
            "report_status": "",
            "close": "",
            "_notify_keys_stored": "keys, sizes",
            "_notify_keys_accessed": "keys",
            "_notify_keys_deleted": "keys, sizes",
        },
    )
    fields = "chunk_hash model_name kv_rank object_group_id cache_salt"
    if " ".join(lmcache.ObjectKey.__dataclass_fields__) != fields:
        changed.append(f"ObjectKey has {list(lmcache.ObjectKey.__dataclass_fields__)}")
    assert not changed, f"LMCache's protocol has moved: {changed}. See kvcache/adapters/lmcache.py."


@pytest.mark.parametrize("url", ["memory:", "file://{}", "redis"])
def test_objects_come_back_byte_by_byte(lmcache, make_driver, tmp_path, url):
    if url == "redis":
        with running(RunningServer, "redis", tmp_path) as server:
            check_round_trip(lmcache, make_driver(server.url))
    else:
        check_round_trip(lmcache, make_driver(url.format(tmp_path)))


def check_round_trip(lmcache, driver):
    result = store(lmcache, driver, range(5))
    assert result.is_successful()
    assert result.bytes_transferred() == 5 * NBYTES
    keys = [key_of(lmcache, number) for number in range(6)]
    assert driver.look_up(keys) == [True] * 5 + [False]
    loaded, objects = load(lmcache, driver, range(5))
    assert loaded == [True] * 5
    assert all(is_right(obj, number) for number, obj in enumerate(objects))
    assert store(lmcache, driver, range(5)).bytes_transferred() == 0  # they are there


def test_a_partial_load_leaves_the_other_objects_as_they_were(lmcache, make_driver):
    driver = make_driver("memory:")
    store(lmcache, driver, [0, 2])
    loaded, objects = load(lmcache, driver, [0, 1, 2, 3])
    assert loaded == [True, False, True, False]
    assert is_right(objects[0], 0)
    assert is_right(objects[2], 2)
    assert is_blank(objects[1])
    assert is_blank(objects[3])


@pytest.mark.parametrize(
    "other",
    [
        {"model_name": "org/other"},
        {"kv_rank": 0x02010201},
        {"object_group_id": 1},
        {"cache_salt": "a tenant"},
    ],
)
def test_models_ranks_groups_and_salts_never_meet(lmcache, make_driver, other):
    driver = make_driver("memory:")
    store(lmcache, driver, [0])
    assert driver.look_up([key_of(lmcache, 0), key_of(lmcache, 0, **other)]) == [True, False]


def test_groups_of_a_hybrid_are_apart_and_exact(lmcache, make_driver):
    """One task has objects of all groups, each of its own form: all pages, and the last states."""
    driver = make_driver("memory:")
    shapes = {0: SHAPE, 1: (3, 5)}
    pages = [(number, group) for group, numbers in ((0, range(4)), (1, [3])) for number in numbers]

    def objects_of(filled):
        return [
            object_of(lmcache, 10 * group + number if filled else None, shape=shapes[group])
            for number, group in pages
        ]

    keys = [key_of(lmcache, number, object_group_id=group) for number, group in pages]
    assert driver.store(keys, objects_of(True)).is_successful()
    absent = key_of(lmcache, 2, object_group_id=1)
    assert driver.look_up([*keys, absent]) == [True] * 5 + [False]
    objects = objects_of(False)
    other = object_of(lmcache, shape=shapes[1])
    assert driver.load([*keys, absent], [*objects, other]) == [True] * 5 + [False]
    for (number, group), obj in zip(pages, objects, strict=True):
        assert is_right(obj, 10 * group + number)
    assert is_blank(other)


def test_namespaces_never_meet(lmcache, make_driver, tmp_path):
    url = f"file://{tmp_path}"
    store(lmcache, make_driver(url), [0])
    assert make_driver(url).look_up([key_of(lmcache, 0)]) == [True]
    assert make_driver(url, namespace="tuned").look_up([key_of(lmcache, 0)]) == [False]


def test_an_object_of_another_dtype_is_not_loaded(lmcache, make_driver):
    driver = make_driver("memory:")
    store(lmcache, driver, [0])
    loaded, [obj] = load(lmcache, driver, [0], dtype="float16")
    assert loaded == [False]
    assert is_blank(obj)


def test_listeners_and_usage_follow_what_is_stored(lmcache, make_driver):
    class Listener(lmcache.L2AdapterListener):
        def __init__(self):
            self.calls = []

        def on_l2_keys_stored(self, keys, sizes):
            self.calls.append(("stored", keys, sizes))

        def on_l2_keys_accessed(self, keys):
            self.calls.append(("accessed", keys))

        def on_l2_keys_deleted(self, keys):
            self.calls.append(("deleted", keys))

    listener, driver = Listener(), make_driver("memory:")
    driver.adapter.register_listener(listener)
    store(lmcache, driver, [0, 1])
    store(lmcache, driver, [1])
    load(lmcache, driver, [0, 5])
    while len(listener.calls) < 2:
        time.sleep(0)
    keys = [key_of(lmcache, number) for number in range(2)]
    assert driver.adapter.get_usage().total_bytes_used == 2 * NBYTES
    driver.adapter.delete(keys)
    assert driver.look_up(keys) == [False, False]
    assert driver.adapter.get_usage().total_bytes_used == 0
    assert listener.calls == [
        ("stored", keys, [NBYTES, NBYTES]),
        ("accessed", keys[:1]),
        ("deleted", keys),
    ]


@pytest.mark.parametrize("lie", LIES)
def test_a_store_that_lies_gives_misses(lmcache, make_driver, lie):
    backing = Lying(lambda outcomes: outcomes)
    driver = make_driver(backing)
    store(lmcache, driver, [0, 1])
    backing.lie = lie
    loaded, objects = load(lmcache, driver, [0, 1])
    assert loaded == [False, False]
    assert all(map(is_blank, objects))


def test_a_server_that_is_killed_gives_misses(lmcache, make_driver, tmp_path):
    with running(RunningServer, "redis", tmp_path) as server:
        driver = make_driver(server.url, timeout=5, lookup_timeout=5)
        assert store(lmcache, driver, [0]).is_successful()
        server.kill()
        loaded, [obj] = load(lmcache, driver, [0])
        assert loaded == [False]
        assert is_blank(obj)
        assert driver.look_up([key_of(lmcache, 0)]) == [False]
        assert not store(lmcache, driver, [1]).is_successful()
        assert driver.adapter.report_status()["unavailable"] > 0


def test_tasks_of_a_store_that_hangs_are_signalled_at_their_deadline(lmcache, make_driver):
    driver = make_driver(Hanging("get", "put", "contains"), timeout=0.1, lookup_timeout=0.1)
    assert not store(lmcache, driver, [0]).is_successful()
    loaded, [obj] = load(lmcache, driver, [0])
    assert loaded == [False]
    assert driver.look_up([key_of(lmcache, 0)]) == [False]
    driver.adapter.delete([key_of(lmcache, 0)])
    assert is_blank(obj)


def test_no_submission_waits_for_a_store_that_hangs(lmcache, make_driver):
    backing = Hanging("get", "contains")
    driver = make_driver(backing)
    adapter, began = driver.adapter, time.monotonic()
    keys, objects = [key_of(lmcache, 0)], [object_of(lmcache, 0)]
    adapter.submit_store_task(keys, objects)
    looking = adapter.submit_lookup_and_lock_task(keys, {})
    loading = adapter.submit_load_task(keys, [object_of(lmcache)])
    assert adapter.pop_completed_store_tasks() == {}
    assert adapter.query_lookup_and_lock_result(looking) is None
    assert adapter.query_load_result(loading) is None
    assert time.monotonic() - began < 10  # each of the three would hang for 20 s
    assert backing.hung.wait(20)
    backing.go_on.set()
    assert store(lmcache, driver, [0]).is_successful()
    loaded, [obj] = load(lmcache, driver, [0])
    assert loaded == [True]
    assert is_right(obj, 0)


def test_closing_in_the_middle_ends_every_task(lmcache, make_driver):
    backing = Hanging("get", "put")
    driver = make_driver(backing)
    adapter = driver.adapter
    key, obj = key_of(lmcache, 0), object_of(lmcache)
    stored = adapter.submit_store_task([key], [object_of(lmcache, 0)])
    task = adapter.submit_load_task([key], [obj])
    assert backing.hung.wait(20)
    adapter.close()
    assert not adapter.pop_completed_store_tasks()[stored].is_successful()
    assert not adapter.query_load_result(task).test(0)
    backing.go_on.set()
    assert is_blank(obj)


def test_the_command_line_is_read(lmcache):
    plugin = {"module_path": "kvcache.adapters.lmcache", "class_name": "KVCacheAdapter"}
    line = json.dumps({"type": "plugin", **plugin, "adapter_params": {"url": "memory:"}})
    arguments = lmcache.add_l2_adapters_args(parser()).parse_args(["--l2-adapter", line])
    [config] = lmcache.parse_args_to_l2_adapters_config(arguments).adapters
    lmcache.create_l2_adapter(config).close()


def parser():
    import argparse

    return argparse.ArgumentParser()


@pytest.mark.parametrize(
    ("params", "message"),
    [({}, "url of a store"), ({"url": "memory:", "threds": 3}, "has no threds")],
)
def test_wrong_params(lmcache, params, message):
    from kvcache.adapters.lmcache import KVCacheAdapter

    with pytest.raises(ValueError, match=message):
        KVCacheAdapter(params)


class Load:
    """Tasks that eight threads wait for, each for its own."""

    def __init__(self, lmcache, adapter, seconds):
        self.lmcache, self.adapter, self.end = lmcache, adapter, time.monotonic() + seconds
        self.wrong, self.failed, self.stored, self._lock = [], [], {}, threading.Lock()

    def work(self, thread):
        random = np.random.default_rng(thread)
        try:
            while time.monotonic() < self.end:
                numbers = random.integers(0, 200, 2).tolist()
                keys = [key_of(self.lmcache, number) for number in numbers]
                [self.store, self.look_up, self.load][random.integers(3)](numbers, keys)
        except AssertionError as error:
            self.failed.append(error)

    def store(self, numbers, keys):
        objects = [object_of(self.lmcache, number) for number in numbers]
        self._result(self._query_store, self.adapter.submit_store_task(keys, objects))

    def look_up(self, numbers, keys):
        task = self.adapter.submit_lookup_and_lock_task(keys, {})
        self._result(self.adapter.query_lookup_and_lock_result, task)

    def load(self, numbers, keys):
        objects = [object_of(self.lmcache) for _ in numbers]
        task = self.adapter.submit_load_task(keys, objects)
        bitmap = self._result(self.adapter.query_load_result, task)
        for index, (number, obj) in enumerate(zip(numbers, objects, strict=True)):
            if not (is_right(obj, number) if bitmap.test(index) else is_blank(obj)):
                self.wrong.append(number)

    def _query_store(self, task):
        with self._lock:  # what one thread pops may be of another one
            self.stored.update(self.adapter.pop_completed_store_tasks())
            return self.stored.pop(task, None)

    def _result(self, query, task):
        patience = time.monotonic() + 30
        while (result := query(task)) is None:
            assert time.monotonic() < patience, f"task {task} is lost"
            time.sleep(0)  # to the other threads
        return result


@pytest.mark.parametrize("seconds", [1, pytest.param(60, marks=pytest.mark.slow)])
def test_no_task_of_eight_threads_is_lost(lmcache, make_driver, seconds):
    adapter = make_driver(MemoryStore(budget=100 * NBYTES), threads=4).adapter
    run = Load(lmcache, adapter, seconds)
    threads = [threading.Thread(target=run.work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not run.wrong
    assert not run.failed
    assert not run.stored
    wait_for(lambda: adapter.report_status()["unfinished"] == 0, "the last task")
