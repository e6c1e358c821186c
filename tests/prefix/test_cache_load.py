"""Many sessions, in one thread and in several: what is stored adds up, and nothing leaks."""

import queue
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

import kvcache
from kvcache import CacheFullError

from .. import peek
from .served import Layers, Left, Pool, Server, check_accounts, check_nothing_left

NUMPY = kvcache.get_backend("numpy")


def prompts(chance, count):
    """Conversations that go on, branch and come back."""
    talks = [[chance.randrange(4) for _ in range(4)] for _ in range(4)]
    for _ in range(count):
        talk = chance.choice(talks)
        talk += [chance.randrange(4) for _ in range(chance.randrange(1, 4))]
        ids = talk[: chance.randrange(1, len(talk) + 1)]
        if len(talk) > 14:
            del talk[chance.randrange(2, 8) :]
        yield ids


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize(("count", "parts"), [(8_000, [{}]), (2_000, [{"window": 3}, {}])])
def test_ten_thousand_sessions_add_up(count, parts):
    """Some of which fail, some two at a time."""
    server, chance, tokens = Server(Pool(NUMPY, *parts), budget=900), random.Random(3), 0
    table, open_ones, found = peek.table(server.model.caches[0]), [], 0
    for number, ids in enumerate(prompts(chance, count)):
        salt = str(number % 2)
        session = server.prefix.session(ids, salt=salt)
        found, tokens = found + session.matched, tokens + len(ids)
        for start in range(session.matched, len(ids), 8):
            part = session.sequence, ids, start, min(start + 8, len(ids))
            server.model.run_all([part], check=False)
        open_ones.append(session)
        while len(open_ones) > (chance.random() < 0.3):
            failed = chance.random() < 0.1
            ended = open_ones.pop(0)
            ended.__exit__(Left if failed else None, None, None)
        stats = server.prefix.stats
        assert stats.nbytes <= stats.budget or stats.pinned
        if number % 100 == 0:
            check_accounts(server)
    for session in open_ones:
        session.__exit__(None, None, None)
    stats = server.prefix.stats
    assert (stats.sessions, stats.active, stats.pinned) == (count, 0, 0)
    assert stats.nbytes <= stats.budget
    assert stats.matched == found > count
    assert stats.evictions > count / 4
    assert stats.tokens == tokens
    assert stats.hit_rate == found / tokens
    check_accounts(server)
    check_nothing_left(server)
    assert table.free == table.cells


class Engine:
    """The one thread that runs passes, for whatever sessions ask in the meantime."""

    def __init__(self, model):
        self.model, self.asked = model, queue.Queue()
        self.thread = threading.Thread(target=self._serve)

    def compute(self, session, ids, start):
        """Have the tokens from `start` on computed; waits for that."""
        for begin in range(start, len(ids), 2):
            done = queue.Queue()
            self.asked.put(((session.sequence, ids, begin, min(begin + 2, len(ids))), done))
            if (error := done.get(timeout=60)) is not None:
                raise error

    def _serve(self):
        while (first := self.asked.get()) is not None:
            batch = [first]
            while len(batch) < 3 and not self.asked.empty():
                batch.append(self.asked.get())
                if batch[-1] is None:
                    return
            error = self._pass([request for request, _ in batch])
            for _, done in batch:
                done.put(error)

    def _pass(self, requests):
        try:
            self.model.run_all(requests)
        except Exception as error:  # noqa: BLE001 - whoever waits raises it
            return error
        return None

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.asked.put(None)
        self.thread.join()


def in_threads(count, work):
    """What `count` threads do at once; the first error is raised here."""
    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work, random.Random(seed)) for seed in range(count)]:
            done.result(timeout=240)


@pytest.mark.parametrize("parts", [[{}], [{"window": 3}, {}]], ids=["full", "both"])
def test_sessions_of_four_threads_and_one_that_runs_passes(backend, parts):
    """There are three sequences for four threads, and cells for less than what is stored.

    But for MLX, whose arrays belong to the thread that computes them: nothing may have to leave
    the pool when a session begins.
    """
    capacity, max_batch = (80, 250) if backend.name == "mlx" else (16, 8)
    sizes = {"max_sequences": 3, "capacity": capacity, "max_batch": max_batch}
    server = Server(Pool(backend, *parts, **sizes), budget=4_000)
    each = 50 if backend.name == "numpy" else 12

    def work(chance):
        for ids in prompts(chance, each):
            fails, session = chance.random() < 0.1, waited_for(server, ids)
            with suppress(Left), session:
                engine.compute(session, ids, session.matched)
                if fails:
                    raise Left

    with Engine(server.model) as engine:
        in_threads(4, work)
    assert server.prefix.stats.sessions == 4 * each
    assert server.prefix.stats.matched
    check_accounts(server)
    check_nothing_left(server)


def waited_for(server, ids):
    """A session as soon as there is a sequence for it."""
    while True:
        try:
            return server.begin(ids)
        except CacheFullError:
            time.sleep(0.0005)


@pytest.mark.parametrize("limits", [{}, {"max_size": 6, "keep": 2}], ids=["full", "sinks"])
def test_per_layer_sessions_of_four_threads(backend, limits):
    server = Server(Layers(backend, limits, limits), budget=4_000)
    each = 50 if backend.name == "numpy" else 10

    def work(chance):
        for ids in prompts(chance, each):
            server.ask(ids, fail=1 if chance.random() < 0.1 else None)

    in_threads(4, work)
    assert server.prefix.stats.sessions == 4 * each
    assert server.prefix.stats.matched
    check_accounts(server)
    check_nothing_left(server)
