"""Why a prompt was not reused: every token has one reason, and it is the right one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcache
from kvcache import KVCache
from kvcache.prefix import Explanation, PrefixCache, Reason, register_metrics
from kvcache.prefix.policies import LRU
from kvcache.stores import Deadline, MemoryStore

from .. import peek
from .history import History, names_of
from .random_sessions import RandomSessions
from .served import MODELS, Server
from .test_cache import TURN
from .test_tiers import damaged
from .tiered import FIRST, LATER, REPLY, TURNED, Gate, Stored, model_of, stored_in

NUMPY = kvcache.get_backend("numpy")
PROMPT = [*FIRST, 90, 91]


def text(ids):
    return " ".join(map(str, ids))


def counts(session, **options):
    return session.explain(**options).counts


# Random histories.


class Explained(RandomSessions):
    """Random sessions, each of which is explained at its beginning, and again after its end."""

    def __init__(self, seed):
        super().__init__(seed)
        self.history = History()
        self.prefix = PrefixCache([KVCache("numpy")], budget=6_000, clock=self.history.clock)
        self.history.follow(self.prefix)
        self.begun, self.seen = [], set()
        begin, clear = self.prefix.session, self.prefix.clear

        def session(ids, **options):
            session = begin(ids, **options)
            names = names_of(ids, self.prompt.salt, self.prompt.media, self.prompt.adapter)
            media = [(a, b) for a, b, _ in self.prompt.media]
            explanation = session.explain()
            self.history.check(explanation, names, session.matched, media)
            self.begun.append((session, explanation))
            self.seen.update(explanation.counts)
            return session

        def clear_and_forget():
            clear()
            self.history.forget()

        self.prefix.session, self.prefix.clear = session, clear_and_forget

    def _prompt(self):
        self.prompt = super()._prompt()
        return self.prompt

    def run(self):
        self.history.now += 1
        super().run()
        for session, explanation in self.begun:
            assert session.explain() == explanation
        self.begun = self.begun[-3:]


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.matrix) for n in (1, 2))])
def test_random_sessions_of_tenants_with_media(seed):
    sessions = Explained(seed)
    for _ in range(300):
        sessions.run()
    assert sessions.seen >= {"new", "diverged", "evicted", "last"}
    assert seed or "media" in sessions.seen


@pytest.mark.parametrize("name", [name for name in MODELS if name != "window of one"])
@settings(max_examples=15)
@given(turns=st.lists(TURN, min_size=2, max_size=8), budget=st.sampled_from([None, 300, 900]))
def test_any_conversation_over_any_cache(name, turns, budget):
    history = History()
    server = Server(MODELS[name](NUMPY), budget=budget, clock=history.clock)
    history.follow(server.prefix)
    for turn in turns:
        history.now += 1
        old = server.stored[turn["base"] % len(server.stored)] if server.stored else []
        ids = [*old[: turn["cut"]], *turn["new"]][:18] or [1]
        session = server.begin(ids, resume_points=turn["resume_points"])
        tokens, media = ids, ()
        if server.model.media:
            tokens, media = [7, *ids[1:]], [(0, 1, f"image {ids[0]}")]
        explanation = session.explain()
        history.check(explanation, names_of(tokens, media=media), session.matched)
        for reason in explanation.reasons:
            if reason.why == "no_resume_point":
                assert reason.limited_by == session.limited_by != ()
                assert reason.resume_points[0] == session.matched
                check_next(server, reason)
        server.finish(session, ids, turn["reply"], turn["sizes"], turn["fail"])
        assert session.explain().counts == explanation.counts


def check_next(server, reason):
    """The nearest resume point behind is one of a stored sequence."""
    for point in reason.resume_points[1:]:
        ends = [server.prefix.lookup(ids_of(server, [*old[:point], 99])) for old in server.stored]
        assert point > reason.stop
        assert server.model.media or point in [hit.matched for hit in ends]


def ids_of(server, ids):
    return [7, *ids[1:]] if server.model.media else ids


# Each reason, with its details.


def test_a_divergence_shows_the_text_on_both_sides():
    server = Server(MODELS["full"](NUMPY))
    server.ask(FIRST, REPLY)
    with server.begin([*FIRST[:6], 70, 71]) as session:
        explanation = session.explain(decode=text)
        plain = session.explain()
        server.compute(session, [*FIRST[:6], 70, 71], 6)
    texts = ("1 2 3 4 5 6 70 71", "1 2 3 4 5 6 7 8 9 10")
    assert explanation.reasons == (Reason(6, 8, "diverged", position=6, texts=texts),)
    assert plain.reasons == (Reason(6, 8, "diverged", position=6),)
    assert str(explanation) == "6 of 8 tokens reused: 2 behind a divergence"
    assert explanation.render() == (
        "[0, 6)  6 reused\n[6, 8)  2 behind a divergence; other tokens from position 6 on; "
        "'1 2 3 4 5 6 70 71' here, '1 2 3 4 5 6 7 8 9 10' there"
    )
    assert session.explain(decode=text) == explanation  # the span was split there


def test_where_several_sequences_go_on_the_newest_is_shown():
    server = Server(MODELS["full"](NUMPY))
    for last in (50, 60, 70):
        server.ask([1, 2, 3, last, 4])
    session = server.begin([1, 2, 3, 80])
    [reason] = session.explain(decode=text).reasons
    assert reason.texts == ("1 2 3 80", "1 2 3 70 4")


def test_another_image_is_a_divergence():
    prefix = PrefixCache([KVCache("numpy")])
    ids = [1, 2, 3, 9, 9, 9, 4]
    with prefix.session(ids, media={(3, 6): "cat"}) as session:
        computed(session)
    session = prefix.session(ids, media={(3, 6): "dog"})
    [reason] = session.explain(decode=text).reasons
    assert (reason.start, reason.texts) == (3, ("1 2 3<medium>4", "1 2 3<medium>4"))


def computed(session):
    rows = np.zeros((1, 1, session.remaining.size, 1), np.float32)
    session.caches[0].update(rows, rows)


def test_a_hit_that_would_end_inside_an_image():
    prefix = PrefixCache([KVCache("numpy")])
    ids, media = [1, 2, 9, 9, 9], {(2, 5): "cat"}
    with prefix.session(ids, media=media) as session:
        computed(session)
    assert counts(prefix.session(ids, media=media)) == {"media": 2, "last": 1}


def test_an_eviction_has_its_time_and_its_policy():
    class Own(LRU):
        pass

    for policy, name in (("lru", "lru"), ("gittins", "gittins"), (Own(), "Own")):
        history = History()
        server = Server(MODELS["full"](NUMPY), policy=policy, clock=history.clock)
        server.ask(FIRST)
        history.now = 17.0
        server.prefix.trim(0)
        history.now = 20.0
        explanation = server.begin([*FIRST, 1]).explain()
        evicted, new = explanation.reasons
        assert evicted == Reason(0, 8, "evicted", evicted=17.0, policy=name)
        assert (new.why, new.tokens) == ("new", 1)
        assert f"8 evicted; by {name} at 17 s" in explanation.render()


def test_tokens_that_were_forgotten_are_new():
    server = Server(MODELS["full"](NUMPY))
    server.ask(FIRST)
    server.prefix.clear()
    assert counts(server.begin(PROMPT)) == {"new": 10}


def test_the_cache_that_limited_the_hit_and_the_nearest_resume_points():
    server = Server(MODELS["layers of both"](NUMPY))
    server.ask(FIRST, REPLY, resume_points=[3])
    explanation = server.begin([*FIRST[:6], 70]).explain()
    limited, diverged = explanation.reasons
    assert limited == Reason(3, 6, "no_resume_point", limited_by=(0,), resume_points=(3, 7))
    assert diverged == Reason(6, 7, "diverged", position=6)
    assert str(limited) == (
        "3 without a resume point; limited by cache 0; nearest resume points 3, 7"
    )


def test_the_last_token_of_a_prompt_that_is_stored():
    server = Server(MODELS["full"](NUMPY))
    server.ask(FIRST)
    explanation = server.begin(FIRST).explain()
    assert explanation == Explanation(7, 8, (Reason(7, 8, "last"),))
    assert str(explanation) == "7 of 8 tokens reused: 1 last, always computed"


def test_other_salts_are_looked_at_only_if_asked():
    server = Server(MODELS["full"](NUMPY))
    server.ask(FIRST, salt="a")
    server.ask([*FIRST[:4], 60], salt="b")
    session = server.begin(PROMPT, salt="c")
    assert counts(session) == {"new": 10}
    explanation = session.explain(decode=text, other_salts=True)
    assert explanation.counts == {"other_salt": 8, "new": 2}
    assert explanation.reasons[0] == Reason(0, 8, "other_salt")  # and nothing of a or b
    server.finish(session, PROMPT)
    assert counts(session, other_salts=True) == explanation.counts, "its own salt is no other"
    session = server.begin([*FIRST, 70], salt="b")
    assert counts(session, other_salts=True) == {"other_salt": 4, "diverged": 1}


def test_reasons_are_counted_once_for_a_session_that_was_explained():
    server = Server(MODELS["full"](NUMPY))
    server.ask(FIRST)
    assert server.prefix.stats.explained == {}
    session = server.begin([*FIRST[:6], 70])
    for _ in range(2):
        session.explain()
    server.finish(session, [*FIRST[:6], 70])
    server.begin(FIRST).explain()
    assert server.prefix.stats.explained == {"diverged": 1, "last": 1}


def test_reasons_are_a_metric():
    prometheus = pytest.importorskip("prometheus_client")
    prefix, registry = PrefixCache([KVCache("numpy")]), prometheus.CollectorRegistry()
    register_metrics(prefix, registry)
    name = "kvcache_prefix_cache_explained_total"
    assert registry.get_sample_value(name, {"reason": "new"}) is None
    prefix.session([1, 2, 3]).explain()
    assert registry.get_sample_value(name, {"reason": "new"}) == 3


def test_a_decoder_that_is_none_or_raises():
    server = Server(MODELS["full"](NUMPY))
    server.ask(FIRST)
    session = server.begin([1, 2, 70])
    with pytest.raises(TypeError, match="decode is a function from a list of token ids to text"):
        session.explain(decode="utf-8")
    with pytest.raises(ZeroDivisionError):
        session.explain(decode=lambda ids: 1 // 0)
    with pytest.raises(TypeError, match="decode returns the text of token ids, a str; got b'ab'"):
        session.explain(decode=lambda ids: b"ab")
    with pytest.raises(TypeError, match=r"other_salts tells .* True or False; got array"):
        session.explain(other_salts=np.array([1, 2]))
    assert not server.prefix.stats.explained
    assert session.explain(decode=text).counts == {"diverged": 1}


# Behind a store. Pages have four tokens: two are of FIRST, and the state behind its reply.


def restarted(store, **options):
    return Stored(model_of("full", NUMPY), store, **options)


def test_pages_that_come_in_time_leave_the_rest_new():
    session = restarted(stored_in(MemoryStore())).begin([*TURNED, 80])
    assert (session.matched, counts(session)) == (10, {"new": 2})


def test_a_store_that_is_gone_or_too_slow():
    store = Gate(stored_in(MemoryStore()))
    store.broken = True
    server = restarted(store)
    assert counts(server.begin(PROMPT)) == {"late": 10}
    store.broken = False
    store.opened.clear()
    try:
        assert counts(server.begin(PROMPT, salt="b", deadline=Deadline.after(0))) == {"late": 10}
    finally:
        store.opened.set()


def test_a_store_that_finds_pages_and_does_not_deliver_them():
    inner = stored_in(MemoryStore())
    store = Gate(inner)
    store._get = lambda keys, deadline: 1 // 0
    explanation = restarted(store).begin(PROMPT).explain()
    assert explanation.counts == {"late": 8, "new": 2}
    assert str(explanation) == "0 of 10 tokens reused: 8 late from the store, 2 new"


def test_pages_that_are_damaged():
    store = damaged(stored_in(MemoryStore()), 0, 4)
    assert counts(restarted(store).begin(PROMPT)) == {"failed": 8, "new": 2}


def test_pages_that_are_not_worth_fetching():
    server = restarted(stored_in(MemoryStore()))
    gate = peek.cost_gate(server.prefix)
    gate.pays = lambda *_: False
    assert counts(server.begin(PROMPT)) == {"gated": 8, "new": 2}


def test_a_store_with_pages_but_no_state_to_go_on_from():
    store = stored_in(MemoryStore(), "hybrid")
    server = Stored(model_of("hybrid", NUMPY), store)
    session = server.begin([*FIRST[:6], 90], deadline=LATER)
    assert counts(session) == {"no_resume_point": 4, "new": 3}


def test_pages_without_a_state_behind_one_that_is_not_worth_it():
    store, ids = MemoryStore(), list(range(1, 13))
    Stored(model_of("hybrid", NUMPY), store).ask(ids, resume_points=[5])
    server = Stored(model_of("hybrid", NUMPY), store)
    peek.cost_gate(server.prefix).pays = lambda *_: False
    explanation = server.begin([*ids[:9], 90]).explain()
    assert explanation.reasons == (
        Reason(0, 5, "gated"),
        Reason(5, 8, "no_resume_point"),
        Reason(8, 10, "new"),
    )


def test_a_store_that_answers_the_second_question_only():
    store, answers = Gate(stored_in(MemoryStore())), [True, False]
    server = restarted(store)
    store.asked = lambda: setattr(store, "broken", answers.pop(0))
    assert counts(server.begin(PROMPT)) == {"late": 10}


def test_what_memory_has_is_not_blamed_on_the_store():
    store = Gate(stored_in(MemoryStore()))
    server = restarted(store)
    server.ask(FIRST)
    store.broken = True
    assert counts(server.begin([*FIRST, 70, 71])) == {"late": 2}
    assert counts(server.begin(FIRST)) == {"last": 1}
