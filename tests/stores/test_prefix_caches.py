"""Prefix caches on real servers: shared, stopped, killed and full; and between frameworks."""

import json
import logging
import time

import pytest

pytest.importorskip("redis")

import kvcache
from kvcache.stores import Deadline
from kvcache.stores.redis import RedisStore

from ..prefix.served import check_accounts
from ..prefix.tiered import LATER, TURNED, Stored, model_of, stored_in
from ..reference.hybrid.conftest import tiny_path, write_checkpoint  # noqa: F401
from ..reference.llama.conftest import write_gguf  # noqa: F401
from .scripts import run
from .servers import RunningServer, running, wait_for

NUMPY = kvcache.get_backend("numpy")
PROMPT = [*TURNED, 12]
SOON = 0.15
ENOUGH = 1.5
"""Seconds in which a server on a busy machine says something."""


@pytest.fixture(
    params=[
        "redis_server",
        "valkey_server",
        pytest.param("redis_cluster", marks=pytest.mark.matrix),
    ]
)
def server(request):
    server = request.getfixturevalue(request.param)
    yield server
    server.clear()


@pytest.fixture
def own_server(tmp_path):
    with running(RunningServer, "redis", tmp_path) as server:
        yield server


@pytest.mark.parametrize("name", ["full", "window", "hybrid", "hybrid pool"])
def test_sessions_share_a_server(server, name):
    with RedisStore(server.url) as store:
        stored_in(store, name)
    served = Stored(model_of(name, NUMPY), server.url)
    assert served.ask([*PROMPT, 13]) == 10
    check_accounts(served)
    assert (served.counts.failed, served.counts.late, served.counts.dropped) == (0, 0, 0)
    assert served.prefix.close(LATER)


class Watched(RedisStore):
    """Calls `watch` before it reads the first value."""

    watch = None

    def _get(self, keys, deadline):
        if self.watch is not None:
            self.watch()
            self.watch = None
        return super()._get(keys, deadline)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_server_that_ends_in_the_middle_of_a_beginning(own_server, end):
    with RedisStore(own_server.url) as store:
        stored_in(store)
    with Watched(own_server.url, timeout=ENOUGH) as store:
        waiting = Stored(model_of("full", NUMPY), store)
        store.watch = getattr(own_server, end)
        started = time.monotonic()
        session = waiting.begin(PROMPT, deadline=Deadline.after(60))
        assert time.monotonic() - started < 30, "silence ends it, long before the deadline"
        assert store.watch is None, "it has ended while values were read"
        assert session.matched == 0
        with session:
            waiting.compute(session, PROMPT, 0)  # looks at what every token attends to
        assert waiting.counts.late == 1

        def unavailable():
            waiting.ask([50, 51], deadline=Deadline.after(SOON))
            [outcome] = store.contains([bytes(32)], deadline=Deadline.after(SOON))
            return "breaker is open" in outcome.reason

        wait_for(unavailable, "the breaker opens")
        started = time.monotonic()
        assert waiting.ask([60, 61, 62, 63, 64], deadline=Deadline.after(60)) == 0
        assert time.monotonic() - started < 30, "an open breaker is not waited for"
        if end == "stop":
            own_server.go_on()
        else:
            own_server.start()
        with RedisStore(own_server.url) as other:
            stored_in(other)

        def found():
            fresh = Stored(model_of("full", NUMPY), store)
            return fresh.ask(PROMPT, deadline=Deadline.after(5)) >= 10

        wait_for(found, "the breaker closes")
        check_accounts(waiting)


def test_a_server_without_memory_is_read(own_server, caplog):
    with RedisStore(own_server.url) as store:
        stored_in(store)
    own_server.ask("CONFIG", "SET", "maxmemory", "1")
    with caplog.at_level(logging.WARNING):
        served = Stored(model_of("full", NUMPY), own_server.url)
        assert served.ask(PROMPT, [13, 14]) == 10
        assert served.ask([*PROMPT, 13, 14, 15]) == 13, "from memory"
    assert served.counts.written == 0
    assert served.counts.dropped >= 2
    assert len(caplog.records) == 1
    assert served.prefix.close(LATER)


# Between processes on different frameworks, with real models.


def shared_by(name, cases):
    """What sessions in a process on one backend have found."""
    lines = run("sharing.py", name, json.dumps(cases)).splitlines()
    sessions = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(sessions) == len(cases), "\n".join(lines)
    return sessions


@pytest.fixture
def models(request):
    """Paths of a llama and of a hybrid, both tiny."""
    pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
    return request.getfixturevalue("write_gguf")(), request.getfixturevalue("tiny_path")


@pytest.mark.parametrize(
    ("writer", "readers", "kinds"),
    [
        pytest.param("numpy", ["torch"], ["kv"], id="numpy to torch"),
        pytest.param(
            *("torch", ["jax", "mlx", "numpy"], ["kv", "rotating"]),
            id="torch to all",
            marks=pytest.mark.matrix,
        ),
        pytest.param("jax", ["torch"], ["kv"], id="jax to torch", marks=pytest.mark.matrix),
    ],
)
def test_processes_on_other_backends_share_prefixes(
    writer, readers, kinds, redis_server, tmp_path, models
):
    for name in (writer, *readers):
        pytest.importorskip(name.replace("mlx", "mlx.core"))
    urls = (redis_server.url, f"file://{tmp_path}")
    cases = [(str(path), kind, url) for path in models for kind in kinds for url in urls]
    first = shared_by(writer, cases)
    assert [session["matched"] for session in first] == [0] * len(cases)
    for reader in readers:
        for before, session in zip(first, shared_by(reader, cases), strict=True):
            assert session["matched"] == 22, "all of the prompt but its last token"
            assert session["right"], session
            assert session["failed"] == 0
            assert session["token"] == before["token"]
    redis_server.clear()
