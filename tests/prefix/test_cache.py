"""Sessions of a prefix cache: every token attends to what it would without one."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcache
from kvcache import KVCache, KVCacheError
from kvcache.prefix import PrefixCache

from .served import FULL, MODELS, SOME, Server, check_accounts, check_nothing_left

NUMPY = kvcache.get_backend("numpy")
TURN = st.fixed_dictionaries(
    {
        "base": st.integers(0, 9),
        "cut": st.integers(0, 20),
        "new": st.lists(st.integers(0, 2), min_size=0, max_size=6),
        "reply": st.lists(st.integers(0, 2), max_size=4),
        "sizes": st.lists(st.integers(1, 8), min_size=1, max_size=3),
        "fail": st.sampled_from([None, None, None, None, 0, 2]),
        "waits": st.booleans(),
        "resume_points": st.lists(st.integers(0, 20), max_size=2),
    }
)


def run_turns(name, backend, turns, **options):
    """Conversations that go on, branch, are edited, come back or fail, two at a time."""
    server = Server(MODELS[name](backend), **options)
    waiting = None
    for turn in turns:
        old = server.stored[turn["base"] % len(server.stored)] if server.stored else []
        ids = [*old[: turn["cut"]], *turn["new"]][:18] or [1]
        common = server.common(ids)
        session = server.begin(ids, resume_points=turn["resume_points"])
        assert session.matched <= common
        if name in FULL and options.get("budget") is None:
            assert session.matched == common
        if waiting:
            server.finish(*waiting)
        waiting = session, ids, turn["reply"], turn["sizes"], turn["fail"]
        if not turn["waits"]:
            server.finish(*waiting)
            waiting = None
        check_accounts(server)
    if waiting:
        server.finish(*waiting)
    check_accounts(server)
    check_nothing_left(server)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=30)
@given(
    turns=st.lists(TURN, min_size=2, max_size=10), budget=st.sampled_from([None, None, 0, 300, 900])
)
def test_any_conversations(name, turns, budget):
    run_turns(name, NUMPY, turns, budget=budget)


@pytest.mark.parametrize("name", SOME)
def test_conversations_on_every_backend(backend, name):
    chance = random.Random(5)
    turns = [
        {
            "base": chance.randrange(10),
            "cut": chance.randrange(20),
            "new": [chance.randrange(3) for _ in range(chance.randrange(5))],
            "reply": [chance.randrange(3) for _ in range(chance.randrange(3))],
            "sizes": [4, 1] if chance.random() < 0.5 else [8],
            "fail": 1 if chance.random() < 0.1 else None,
            "waits": chance.random() < 0.5,
            "resume_points": [6],
        }
        for _ in range(15)
    ]
    run_turns(name, backend, turns, budget=700)


# What is found.

RINGS = ["window", "memory", "window and chunk", "layers of both", "rotating", "sinks"]
LONG = list(range(1, 16))


@pytest.mark.parametrize("name", [*RINGS, "full", "per-layer"])
def test_a_prompt_again_and_the_next_turn_find_all_there_is(name):
    server = Server(MODELS[name](NUMPY))
    assert server.ask(LONG, [50, 51]) == 0
    assert server.ask(LONG) == len(LONG) - 1
    assert server.ask([*LONG, 50, 51, 60, 61], [52]) == len(LONG) + 1
    assert server.ask([*LONG, 50, 51, 60, 61, 52, 62]) == len(LONG) + 4


@pytest.mark.parametrize("name", RINGS)
def test_where_two_have_parted_a_third_goes_on(name):
    server = Server(MODELS[name](NUMPY))
    server.ask(LONG)
    assert server.ask([*LONG[:9], 70, 71, 72]) <= 9
    assert server.ask([*LONG[:9], 80, 81]) == 9


@pytest.mark.parametrize("name", RINGS)
def test_checkpoints_are_found(name):
    server = Server(MODELS[name](NUMPY))
    server.ask(LONG, resume_points=[7])
    assert server.ask([*LONG[:7], 70, 71]) == 7
    session = server.begin([90, *LONG])
    session.schedule([6, 18])  # 18: in the reply
    server.finish(session, [90, *LONG], [91, 92, 93, 94, 95])
    assert server.ask([90, *LONG[:5], 70]) == 6
    assert server.ask([90, *LONG, 91, 92, 70]) == 18


def test_a_chunk_begins_where_nothing_is_stored_any_more():
    """Nothing before it is needed; it was taken for what could not be restored."""
    server = Server(MODELS["window and chunk"](NUMPY), budget=None)
    ids = list(range(1, 19))
    for prompt in (ids, [*ids[:9], 50, 51, 52]):
        server.ask(prompt)
        server.prefix._index.budget = 0
        server.ask([99])
        server.prefix._index.budget = None
    server.ask(ids)
    assert server.ask([*ids[:10], 77]) in (0, 8)


# Tenants and media.


def test_tenants_share_nothing():
    server = Server(MODELS["full"](NUMPY), budget=20 * 24)
    assert server.ask(LONG, salt="one") == 0
    assert server.ask(LONG, salt="two") == 0
    assert server.ask(LONG) == 0
    for salt in ["", "two", "three", ""] * 3:
        before = server.prefix.stats.matched
        found = server.ask(LONG, salt=salt)
        assert server.prefix.stats.matched == before + found
    assert server.ask(LONG) == len(LONG) - 1
    assert server.ask(LONG, salt="four") == 0
    assert server.prefix.stats.evictions


def image(server, digest, tail=(5, 6, 7), at=(2, 6), other=None):
    """What is found for a prompt with an image."""
    ids = [1, 2, 9, 9, 9, 9, *tail]
    with server.prefix.session(ids, media=other or {at: digest}) as session:
        server.compute(session, ids, session.matched)
    assert session.remaining.tolist() == ids[session.matched :]
    return session.matched


def test_an_image_is_its_digest():
    server = Server(MODELS["full"](NUMPY))
    assert image(server, "a cat") == 0
    assert image(server, "a dog") == 2
    assert image(server, b"a cat") == 8
    assert image(server, "a cat", tail=()) == 2, "not inside, where one token is left"
    assert image(server, "a cat", tail=(8,)) == 6
    assert server.ask([1, 2, 9, 9, 9, 9, 5]) == 2, "tokens that stand for no image"
    assert image(server, "a cat", other={(2, 4): "a cat", (4, 6): "a cat"}) == 2, "two of them"
    server.prefix.clear()
    assert image(server, "a dog") == 0
    assert image(server, "a cat") == 2


@pytest.mark.parametrize(
    "media",
    [{(2, 2): "x"}, {(-1, 2): "x"}, {(0, 4): "x"}, {(0, 2): "x", (1, 3): "y"}, {(2, 1): "x"}],
)
def test_media_that_are_nowhere(media):
    server = Server(MODELS["full"](NUMPY))
    with pytest.raises(ValueError, match="media stand for tokens"):
        server.prefix.session([1, 2, 3], media=media)
    check_nothing_left(server)


def test_prompts_that_are_none():
    server = Server(MODELS["full"](NUMPY))
    with pytest.raises(ValueError, match="at least one token"):
        server.prefix.session([])
    with pytest.raises(ValueError, match=r"token ids are >= 0 .* got -1"):
        server.prefix.session([1, -1])
    with pytest.raises(ValueError, match="lists of integers"):
        server.prefix.session([0.5])
    with pytest.raises(TypeError, match="digest is bytes or str; got 7"):
        server.prefix.session([1, 2], media={(0, 1): 7})
    with pytest.raises(TypeError):
        server.prefix.session([1, 2], resume_points=["here"])
    with server.prefix.session([1, 2]) as session:
        with pytest.raises(ValueError, match="token ids are >= 0"):
            session.extend([-3])
        with pytest.raises(KVCacheError, match="Use seq"):
            _ = session.caches
    both = server.prefix.session([3]), server.prefix.session([4])
    assert {session.sequence for session in both} == {0, 1}
    with pytest.raises(KVCacheError, match="Use caches"):
        _ = PrefixCache([KVCache()]).session([1]).sequence
