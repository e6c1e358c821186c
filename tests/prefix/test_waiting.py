"""Sessions that wait: for another that computes the same tokens, and outside of the event loop."""

import asyncio
import threading

import pytest

import kvcache
from kvcache.stores import Deadline, MemoryStore

from .served import MODELS, Server, check_accounts, check_nothing_left, shared
from .tiered import PAGE, Stored, model_of

NUMPY = kvcache.get_backend("numpy")
PROMPT = list(range(1, 13))
LONG_SECONDS = 600.0
"""Longer than any test runs."""


def looking(server, monkeypatch):
    """An event that is set when a session begins to wait for another."""
    looks, wait = threading.Event(), server.prefix._requests.ended_or_stored.wait

    def noted(seconds):
        looks.set()
        return wait(seconds)

    monkeypatch.setattr(server.prefix._requests.ended_or_stored, "wait", noted)
    return looks


class Second(threading.Thread):
    """A session that waits in a thread of its own, and computes what is left."""

    def __init__(self, server, ids=PROMPT, wait=LONG_SECONDS):
        super().__init__()
        self.server, self.ids, self.wait, self.matched = server, ids, wait, None

    def run(self):
        self.matched = self.server.ask(self.ids, wait=self.wait)


@pytest.mark.parametrize("name", ["full", "window", "hybrid", "hybrid pool"])
def test_the_second_waits_until_the_first_ends(name, monkeypatch):
    server = Server(MODELS[name](NUMPY))
    looks, first = looking(server, monkeypatch), server.begin(PROMPT)
    server.compute(first, PROMPT[:6], 0)
    (second := Second(server)).start()
    looks.wait()
    assert server.prefix.stats.active == 1
    server.compute(first, PROMPT, 6)
    first.close()
    second.join()
    assert second.matched == len(PROMPT) - 1
    check_accounts(server)
    check_nothing_left(server)


def test_the_second_begins_with_what_the_first_commits(monkeypatch):
    server = Server(MODELS["full"](NUMPY))
    looks, first = looking(server, monkeypatch), server.begin(PROMPT)
    server.compute(first, PROMPT[:6], 0)
    (second := Second(server, [*PROMPT[:8], 40])).start()
    looks.wait()
    first.commit()
    second.join()
    assert second.matched == 6
    server.compute(first, PROMPT, 6)
    first.close()
    check_accounts(server)


@pytest.mark.parametrize("end", ["close", "drop"])
def test_a_first_that_stores_nothing(end, monkeypatch):
    server = Server(MODELS["full"](NUMPY))
    looks, first = looking(server, monkeypatch), [server.begin(PROMPT)]
    (second := Second(server)).start()
    looks.wait()
    session = first.pop()
    if end == "close":
        session.close(store=False)
    del session
    second.join()
    assert second.matched == 0
    assert server.prefix.stats.active == 0


def test_many_wait_for_one(monkeypatch):
    server = Server(MODELS["per-layer"](NUMPY))
    looks, first = looking(server, monkeypatch), server.begin(PROMPT)
    others = [Second(server, [*PROMPT, 40 + number]) for number in range(4)]
    for other in others:
        other.start()
    looks.wait()
    server.compute(first, PROMPT, 0)
    first.close()
    for other in others:
        other.join()
    assert {other.matched for other in others} == {len(PROMPT)}
    assert server.prefix.stats.active == 0


@pytest.mark.parametrize("wait", [0, Deadline.after(0), 0.01])
def test_a_deadline_that_passes(wait):
    server = Server(MODELS["full"](NUMPY))
    first = server.begin(PROMPT)
    assert server.ask(PROMPT, wait=wait) == 0
    first.close()
    check_accounts(server)


@pytest.mark.parametrize(
    ("ids", "options"),
    [
        ([90, *PROMPT], {}),  # nothing in common
        (PROMPT, {"salt": "tenant"}),
        (PROMPT[:1], {}),  # the only token is computed in any case
    ],
)
def test_nobody_to_wait_for(ids, options):
    server = Server(MODELS["full"](NUMPY))
    first = server.begin(PROMPT)
    assert server.ask(ids, wait=LONG_SECONDS, **options) == 0
    first.close(store=False)
    assert server.ask(PROMPT, wait=LONG_SECONDS) == shared(PROMPT, ids) * (not options)


def test_what_is_stored_is_not_waited_for():
    server = Server(MODELS["full"](NUMPY))
    server.ask(PROMPT)
    first = server.begin([*PROMPT, 30, 31])
    assert server.ask([*PROMPT, 40], wait=LONG_SECONDS) == len(PROMPT)
    first.close()


def test_waits_that_are_none():
    server = Server(MODELS["full"](NUMPY))
    for wait, error in ((float("nan"), ValueError), ("soon", TypeError)):
        with pytest.raises(error, match=r"waits for another until a kvcache\.stores\.Deadline"):
            server.prefix.session(PROMPT, wait=wait)
    assert server.prefix.stats.active == 0


# Nothing is stored twice.


@pytest.mark.parametrize("name", MODELS)
def test_the_same_prompt_computed_twice_is_stored_once(name):
    server, alone = Server(MODELS[name](NUMPY)), Server(MODELS[name](NUMPY))
    longer = [*PROMPT[:8], 40, 41]
    for ids in (PROMPT, longer):
        alone.ask(ids)
    both = [server.begin(ids) for ids in (PROMPT, PROMPT)]
    for session in both:
        server.compute(session, PROMPT, 0)
    for session in both:
        session.close()
    assert server.ask(longer) <= shared(PROMPT, longer)
    assert both[1].usage.created_cache_tokens == 0
    assert server.prefix.stats.nbytes == alone.prefix.stats.nbytes
    check_accounts(server)
    check_nothing_left(server)


# In an event loop.


async def asked(server, ids=PROMPT, **options):
    async with server.prefix.async_session(ids, **options) as session:
        server.compute(session, ids, session.matched)
        return session.matched


def test_the_event_loop_goes_on_while_a_task_waits():
    server = Server(MODELS["full"](NUMPY))

    async def first(others):
        async with server.prefix.async_session(PROMPT) as session:
            others.append(asyncio.create_task(asked(server, wait=LONG_SECONDS)))
            for start in range(len(PROMPT)):
                server.model.run(session, PROMPT, start, start + 1)
                await asyncio.sleep(0)

    async def main():
        await first(others := [])
        return await others[0]

    assert asyncio.run(main()) == len(PROMPT) - 1
    check_accounts(server)


def test_a_task_that_is_cancelled_while_it_waits_has_begun_nothing(monkeypatch):
    server = Server(MODELS["full"](NUMPY))
    looks, first = looking(server, monkeypatch), server.begin(PROMPT)

    async def main():
        task = asyncio.create_task(asked(server, wait=LONG_SECONDS))
        await asyncio.to_thread(looks.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())  # which joins the thread that waited
    assert server.prefix.stats.active == server.prefix.stats.sessions == 1
    first.close()
    check_accounts(server)
    check_nothing_left(server)


class Slow(MemoryStore):
    """A store that answers once it may, and notes that it was asked."""

    def __init__(self):
        super().__init__()
        self.asked, self.may = threading.Event(), threading.Event()
        self.may.set()

    def get(self, keys, *, deadline):
        self.asked.set()
        self.may.wait()
        return super().get(keys, deadline=deadline)


@pytest.mark.parametrize("cancel", [False, True])
def test_pages_of_a_store_come_while_the_event_loop_goes_on(cancel):
    store = Slow()
    Stored(model_of("full", NUMPY), store).ask(PROMPT)
    server = Stored(model_of("full", NUMPY), store)
    store.may.clear()

    async def main():
        task = asyncio.create_task(asked(server, [*PROMPT, 40], deadline=Deadline.after(6000)))
        await asyncio.to_thread(store.asked.wait)
        assert not task.done()
        if cancel:
            task.cancel()
        store.may.set()
        return await task

    if cancel:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(main())
        assert server.prefix.stats.sessions == 0
    else:
        assert asyncio.run(main()) == len(PROMPT) // PAGE * PAGE
    assert server.prefix.stats.active == 0
    check_accounts(server)
