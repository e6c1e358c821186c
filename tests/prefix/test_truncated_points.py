"""Sessions that go back: the resume points behind are scheduled again, by kind of cache."""

import pytest

import kvcache
from kvcache.stores import MemoryStore

from .served import FULL, MODELS, Pool, Server, check_accounts, check_nothing_left
from .tiered import Stored

NUMPY = kvcache.get_backend("numpy")
IDS, POINTS = list(range(1, 13)), [2, 7]
RESUMED = [11, 7, 2]
"""Hits of the same prompt, and of others that part from it at the points."""
GOING_BACK = [  # what was computed by then, and up to where the session goes back
    (0, 0),
    (3, 0),
    (3, 2),
    (3, 5),  # nothing computed goes, only names
]
WHOLE = {*FULL, "recurrent", "recurrent pool"}
"""Those that go back to a resume point however far they have gone."""


def truncate(server, session, length):
    session.truncate(length)


def in_the_cache(server, session, length):
    """The same, told to the caches; names that have no rows yet are the session's alone."""
    if isinstance(server.model, Pool):
        server.model.cache.remove(session.sequence, length)
    else:
        session.caches.trim(max(0, session.caches.offset - length))
    session.truncate(length)


def go_back(server, computed, back, how):
    """One session that computes some tokens, goes back, and computes all of them."""
    with server.begin(IDS, resume_points=POINTS) as session:
        server.compute(session, IDS[:computed], 0)
        how(server, session, back)
        session.extend(IDS[back:])
        server.compute(session, IDS, min(computed, back))
        session.extend([20])


def hits(server):
    return [server.ask(ids) for ids in (IDS, [*IDS[:7], 60], [*IDS[:2], 60])]


CASES = [
    (name, computed, back)
    for name in MODELS
    for computed, back in [*GOING_BACK, *([(12, 7)] if name in WHOLE else [])]
    if back or "encoder" not in name  # an image is named by the prompt alone
]


@pytest.mark.parametrize("how", [truncate, in_the_cache])
@pytest.mark.parametrize(("name", "computed", "back"), CASES)
def test_resume_points_survive_going_back(name, computed, back, how):
    server = Server(MODELS[name](NUMPY))
    go_back(server, computed, back, how)
    assert hits(server) == RESUMED
    check_accounts(server)
    check_nothing_left(server)


@pytest.mark.parametrize("name", ["window", "layers of both", "recurrent pool", "hybrid pool"])
def test_a_store_is_given_them_too(name):
    store = MemoryStore()
    server = Stored(MODELS[name](NUMPY), store)
    go_back(server, 3, 0, truncate)
    assert server.prefix.flush()
    for ids, resumed in zip((IDS, [*IDS[:7], 60], [*IDS[:2], 60]), RESUMED, strict=True):
        assert Stored(MODELS[name](NUMPY), store).ask(ids) == resumed


def test_a_point_named_later_is_one_of_them():
    server = Server(MODELS["hybrid pool"](NUMPY))
    with server.begin(IDS) as session:
        session.schedule([5])
        server.compute(session, IDS[:3], 0)
        session.truncate(0)
        session.extend(IDS)
        server.compute(session, IDS, 0)
    assert server.ask([*IDS[:5], 60]) == 5


def test_a_session_that_begins_as_a_copy_has_its_own_points():
    server = Server(Pool(NUMPY, {}, {"recurrent": True}))
    with server.begin([*IDS, 30], resume_points=[10]) as one, server.begin(IDS) as two:
        server.compute(one, IDS[:5], 0)
        server.model.cache.copy_prefix(one.sequence, two.sequence, 5)
        two.extend(IDS[5:])
        server.compute(two, IDS, 5)
        one.close(store=False)
    assert server.ask(IDS) == 11


def test_the_next_session_of_a_sequence_has_none_of_them():
    server = Server(Pool(NUMPY, {"recurrent": True}, max_sequences=1))
    with server.begin(IDS, resume_points=POINTS) as session:
        session.truncate(0)
    with server.begin([30, *IDS]) as session:
        server.compute(session, [30, *IDS], 0)
        resumable = [p for p in range(14) if server.model.cache.can_resume(session.sequence, p)]
    assert resumable == [0, 12, 13]
