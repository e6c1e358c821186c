"""A store behind a prefix cache, and whatever fails: sessions go on, and nothing is left over."""

import errno
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

import kvcache
from kvcache import KVCache
from kvcache.prefix import PrefixCache
from kvcache.stores import Deadline, FileStore, MemoryStore

from .. import peek
from ..failures.injection import Moments, interrupt, lines
from .served import check_accounts, check_nothing_left
from .test_session_ends import Boom, Fuse, policy_with
from .tiered import FIRST, LATER, REPLY, TURNED, Gate, Stored, model_of, stored_in

NUMPY = kvcache.get_backend("numpy")
PROMPT = [*TURNED, 12]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("budget", [pytest.param(None, marks=pytest.mark.matrix), 500])
@pytest.mark.parametrize("name", ["full", pytest.param("hybrid", marks=pytest.mark.matrix)])
def test_a_policy_or_a_clock_that_raises_leaks_nothing(name, budget, after):
    store = stored_in(MemoryStore(), name)
    for moment in range(1, 200):
        fuse = Fuse()

        def clock(fuse=fuse):
            fuse.burn()
            return 0.0

        options = {"policy": policy_with(fuse, after), "clock": clock, "budget": budget}
        server = Stored(model_of(name, NUMPY), store, **options)
        server.ask([1, 2, 70])
        fuse.left = moment
        try:
            session = server.begin(PROMPT)
            server.compute(session, PROMPT, session.matched)
            session.close()
        except Boom:
            fuse.left = 0
        else:
            fuse.left = 0
            break
        check_accounts(server)
        assert server.prefix.stats.active == 0
        for _ in range(2):
            assert server.ask(PROMPT) <= 11
            check_accounts(server)
        check_nothing_left(server)
    assert 3 < moment < 199


def test_ctrl_c_while_a_session_waits_for_the_store():
    store = Gate(stored_in(MemoryStore()))
    server = Stored(model_of("full", NUMPY), store)
    before = server.prefix.stats
    main = threading.main_thread().ident
    store.asked = lambda: signal.pthread_kill(main, signal.SIGINT)
    store.opened.clear()
    # A signal that comes in the instant before a thread sleeps does not wake it: CPython raises
    # when the wait is over. So this one has an end that a test can afford.
    with pytest.raises(KeyboardInterrupt):
        server.begin(PROMPT, deadline=Deadline.after(60))
    store.asked = None
    store.opened.set()
    assert peek.fetching(server.prefix).drain(LATER)
    after = server.prefix.stats
    assert (after.sessions, after.active, after.nbytes) == (before.sessions, 0, before.nbytes)
    assert server.ask(PROMPT) == 10
    check_accounts(server)


@pytest.mark.parametrize(
    "stride", [pytest.param(5, id="many", marks=pytest.mark.matrix), pytest.param(61, id="some")]
)
@pytest.mark.parametrize("name", ["full", "hybrid"])
def test_ctrl_c_at_any_line_of_a_beginning(name, stride):
    store = stored_in(MemoryStore(), name)
    moments = Moments()
    with lines(moments):
        Stored(model_of(name, NUMPY), store).prefix.session(PROMPT, deadline=LATER).close()
    assert len(moments.names) > 300
    for chosen in range(1, len(moments.names), stride):
        server = Stored(model_of(name, NUMPY), store)
        session = None
        moments = Moments(chosen, interrupt)
        try:
            with lines(moments):
                session = server.prefix.session(PROMPT, deadline=LATER)
        except KeyboardInterrupt:
            assert server.prefix.stats.active == server.prefix.stats.sessions == 0, moments.struck
        else:
            session.close()
        assert peek.fetching(server.prefix).drain(LATER), moments.struck
        check_accounts(server)
        assert server.ask(PROMPT) in {10, 11}, moments.struck
        check_nothing_left(server)


def test_a_full_disk_costs_pages_only(tmp_path, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with FileStore(tmp_path) as store:
        server = Stored(model_of("full", NUMPY), store)
        with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
            patched.setattr(os, "writev", full)
            server.ask(FIRST, REPLY)
            assert server.ask(PROMPT) == 10, "from memory"
        assert server.counts.written == 0
        assert server.counts.dropped >= 4
        assert len(caplog.records) == 1
        server.ask(PROMPT)
        assert server.counts.written >= 3, "put when there was room"


def test_a_cache_of_another_dtype_finds_nothing():
    store = MemoryStore()

    def matched(dtype):
        prefix = PrefixCache(
            [KVCache("numpy", dtype=dtype)], store=store, namespace="tiny", page_tokens=4
        )
        with prefix.session(range(9), deadline=LATER) as session:
            rows = np.zeros((1, 1, session.remaining.size, 2), dtype)
            session.caches[0].update(rows, rows)
        assert prefix.flush(LATER)
        assert prefix.stats.store.failed == 0
        return session.matched

    assert [matched(dtype) for dtype in ("float32", "float16", "float32", "float16")] == [
        *(0, 0),
        *(8, 8),
    ]


# In processes of their own.

SESSIONS = """
import numpy as np, os, sys
from kvcache import KVCache
from kvcache.prefix import PrefixCache
from kvcache.stores import Deadline

LATER = Deadline.after(600)
caches = [KVCache("numpy") for _ in range(2)]
prefix = PrefixCache(caches, store=f"file://{sys.argv[1]}", namespace="tiny", page_tokens=4)

def ask(tokens):
    with prefix.session(tokens, deadline=LATER) as session:
        rows = np.array(session.remaining, np.float32).reshape(1, 1, -1, 1)
        for cache in session.caches:
            keys, _ = cache.update(rows, rows)
            assert keys.ravel().tolist() == list(tokens)
    assert prefix.flush(LATER)
    return session.matched
"""
FORKED = f"""{SESSIONS}
one, two = range(30), range(100, 130)
assert ask(one) == 0
prefix.clear()
child = os.fork()
if not child:
    right = ask(one) == 29 and ask(two) == 0 and prefix.stats.store.dropped == 0
    os._exit(not right)
assert os.waitpid(child, 0)[1] == 0
assert ask(two) == 29
assert ask(one) == 29
assert prefix.close()
"""
READ_ONLY = f"""{SESSIONS}
if os.geteuid() == 0:
    os.setgid(65534), os.setuid(65534)
assert ask(range(30)) == 29
assert ask(range(200, 230)) == 0
assert ask(range(200, 231)) == 30
store = prefix.stats.store
assert store.written == 0 and store.dropped > 7, store
"""


def run_script(script, place):
    done = subprocess.run(
        [sys.executable, "-c", script, place], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_forked_child_goes_on_with_threads_of_its_own(tmp_path):
    run_script(FORKED, tmp_path)


def test_a_directory_that_may_only_be_read_is_read():
    with tempfile.TemporaryDirectory() as parent:  # pytest's own are closed to other users
        place = Path(parent) / "cache"
        run_script(f"{SESSIONS}\nask(range(30)), prefix.close()", place)
        Path(parent).chmod(0o755)
        for path in [place, *place.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            trouble = run_script(READ_ONLY, place)
        finally:
            for path in [place, *place.rglob("*")]:
                path.chmod(0o755)
    assert trouble.count("the store is unavailable") == 1
