"""Jobs: every one ends once, at its deadline at the latest, and a failure is a miss."""

import gc
import math
import signal
import threading
import time
import weakref

import numpy as np
import pytest

from kvcache.stores import MemoryStore
from kvcache.stores import jobs as jobs_module
from kvcache.stores.jobs import Jobs
from kvcache.stores.named import NamedKeys
from kvcache.stores.transfers import Place, Sink

from .servers import wait_for
from .trouble import LIES, Hanging, Lying, coded, keys_of
from .values import key_of

SHORT = 0.05
"""Seconds to a deadline that a test waits for."""


@pytest.fixture
def begin():
    """Jobs that are closed behind the test, and their stores let go on."""
    begun = []

    def begin(store, **options):
        begun.append(Jobs(store, **{"timeout": 20, "lookup_timeout": 20, **options}))
        return begun[-1]

    yield begin
    for jobs in begun:
        if isinstance(jobs.store, Hanging):
            jobs.store.go_on.set()
        jobs.close()


def full(numbers, nbytes=1000):
    return [Place(key_of(number), coded(number, nbytes).data) for number in numbers]


def blank(numbers, nbytes=1000):
    buffers = [np.full(nbytes, 0xEE, np.uint8) for _ in numbers]
    places = [
        Place(key_of(number), buffer.data) for number, buffer in zip(numbers, buffers, strict=True)
    ]
    return buffers, places


def is_right(buffer, number):
    return np.array_equal(buffer, coded(number, buffer.nbytes))


def is_untouched(buffer):
    return bool((buffer == 0xEE).all())


def test_values_come_back_byte_by_byte(begin):
    jobs = begin(MemoryStore())
    assert jobs.put(full(range(5))).wait().moved == (1000,) * 5
    assert jobs.look_up(keys_of(6)).wait().succeeded == (True,) * 5 + (False,)
    buffers, places = blank(range(5))
    report = jobs.load(places).wait()
    assert report.succeeded == (True,) * 5
    assert report.nbytes == 5000
    assert report.seconds > 0
    assert all(is_right(buffer, number) for number, buffer in enumerate(buffers))


def test_what_is_there_is_not_put_again(begin):
    jobs = begin(MemoryStore())
    jobs.put(full([1])).wait()
    report = jobs.put(full([1, 2])).wait()
    assert report.moved == (0, 1000)
    assert report.succeeded == (True, True)
    assert jobs.store.stats.stored == 2


def test_keys_that_are_missing_leave_their_buffers_as_they_were(begin):
    jobs = begin(MemoryStore())
    jobs.put(full([0, 2])).wait()
    buffers, places = blank(range(4))
    assert jobs.load(places).wait().moved == (1000, None, 1000, None)
    assert is_right(buffers[0], 0)
    assert is_right(buffers[2], 2)
    assert is_untouched(buffers[1])
    assert is_untouched(buffers[3])


def sinks(numbers, nbytes=1000):
    taken = {}
    places = [Place(key_of(number), Sink(nbytes, taker(taken, number))) for number in numbers]
    return taken, places


def taker(taken, number):
    return lambda content: taken.update({number: content})


def test_a_sink_takes_what_is_there(begin):
    jobs = begin(MemoryStore())
    jobs.put(full([0, 2])).wait()
    taken, places = sinks(range(3))
    assert jobs.load(places).wait().moved == (1000, None, 1000)
    assert [number for number in range(3) if number in taken] == [0, 2]
    for number, content in taken.items():
        assert content.readonly
        assert is_right(np.frombuffer(content, np.uint8), number)


def test_a_sink_of_another_length_takes_nothing(begin):
    jobs = begin(MemoryStore())
    jobs.put(full([0])).wait()
    taken, places = sinks([0], 999)
    assert jobs.load(places).wait().succeeded == (False,)
    assert not taken


@pytest.mark.parametrize("lie", LIES)
def test_a_sink_takes_no_lie(begin, lie):
    store = Lying(lambda outcomes: outcomes)
    jobs = begin(store)
    jobs.put(full(range(2))).wait()
    store.lie = lie
    taken, places = sinks(range(2))
    assert jobs.load(places).wait().succeeded == (False, False)
    assert not taken


def test_a_sink_takes_nothing_when_the_job_is_over(begin):
    store = Hanging("get")
    jobs = begin(store, timeout=SHORT)
    jobs.put(full([0])).wait()
    while not store.hung.is_set():
        taken, places = sinks([0])
        assert jobs.load(places).wait().succeeded == (False,)
    store.go_on.set()
    jobs.close()
    wait_for(lambda: is_closed(store), "the last thread to leave")
    assert not taken


def test_a_sink_is_not_put(begin):
    taken, places = sinks([0])
    jobs = begin(MemoryStore())
    assert jobs.put(places).wait().succeeded == (False,)
    assert not taken


def test_a_removed_value_is_gone(begin):
    jobs = begin(MemoryStore())
    jobs.put(full([0])).wait()
    assert jobs.remove(keys_of(2)).wait().succeeded == (True, True)
    assert jobs.look_up(keys_of(1)).wait().succeeded == (False,)


def test_a_job_of_many_keys_is_answered_in_pieces(begin):
    jobs = begin(MemoryStore())
    numbers = range(1300)
    assert all(jobs.put(full(numbers, 16)).wait().succeeded)
    buffers, places = blank(numbers, 16)
    assert all(jobs.load(places).wait().succeeded)
    assert all(is_right(buffer, number) for number, buffer in enumerate(buffers))
    assert all(jobs.look_up(keys_of(1300)).wait().succeeded)


def test_large_values_are_answered_in_pieces(begin):
    jobs = begin(MemoryStore())
    nbytes = 5 << 20
    assert jobs.put(full(range(3), nbytes)).wait().nbytes == 3 * nbytes
    buffers, places = blank(range(3), nbytes)
    assert all(jobs.load(places).wait().succeeded)
    assert all(is_right(buffer, number) for number, buffer in enumerate(buffers))


def test_a_job_without_keys_ends_at_once(begin):
    jobs, reports = begin(MemoryStore()), []
    jobs.load([], reports.append)
    assert [report.moved for report in reports] == [()]


def test_a_value_of_another_form_is_not_loaded(begin):
    jobs = begin(MemoryStore())
    [place] = full([0])
    jobs.put([place._replace(form=b"float16")]).wait()
    buffers, [place] = blank([0])
    assert jobs.load([place._replace(form=b"bfloat16")]).wait().succeeded == (False,)
    assert is_untouched(buffers[0])


def test_a_value_of_another_length_is_not_loaded(begin):
    jobs = begin(MemoryStore())
    jobs.put(full([0], 1000)).wait()
    buffers, places = blank([0], 999)
    assert jobs.load(places).wait().succeeded == (False,)
    assert is_untouched(buffers[0])


@pytest.mark.parametrize("lie", LIES)
def test_a_store_that_lies_gives_misses(begin, lie):
    store = Lying(lambda outcomes: outcomes)
    jobs = begin(store)
    jobs.put(full(range(2))).wait()
    store.lie = lie
    buffers, places = blank(range(2))
    assert jobs.load(places).wait().succeeded == (False, False)
    assert all(map(is_untouched, buffers))


def test_a_lie_that_was_found_out_makes_room_for_the_truth(begin):
    store = Lying(lambda outcomes: outcomes[::-1])
    jobs = begin(store)
    jobs.put(full(range(2))).wait()
    jobs.load(blank(range(2))[1]).wait()
    store.lie = lambda outcomes: outcomes
    assert jobs.look_up(keys_of(2)).wait().succeeded == (False, False)
    assert jobs.put(full(range(2))).wait().nbytes == 2000
    buffers, places = blank(range(2))
    assert all(jobs.load(places).wait().succeeded)
    assert is_right(buffers[1], 1)


def test_a_buffer_that_cannot_be_written_is_a_failure(begin):
    jobs = begin(MemoryStore())
    jobs.put(full([0])).wait()
    assert jobs.load([Place(key_of(0), bytes(1000))]).wait().succeeded == (False,)
    assert jobs.look_up(keys_of(1)).wait().succeeded == (True,)  # the thread goes on


def test_a_load_that_hangs_ends_at_its_deadline_and_writes_nothing_later(begin):
    store = Hanging("get")
    jobs = begin(store, timeout=SHORT)
    jobs.put(full([0])).wait()
    buffers, places = blank([0])
    while not store.hung.is_set():  # until a thread began before the job was over
        report = jobs.load(places).wait()
        assert report.succeeded == (False,)
        assert report.seconds >= SHORT
    store.go_on.set()
    jobs.close()
    wait_for(lambda: store.stats.hits == 1, "the call that hung")
    wait_for(lambda: is_closed(store), "the last thread to leave")
    assert is_untouched(buffers[0])


@pytest.mark.parametrize("call", ["put", "contains"])
def test_a_put_that_hangs_stores_nothing_that_came_into_its_buffer_later(begin, call):
    store = Hanging(call)
    jobs = begin(store, timeout=SHORT)
    source = coded(0, 1000)
    while not store.hung.is_set():
        assert jobs.put([Place(key_of(0), source.data)]).wait().succeeded == (False,)
    source[:] = 0  # of its owner again
    store.calls = ()
    store.go_on.set()
    jobs.drain()
    other = begin(store)
    buffers, places = blank([0])
    wait_for(lambda: store.stats.stored or call == "contains", "the put that hung")
    # What had been copied is put; what had not been, its owner may have freed.
    assert other.load(places).wait().succeeded == (call == "put",)
    assert is_right(buffers[0], 0) if call == "put" else is_untouched(buffers[0])


def test_jobs_that_find_no_thread_end_at_their_deadline(begin):
    store = Hanging("get", "contains")
    jobs = begin(store, threads=2, timeout=SHORT, lookup_timeout=SHORT)
    many = [jobs.load(blank([0])[1]) for _ in range(20)]
    many += [jobs.look_up(keys_of(3)) for _ in range(20)]
    assert not any(any(job.wait().succeeded) for job in many)
    jobs.drain()
    assert jobs.unfinished == 0


def test_jobs_that_end_while_their_pieces_wait_hold_up_nobody(begin):
    """Threads come free at about the moment of the deadline, many times."""
    for call in ("put", "contains", "get") * 30:
        store = Hanging(call)
        jobs = begin(store, timeout=0.002, lookup_timeout=0.002)
        begun = [jobs.put(full([0, 1])), jobs.load(blank([0])[1]), jobs.look_up(keys_of(2))]
        for job in begun:
            job.wait()
        store.go_on.set()
        jobs.drain()
        jobs.close()


def test_a_job_whose_end_is_being_reported_holds_up_nobody(begin):
    store, ending, go_on = Hanging("get"), threading.Event(), threading.Event()
    jobs = begin(store, threads=2, lookup_timeout=SHORT)
    hung = [jobs.load(blank([number])[1]) for number in range(2)]
    assert store.hung.wait(20)

    def then(report):
        ending.set()
        go_on.wait(20)

    jobs.look_up(keys_of(2), then)  # finds no thread
    assert ending.wait(20)
    store.go_on.set()
    answers = []
    other = threading.Thread(
        target=lambda: answers.extend(jobs.put(full([5])).wait().succeeded), daemon=True
    )
    other.start()
    other.join(20)
    go_on.set()
    assert answers == [True]
    assert not any(any(job.wait().succeeded) for job in hung)


def test_timeouts_may_be_infinite(begin):
    store = Hanging("get")
    jobs = begin(store, timeout=math.inf, lookup_timeout=math.inf)
    hung = jobs.load(blank([0])[1])
    assert store.hung.wait(20)
    assert jobs.look_up(keys_of(1)).wait().succeeded == (False,)
    store.go_on.set()
    assert hung.wait().succeeded == (False,)


def test_ended_jobs_are_forgotten_before_their_deadlines(begin):
    jobs = begin(MemoryStore())
    jobs.put(full([0])).wait()
    ended = []
    for _ in range(500):
        job = jobs.load(blank([0], 10)[1])
        job.wait()
        ended.append(weakref.ref(job))
    jobs.drain()
    del job
    gc.collect()
    assert sum(job() is not None for job in ended) < 100


def test_without_threads_jobs_fail(begin, monkeypatch):
    def start(target, name):
        raise RuntimeError("can't start new thread")

    jobs = begin(MemoryStore())
    with monkeypatch.context() as patch:
        patch.setattr(jobs_module, "_start", start)
        assert jobs.look_up(keys_of(1)).wait().succeeded == (False,)
        assert jobs.unfinished == 0
    assert jobs.put(full([0])).wait().succeeded == (True,)


def test_without_a_thread_for_the_store_jobs_end_at_their_deadline(begin, monkeypatch):
    start = jobs_module._start

    def start_the_watch(target, name):
        if name != "kvcache-watch":
            raise RuntimeError("can't start new thread")
        start(target, name)

    jobs = begin(MemoryStore(), lookup_timeout=SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(jobs_module, "_start", start_the_watch)
        assert jobs.look_up(keys_of(1)).wait().succeeded == (False,)
    assert jobs.put(full([0])).wait().succeeded == (True,)


def test_ctrl_c_in_closing_loses_no_report(begin):
    store, reports = Hanging("get"), []
    jobs = begin(store)

    def then(report):
        reports.append(report)
        if len(reports) == 1:
            signal.raise_signal(signal.SIGINT)

    begun = [jobs.load(blank([number])[1], then) for number in range(3)]
    assert store.hung.wait(20)
    with pytest.raises(KeyboardInterrupt):
        jobs.close()
    store.go_on.set()
    jobs.close()
    assert len(reports) == 3
    assert not any(any(job.wait().succeeded) for job in begun)
    jobs.drain()
    wait_for(lambda: is_closed(store), "the last thread to leave")


def test_reads_go_on_while_puts_hang(begin):
    store = Hanging("put")
    jobs = begin(store, threads=3)
    hung = [jobs.put(full([number])) for number in range(10)]
    assert store.hung.wait(20)
    assert jobs.look_up(keys_of(2)).wait().succeeded == (False, False)
    store.go_on.set()
    assert all(all(job.wait().succeeded) for job in hung)


def test_closing_ends_jobs_in_the_middle_once_each(begin):
    store, reports = Hanging("get", "put"), []
    jobs = begin(store, threads=3)
    for number in range(5):
        jobs.load(blank([number])[1], reports.append)
        jobs.put(full([number]), reports.append)
    assert store.hung.wait(20)
    jobs.close()
    assert len(reports) == 10
    assert not any(any(report.succeeded) for report in reports)
    assert not is_closed(store)  # threads are in it
    store.go_on.set()
    wait_for(lambda: is_closed(store), "the last thread to leave")
    jobs.close()
    assert len(reports) == 10


def test_jobs_behind_closing_fail_at_once(begin):
    jobs = begin(MemoryStore())
    jobs.close()
    assert is_closed(jobs.store)
    assert jobs.look_up(keys_of(1)).wait().succeeded == (False,)
    assert jobs.put(full([0])).wait().succeeded == (False,)


def is_closed(store):
    [outcome] = store.contains([key_of(0)])
    return "is closed" in getattr(outcome, "reason", "")


def test_a_report_that_raises_is_logged_and_the_thread_goes_on(begin, caplog):
    jobs = begin(MemoryStore())

    def then(report):
        raise RuntimeError("a listener")

    jobs.put(full([0]), then).wait()
    assert "could not be reported" in caplog.text
    assert jobs.look_up(keys_of(1)).wait().succeeded == (True,)


def test_draining_waits_for_all_reports(begin):
    jobs, reports = begin(MemoryStore()), []
    for number in range(50):
        jobs.put(full([number]), reports.append)
    jobs.drain()
    assert len(reports) == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 1}, "threads must be >= 2"),
        ({"timeout": 0}, "timeouts must be > 0"),
        ({"lookup_timeout": -1}, "timeouts must be > 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Jobs(MemoryStore(), **options)


def test_keys_are_digests(begin):
    jobs = begin(MemoryStore())
    with pytest.raises(ValueError, match="32 bytes"):
        jobs.look_up([b"short"])


class Run:
    """What eight threads ask of the same jobs, and how it ended."""

    def __init__(self, jobs, rounds):
        self.jobs, self.rounds, self.wrong = jobs, rounds, []
        self.begun, self.reported, self._lock = 0, 0, threading.Lock()

    def work(self, seed):
        random = np.random.default_rng(seed)
        waiting = []
        for _ in range(self.rounds):
            waiting.append(self.one(random))
            if len(waiting) > 10:
                self.check(*waiting.pop(0))
        for one in waiting:
            self.check(*one)

    def one(self, random):
        numbers = random.integers(0, 100, random.integers(1, 6)).tolist()
        kind = random.choice(["look up", "load", "put", "remove"], p=[0.3, 0.3, 0.35, 0.05])
        with self._lock:
            self.begun += 1
        if kind == "load":
            buffers, places = blank(numbers, 500)
            return numbers, buffers, self.jobs.load(places, self.note)
        if kind == "put":
            return numbers, [], self.jobs.put(full(numbers, 500), self.note)
        ask = self.jobs.look_up if kind == "look up" else self.jobs.remove
        return numbers, [], ask([key_of(number) for number in numbers], self.note)

    def note(self, report):
        with self._lock:
            self.reported += 1

    def check(self, numbers, buffers, job):
        answers = job.wait().succeeded
        for number, buffer, loaded in zip(numbers, buffers, answers, strict=False):
            if not (is_right(buffer, number) if loaded else is_untouched(buffer)):
                self.wrong.append(number)


def test_no_job_of_eight_threads_is_lost(begin):
    run = Run(begin(MemoryStore(20_000)), 150)
    in_eight_threads(run)


@pytest.mark.matrix
def test_no_job_of_eight_threads_is_lost_in_a_minute(begin):
    jobs, end = begin(MemoryStore(20_000)), time.monotonic() + 60
    while time.monotonic() < end:
        in_eight_threads(Run(jobs, 500))


def in_eight_threads(run):
    threads = [threading.Thread(target=run.work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.jobs.drain()
    assert run.begun == run.reported == 8 * run.rounds
    assert not run.wrong
    assert run.jobs.unfinished == 0


def test_a_server_that_is_killed_gives_misses(begin, tmp_path):
    pytest.importorskip("redis")
    from kvcache.stores.redis import RedisStore

    from .servers import RunningServer, running

    with running(RunningServer, "redis", tmp_path) as server:
        jobs = begin(RedisStore(server.url, timeout=5), timeout=5, lookup_timeout=5)
        assert all(jobs.put(full(range(4))).wait().succeeded)
        buffers, places = blank(range(4))
        assert all(jobs.load(places).wait().succeeded)
        server.kill()
        buffers, places = blank(range(4))
        assert jobs.load(places).wait().moved == (None,) * 4
        assert all(map(is_untouched, buffers))
        assert jobs.look_up(keys_of(4)).wait().succeeded == (False,) * 4
        assert jobs.put(full([9])).wait().succeeded == (False,)


@pytest.mark.matrix
def test_a_server_that_is_killed_in_the_middle_loses_no_job(begin, tmp_path):
    pytest.importorskip("redis")
    from kvcache.stores.redis import RedisStore

    from .servers import RunningServer, running

    with running(RunningServer, "redis", tmp_path) as server:
        jobs = begin(RedisStore(server.url, timeout=5), timeout=5, lookup_timeout=5)
        jobs.put(full(range(100))).wait()
        run = Run(jobs, 300)

        def kill():
            wait_for(lambda: run.reported > 400, "jobs")
            server.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        in_eight_threads(run)
        killer.join()


def test_names_of_two_namespaces_have_no_key_in_common():
    fields = {"model": "a", "dtype": "float16", "rank": 0}
    key = NamedKeys(fields).key(b"name")
    assert NamedKeys(dict(reversed(fields.items()))).key(b"name") == key
    assert NamedKeys(fields).key(b"nam") != key
    for changed in ({"model": "b"}, {"dtype": "bfloat16"}, {"rank": 1}, {"more": None}):
        assert NamedKeys({**fields, **changed}).key(b"name") != key


def test_the_recipe_of_names_is_fixed():
    key = NamedKeys({"engine": "test", "rank": 0}).key(b"name")
    assert key.hex() == "4da8f1a27afffb010addb334d4bba329f6d611f7eeeaa64616174ef324fdaf8a"
