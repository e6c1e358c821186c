"""Sessions that are killed: what passes had completed is kept, and the next try goes on there.

Keys and states are position-coded, and every pass of a model looks at all that its tokens see, so a
next try that resumes wrongly fails in :mod:`served`.
"""

import asyncio
import logging
import signal
from contextlib import suppress

import pytest

import kvcache
from kvcache import (
    CausalCache,
    EncoderCache,
    KVCache,
    RecurrentCache,
    RotatingKVCache,
    StateCache,
)

from .served import FULL, MODELS, SOME, Layers, Pool, Server, check_accounts, check_nothing_left

NUMPY = kvcache.get_backend("numpy")
PROMPT = list(range(1, 8))
WHOLE = [*PROMPT, 21, 22, 23]
SIZES = (3, 1)
WRITES = [
    (CausalCache, "put"),
    (EncoderCache, "put"),
    (RecurrentCache, "put_states"),
    (KVCache, "update"),
    (RotatingKVCache, "update"),
    (StateCache, "advance"),
]
CI = {*SOME, "per-layer", "hybrid"}


class Killed(BaseException):
    """Somebody pulled the plug."""


class Fuse:
    """Kills at one of the moments that it counts: between passes, and around every write."""

    def __init__(self, moment):
        self.left, self.between = moment, False

    def burn(self, between=False):
        self.left -= 1
        if self.left == 0:
            self.between = between
            raise Killed


@pytest.fixture
def fuse(monkeypatch):
    """A fuse on every write of every kind of cache, which never burns down by itself."""
    current = Fuse(0)

    def burning(write):
        def call(*arguments, **options):
            current.burn()
            result = write(*arguments, **options)
            current.burn()
            return result

        return call

    for kind, name in WRITES:
        monkeypatch.setattr(kind, name, burning(getattr(kind, name)))
    return current


def attempt(server, fuse, moment):
    """A session that is killed at a moment; returns the tokens of complete passes, None if none."""
    session = server.begin(PROMPT)
    done, fuse.left = session.matched, moment
    try:
        with session:
            while done < len(WHOLE):
                stop = min(len(PROMPT), done + SIZES[done % 2])
                if done >= len(PROMPT):
                    session.extend([WHOLE[done]])
                    stop = done + 1
                fuse.burn(between=True)
                server.model.run(session, WHOLE, done, stop)
                done = stop
    except Killed:
        return done
    finally:
        fuse.left = 0
    return None


def moments(server, fuse):
    """All moments of an attempt, each on the same server cleared; yields what was complete."""
    for moment in range(1, 200):
        server.prefix.clear()
        done = attempt(server, fuse, moment)
        if done is None:
            assert moment > len(WHOLE)
            return
        yield moment, done


def retry(server):
    """The next try, which goes on with all that was named; returns where it began."""
    longer = [*WHOLE, 30]
    session = server.begin(longer)
    with session:
        server.compute(session, longer, session.matched, SIZES)
    return session.matched


CELLS = [pytest.param(name, marks=() if name in CI else pytest.mark.matrix) for name in MODELS]


@pytest.mark.parametrize("name", CELLS)
def test_killed_at_each_moment(name, fuse):
    server = Server(MODELS[name](NUMPY))
    server.ask([50, 51])
    for _, done in moments(server, fuse):
        matched = retry(server)
        assert matched <= done + max(SIZES)
        # In a pool the last pass is taken back. Layers of their own that a pass had reached are
        # ahead of the others, and a ring or state goes back to the resume point kept last.
        if fuse.between:
            assert matched == done
        elif name in FULL or isinstance(server.model, Pool):
            assert matched >= done
        assert server.ask(PROMPT) == len(PROMPT) - 1 or name not in FULL
        check_accounts(server)
        check_nothing_left(server)


@pytest.mark.parametrize("name", ["full", "window", "encoder", "hybrid pool", "recurrent pool"])
def test_killed_in_the_first_passes_of_a_pool(name, fuse):
    """Nothing tells how many layers a model has before it went through all of them once."""
    for moment in range(1, 200):
        server = Server(MODELS[name](NUMPY))
        for _ in range(2):  # the same fault again
            if (done := attempt(server, fuse, moment)) is None:
                break
        if done is None:
            break
        matched = retry(server)
        assert done - max(SIZES) <= matched <= done + max(SIZES)
        check_nothing_left(server)
    assert moment > 2 * len(WHOLE)


@pytest.mark.parametrize("moment", [1, 4, 9, 14])
@pytest.mark.parametrize("name", ["layers of both", "per-layer"])
def test_killed_on_every_backend(backend, name, moment, fuse):
    server = Server(MODELS[name](backend))
    server.ask([50, 51])
    done = attempt(server, fuse, moment)
    assert retry(server) >= done
    check_accounts(server)
    check_nothing_left(server)


def test_a_prompt_that_always_times_out_is_finished_in_the_end(fuse):
    server, tries = Server(MODELS["hybrid pool"](NUMPY)), 0
    while server.prefix.lookup(PROMPT).matched < len(PROMPT) - 1:
        attempt(server, fuse, 20)
        tries += 1
        assert tries < 6
    assert tries > 1


def test_unnamed_tokens_of_a_killed_session_are_not_stored():
    server = Server(MODELS["full"](NUMPY))
    server.ask([50, 51])
    with suppress(Killed), server.begin(PROMPT) as session:
        server.compute(session, WHOLE, 0)
        raise Killed
    assert server.prefix.lookup([*WHOLE, 30]).matched == len(PROMPT)


# How sessions are killed.


@pytest.mark.parametrize("name", ["window", "hybrid"])
def test_ctrl_c(name):
    server = Server(MODELS[name](NUMPY))
    server.ask([50, 51])
    session = server.begin(PROMPT)
    server.compute(session, PROMPT[:4], 0)
    with pytest.raises(KeyboardInterrupt), session:
        signal.raise_signal(signal.SIGINT)
    assert retry(server) == 4
    check_nothing_left(server)


@pytest.mark.parametrize("keep", [False, True])
def test_a_cancelled_task(keep):
    server = Server(MODELS["window"](NUMPY))
    server.ask([50, 51])

    async def request(computed):
        async with server.prefix.async_session(PROMPT, keep_on_error=keep) as session:
            server.compute(session, PROMPT[:4], 0)
            computed.set()
            await asyncio.Event().wait()

    async def main():
        computed = asyncio.Event()
        task = asyncio.create_task(request(computed))
        await computed.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert server.prefix.stats.active == 0
    assert server.prefix.lookup(PROMPT).matched == 4 * keep
    check_accounts(server)


@pytest.mark.parametrize("model", [lambda: Pool(NUMPY, {}), lambda: Layers(NUMPY, {}, {})])
def test_a_failure_to_keep_does_not_hide_the_error(monkeypatch, caplog, model):
    server = Server(model())
    session = server.begin(PROMPT)
    server.compute(session, PROMPT, 0)

    def full(*arguments):
        raise MemoryError("no room")

    monkeypatch.setattr(type(session._request.handle), "capture", full)
    with (
        caplog.at_level(logging.WARNING, "kvcache.prefix"),
        pytest.raises(ValueError, match="what the model says") as caught,
        session,
    ):
        raise ValueError("what the model says")
    [note] = caught.value.__notes__
    assert note.endswith("MemoryError: no room")
    assert len(caplog.records) == 1
    assert server.prefix.stats.active == server.prefix.stats.pinned == 0
    monkeypatch.undo()
    assert server.ask(PROMPT) == 0
    check_accounts(server)


def test_keep_on_error_is_a_bool():
    server = Server(MODELS["full"](NUMPY))
    with pytest.raises(TypeError, match=r"keep_on_error tells .* True or False; got 'keep'"):
        server.prefix.session(PROMPT, keep_on_error="keep")
    assert server.prefix.stats.active == 0
