"""Branches declared dead: not stored, evicted at once, and what is left is as a cold run's."""

import numpy as np
import pytest

import kvcache
from kvcache import KVCacheError
from kvcache.prefix import BlockRemoved, Reason
from kvcache.stores import MemoryStore

from .deep import Deep, DeepHybridLayers, DeepHybridPool, DeepLayers, DeepPool
from .served import MODELS, Server, check_accounts, check_nothing_left
from .tiered import LATER, Stored, model_of

NUMPY = kvcache.get_backend("numpy")
PROMPT = list(range(1, 11))
REASONING = [30, 31, 32, 33]
ANSWER = [40, 41]
WHOLE = [*PROMPT, *REASONING, *ANSWER]
CACHES = {
    "full": DeepPool,
    "window": lambda: DeepPool(window=4),
    "chunk": lambda: DeepPool(chunk=4),
    "layers": DeepLayers,
    "rings": lambda: DeepLayers(6),
    "hybrid pool": DeepHybridPool,
    "hybrid window": lambda: DeepHybridPool(window=4),
    "hybrid layers": DeepHybridLayers,
}


@pytest.mark.parametrize("commit", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("name", CACHES)
def test_reasoning_that_the_next_prompt_does_not_have(name, first, commit):
    deep = Deep(CACHES[name]())
    session = deep.begin(PROMPT)
    if first:
        session.drop_branch(len(PROMPT))
    session.extend([*REASONING, *ANSWER])
    for stop in range(len(PROMPT), len(WHOLE)):
        deep.go_on(session, WHOLE[: stop + 1], stop)
    if commit:
        session.commit()
    session.drop_branch(len(PROMPT))
    assert deep.prefix.lookup([*WHOLE, 9]).stored == (len(PROMPT) if commit else 0)
    session.close()
    assert deep.prefix.lookup([*WHOLE, 9]).stored == len(PROMPT)
    assert deep.ask([*PROMPT, *ANSWER, 50]) == len(PROMPT)
    assert deep.ask([*PROMPT, 51]) == len(PROMPT)


@pytest.mark.parametrize("name", CACHES)
def test_a_turn_that_was_edited(name):
    deep = Deep(CACHES[name]())
    deep.ask(PROMPT)
    deep.ask(WHOLE)
    deep.ask([*WHOLE, 60, 61])
    deep.prefix.drop_branch([*WHOLE, 60, 61, 62], len(PROMPT))
    assert deep.prefix.lookup([*WHOLE, 9]).stored == len(PROMPT)
    assert deep.ask([*PROMPT, 70, 71]) == len(PROMPT)
    assert deep.ask(WHOLE) == len(PROMPT)


@pytest.mark.parametrize("name", MODELS)
def test_all_that_is_stored_adds_up(name):
    server = Server(MODELS[name](NUMPY))
    ids = [*PROMPT, 20, 21, 22, 23]
    server.ask(PROMPT)
    server.ask(ids)
    whole = [7, *ids[1:]] if server.model.media else ids
    media = {(0, 1): f"image {ids[0]}"} if server.model.media else None
    server.prefix.drop_branch(whole, len(PROMPT), media=media)
    check_accounts(server)
    assert server.ask([*PROMPT, 30]) == len(PROMPT)
    server.prefix.drop_branch(whole, 0, media=media)
    check_accounts(server)
    server.ask(ids)
    check_accounts(server)
    check_nothing_left(server)


def served(*conversations, **options):
    server = Server(MODELS["full"](NUMPY), **options)
    for ids in conversations:
        server.ask(ids)
    return server


def stored(server, ids):
    return server.prefix.lookup([*ids, 99]).stored


def test_what_others_go_on_from_stays():
    other = [*PROMPT, *REASONING[:2], 50, 51]
    server = served(WHOLE, other)
    server.prefix.drop_branch(WHOLE, 4)
    assert stored(server, WHOLE) == len(PROMPT) + 2
    assert stored(server, other) == len(other)
    server.prefix.drop_branch(other, 4)
    assert stored(server, WHOLE) == 4


def test_a_longer_sequence_than_is_named_stays():
    server = served(WHOLE)
    server.prefix.drop_branch(PROMPT, 4)
    assert stored(server, WHOLE) == len(WHOLE)
    server.prefix.drop_branch([*WHOLE, 98, 99], 4)
    assert stored(server, WHOLE) == 4


def test_a_longer_sequence_that_was_evicted_does_not_protect_its_beginning():
    server = served(WHOLE[:12], WHOLE)
    server.prefix.trim(server.prefix.stats.nbytes - 1)
    assert stored(server, WHOLE) == 12
    server.prefix.drop_branch(WHOLE[:14], 4)
    assert stored(server, WHOLE) == 4


def test_what_sessions_use_stays_until_their_end():
    server = served(WHOLE)
    session = server.begin([*WHOLE, 60])
    server.prefix.drop_branch(WHOLE, 4)
    assert stored(server, WHOLE) == len(WHOLE)
    session.drop_branch(4)
    assert stored(server, WHOLE) == len(WHOLE)
    other = server.begin([*WHOLE[:8], 70])
    server.finish(session, [*WHOLE, 60])
    assert stored(server, WHOLE) == len(WHOLE), "in use as one span"
    other.close(store=False)
    server.prefix.drop_branch(WHOLE, 4)
    assert stored(server, WHOLE) == 4
    check_accounts(server)


@pytest.mark.parametrize("how", ["close", "store nothing", "exception", "drop"])
def test_what_a_session_began_with_goes_when_it_ends(how):
    server = served(WHOLE)
    session = server.begin([*WHOLE, 60])
    server.compute(session, [*WHOLE, 60], len(WHOLE))
    session.drop_branch(6)
    session.drop_branch(8)  # the first position counts
    if how == "drop":
        del session
        _ = server.prefix.stats
    elif how == "exception":
        with pytest.raises(TimeoutError), session:
            raise TimeoutError
    else:
        session.close(store=how == "close")
    assert stored(server, WHOLE) == 6
    check_accounts(server)
    check_nothing_left(server)


def test_retained_branches_go_as_well_and_are_not_counted():
    server = Server(MODELS["full"](NUMPY))
    server.ask(WHOLE, retain=(100, float("inf")))
    server.prefix.drop_branch(WHOLE, 4)
    assert stored(server, WHOLE) == 4
    stats = server.prefix.stats
    assert (stats.evictions, stats.retained_evictions) == (1, 0)


def test_who_listens_hears_of_it():
    server, heard = served(), []
    server.prefix.events.block_size = 2
    server.ask(WHOLE)
    server.prefix.events.subscribe(heard.append)
    server.prefix.drop_branch(WHOLE, 10)
    [event] = heard
    assert isinstance(event, BlockRemoved)
    assert len(event.block_hashes) == 3


def test_dead_tokens_are_not_put_into_a_store_and_pages_stay():
    store = MemoryStore()
    server, other, third = (Stored(model_of("per-layer", NUMPY), store) for _ in range(3))
    session = server.begin(WHOLE)
    server.compute(session, WHOLE, 0)
    session.drop_branch(8)
    session.close()
    server.prefix.flush(LATER)
    assert other.ask([*WHOLE, 50]) == 8
    other.prefix.drop_branch(WHOLE, 8)
    other.prefix.drop_branch([*WHOLE, 50], 8)
    assert stored(other, WHOLE) == 8
    assert third.ask([*WHOLE, 51]) == len(WHOLE)


def test_nobody_waits_for_tokens_that_will_not_be_stored():
    server = served(PROMPT[:6])
    session = server.begin(WHOLE)
    session.drop_branch(6)
    other = server.begin([*PROMPT, 50], wait=60.0)
    assert other.matched == 6


def test_why_tokens_were_evicted():
    now = 0.0
    quotas = {"a": 100}
    server = Server(MODELS["full"](NUMPY), clock=lambda: now, quota=quotas.get, budget=1_000)
    server.ask(WHOLE)
    now = 3.0
    server.prefix.drop_branch(WHOLE, 4)
    now = 4.0
    session = server.begin(WHOLE)
    assert session.explain().reasons == (
        Reason(4, 16, "evicted", evicted=3.0, policy="drop_branch"),
    )
    assert "12 evicted; by drop_branch at 3 s" in session.explain().render()
    session.close(store=False)
    server.ask(PROMPT, salt="a")
    [reason] = server.begin(PROMPT, salt="a").explain().reasons
    assert (reason.why, reason.policy, reason.evicted) == ("evicted", "quota", 4.0)
    server = Server(MODELS["full"](NUMPY), clock=lambda: now, budget=100)
    server.ask(PROMPT, retain=(4, 60.0))
    [reason] = server.begin(PROMPT).explain().reasons
    assert (reason.policy, reason.evicted) == ("retention", 4.0)
    server.prefix.clear()


def test_a_branch_that_went_in_parts_is_explained_by_each():
    server = Server(MODELS["full"](NUMPY), clock=lambda: 0.0)
    for length in (4, 10, 16):
        server.ask(WHOLE[:length])
    server.prefix.drop_branch(WHOLE, 10)
    server.prefix.trim(0)
    reasons = server.begin(WHOLE).explain().reasons
    assert [(r.start, r.stop, r.policy) for r in reasons] == [
        (0, 10, "lru"),
        (10, 16, "drop_branch"),
    ]


# Odd arguments.


@pytest.mark.parametrize(
    ("position", "error", "message"),
    [
        (-1, ValueError, r"a branch begins at a position of its tokens, 0 to 15; got -1"),
        (16, ValueError, r"a branch begins at a position of its tokens, 0 to 15; got 16"),
        (1.0, TypeError, "position must be an integer; got 1.0"),
        (None, TypeError, "position must be an integer; got None"),
    ],
)
def test_where_no_branch_begins(position, error, message):
    server = served(WHOLE)
    session, before = server.begin(WHOLE), server.prefix.stats
    with pytest.raises(error, match=message):
        server.prefix.drop_branch(WHOLE, position)
    if position != 16:
        with pytest.raises(error, match="position must be"):
            session.drop_branch(position)
    assert server.prefix.stats == before
    server.finish(session, WHOLE)
    assert stored(server, WHOLE) == len(WHOLE)


def test_sequences_that_are_not_known_have_no_branch():
    server = served(WHOLE)
    before = server.prefix.stats
    server.prefix.drop_branch([90, 91], 0)
    server.prefix.drop_branch(WHOLE, 0, salt="b")
    server.prefix.drop_branch([*WHOLE[:6], 90], 6)
    assert server.prefix.stats == before
    with pytest.raises(ValueError, match="a prompt has at least one token"):
        server.prefix.drop_branch([], 0)


def test_a_session_that_has_ended_has_no_branch():
    server = served()
    session = server.begin(WHOLE)
    server.finish(session, WHOLE)
    with pytest.raises(KVCacheError, match=r"this one has ended\. Begin another"):
        session.drop_branch(4)


@pytest.mark.parametrize("odd", [np.int8(4), np.array(4)])
def test_positions_of_every_kind_are_taken(odd):
    server = served(WHOLE)
    server.prefix.drop_branch(WHOLE, odd)
    assert stored(server, WHOLE) == 4
