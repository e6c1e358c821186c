"""Throughput of stores: everyone moves the same bytes, and shares are of the right ceilings."""

import io
import shutil
import socket
from contextlib import ExitStack, closing
from itertools import islice

import pytest

from kvcache.bench import Skipped, StoreReport, StoreTiming, run_store
from kvcache.bench.harness.contest import UnavailableError
from kvcache.bench.store import server
from kvcache.bench.store.case import (
    FILE,
    FILE_STORE,
    FRESH,
    FRESH_STREAM,
    FULL_FILE_STORE,
    GET,
    MEMCPY,
    MEMORY_STORE,
    PUT,
    REDIS_STORE,
    STREAM,
    StoreCase,
)
from kvcache.bench.store.ceilings import OutgoingStream
from kvcache.bench.store.contestants import PROGRAMS, Entrants, FreshPuts
from kvcache.errors import StoreError
from kvcache.stores import MemoryStore, Stored, open_store
from tests import peek

NBYTES = 5000
SERVERS = {*PROGRAMS, *FRESH.values()}
PUTS_ONLY = {FRESH_STREAM, FULL_FILE_STORE, *FRESH.values()}  # their reads are those of others
EVERYONE = {MEMCPY, FILE, STREAM, MEMORY_STORE, FILE_STORE} | PUTS_ONLY | SERVERS


@pytest.fixture(scope="module")
def measured():
    return run_store([NBYTES, 100], rounds=2)


def test_everyone_takes_part_in_both_operations_or_says_why(measured):
    assert measured.sizes == [100, NBYTES]
    absent = {skip.contestant for skip in measured.skipped}
    assert absent <= {*PROGRAMS}
    absent |= {FRESH[name] for name in absent}
    assert {*measured.contestants} | absent == EVERYONE
    for nbytes in measured.sizes:
        for operation in (PUT, GET):
            for name in EVERYONE - absent:
                if operation == GET and name in PUTS_ONLY:
                    continue
                timing = measured.find(operation, nbytes, name)
                assert len(timing.rounds_us) == 2
                assert min(timing.rounds_us) > 0


@pytest.mark.parametrize("store", PROGRAMS)
def test_a_server_is_started_if_there_is_one(measured, store):
    if shutil.which(PROGRAMS[store]) is None:
        pytest.skip(f"no {PROGRAMS[store]} here")
    pytest.importorskip("redis")
    assert store in measured.contestants


def test_without_servers_everyone_else_takes_part(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    report = run_store([100], rounds=1)
    assert {*report.contestants} == EVERYONE - SERVERS
    assert report.skipped == tuple(
        Skipped("values", "of 100 B", store, f"there is no {program} here")
        for store, program in PROGRAMS.items()
    )


def test_a_server_that_does_not_start_is_no_contestant(tmp_path):
    with (
        pytest.raises(UnavailableError, match="false does not start"),
        server.running_server("false", tmp_path),
    ):
        pass


def test_a_server_ends_with_the_block(tmp_path):
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server here: apt-get install redis-server")
    with server.running_server("redis-server", tmp_path) as url:
        port = int(url.rpartition(":")[2])
        socket.create_connection(("127.0.0.1", port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_steps_can_be_repeated_without_end(tmp_path):
    with ExitStack() as stack:
        for _, contestant in Entrants(StoreCase(NBYTES, tmp_path), stack).all():
            for steps in (1, 6, 3):
                contestant.rewind(steps)
                contestant.run(steps)


def test_puts_and_files_are_of_new_names_and_leave_nothing(tmp_path):
    with ExitStack() as stack:
        by_name = {
            contestant.name: contestant
            for operation, contestant in Entrants(StoreCase(NBYTES, tmp_path), stack).all()
            if operation == PUT
        }
        contestants = [by_name[name] for name in (FILE, FILE_STORE)]
        for written in (3, 2):
            for contestant in contestants:
                contestant.rewind(written)
                contestant.run(written)
            assert len(list(tmp_path.glob("plain *"))) == written
            # And the one that those read who get.
            assert len([*tmp_path.glob("store/objects/*/*")]) == written + 1
        assert {path.stat().st_size for path in tmp_path.glob("plain *")} == {NBYTES}


def test_a_full_server_evicts(tmp_path):
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server here: apt-get install redis-server")
    pytest.importorskip("redis")
    budget = 8 << 20
    with server.running_server("redis-server", tmp_path, budget) as url, open_store(url) as store:
        for item in islice(StoreCase(1 << 20, tmp_path).items(), 12):
            assert store.put([item]) == [Stored()]
        usage = store.usage()
        assert usage.budget == budget
        assert usage.nbytes <= budget


def test_a_fresh_server_is_another_one_in_every_block(tmp_path):
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server here: apt-get install redis-server")
    pytest.importorskip("redis")
    with ExitStack() as stack:
        puts, seen = FreshPuts("", "redis-server", StoreCase(NBYTES, tmp_path), stack), set()
        for steps in (2, 1, 3):
            puts.rewind(steps)
            puts.run(steps)
            store = peek.store_of(puts)
            assert store.usage().entries == steps
            seen.add(repr(store))
        assert len(seen) == 3


def test_a_stream_has_arrived_when_its_step_ends(tmp_path):
    case = StoreCase(3 << 20, tmp_path)
    for fresh in (False, True):
        with closing(OutgoingStream(case, fresh)) as stream:
            contestant = stream.contestant()
            for steps in (1, 2):
                contestant.rewind(steps)
                contestant.run(steps)
                received = [bytes(value) for value in peek.received(stream)]
                assert received == [case.value().tobytes()] * (steps if fresh else 1)


def test_each_put_into_a_full_store_evicts_another_value(tmp_path):
    with ExitStack() as stack:
        entrants = Entrants(StoreCase(NBYTES, tmp_path), stack).all()
        [full] = [contestant for _, contestant in entrants if contestant.name == FULL_FILE_STORE]
        before = {*tmp_path.glob("full/objects/*/*")}
        full.run(3)
        after = {*tmp_path.glob("full/objects/*/*")}
        assert (len(before), len(after), len(after - before)) == (4, 4, 3)


def test_items_are_of_one_value_under_different_keys(tmp_path):
    items = list(islice(StoreCase(NBYTES, tmp_path).items(), 5))
    assert len({item.key for item in items}) == 5
    assert {item.nbytes for item in items} == {NBYTES}


def test_a_store_that_does_not_take_values_is_not_timed(tmp_path, monkeypatch):
    make = "kvcache.bench.store.contestants.MemoryStore"
    monkeypatch.setattr(make, lambda: MemoryStore(budget=NBYTES - 1))
    with pytest.raises(StoreError, match="the benchmark cannot go on: Refused"):
        run_store([NBYTES], rounds=1)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"rounds": 0}, "rounds must be >= 1; got 0"),
        ({"sizes": [8, 0]}, r"sizes\[1\] must be >= 1"),
    ],
)
def test_senseless_requests_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        run_store(**{"sizes": [100], "rounds": 1, **wrong})


def test_files_go_where_they_are_wanted_and_are_removed(tmp_path):
    run_store([100], rounds=1, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        run_store([100], rounds=1, directory=tmp_path / "nowhere")


def test_progress_counts_to_the_end():
    seen = []
    run_store([100, 50], rounds=1, progress=lambda *what: seen.append(what))
    labels = ["values of 50 B"] * 2 + ["values of 100 B"] * 2
    assert seen == [(i + 1, 4, label) for i, label in enumerate(labels)]


def test_a_report_survives_its_file(measured, tmp_path):
    measured.to_json(tmp_path / "report.json")
    assert StoreReport.from_json(tmp_path / "report.json") == measured


def report_of(nbytes):
    timings = tuple(
        StoreTiming(operation, nbytes, name, 1, (us,))
        for operation, name, us in [
            (PUT, MEMCPY, 5_000.0),
            (PUT, FILE, 7_000.0),
            (PUT, STREAM, 12_000.0),
            (PUT, MEMORY_STORE, 5_000.0),
            (PUT, FILE_STORE, 9_000.0),
            (PUT, FULL_FILE_STORE, 14_000.0),
            (PUT, REDIS_STORE, 24_000.0),
            (PUT, FRESH_STREAM, 15_000.0),
            (PUT, FRESH[REDIS_STORE], 20_000.0),
            (GET, MEMCPY, 5_000.0),
            (GET, MEMORY_STORE, 10.0),
            (GET, FILE, 8_000.0),
            (GET, FILE_STORE, 16_000.0),
        ]
    )
    return StoreReport(1, "a machine", {"numpy": "2.0"}, timings)


def test_the_table_shows_shares_and_targets_in_80_columns():
    console = pytest.importorskip("rich.console").Console(width=80, file=io.StringIO())
    report = report_of(32 << 20)
    console.print(report.to_table())
    text = console.file.getvalue()
    assert "…" not in text
    rows = [line.split() for line in text.splitlines()]
    assert ["32", "MiB"] in rows
    assert ["FileStore", "9.00", "3.73", "0.78", "16.0", "2.10", "0.50"] in rows
    assert ["FileStore,", "full", "14.0", "2.40", "0.50"] in rows
    assert ["MemoryStore", "5.00", "6.71", "1.00", "0.01", "3,355"] in rows
    assert ["TCP", "stream", "12.0", "2.80"] in rows
    assert [(v.rule, v.at, v.measured, v.passed) for v in report.verdicts] == [
        ("FileStore put / plain file", "32 MiB", pytest.approx(7 / 9), True),
        ("FileStore get / plain file", "32 MiB", 0.5, False),
        ("RedisStore put / TCP stream", "32 MiB", 0.5, False),
        ("RedisStore, fresh put / TCP stream, fresh", "32 MiB", 0.75, True),
    ]


def test_small_values_are_not_judged():
    assert report_of(1 << 20).verdicts == []
