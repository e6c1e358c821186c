"""Sessions of models with recurrent layers: a hit ends where a state was kept."""

import pytest

import kvcache
from kvcache import KVCache, StateCache
from kvcache.prefix import PrefixTrie
from kvcache.prefix.stored import StoredSnapshot

from .served import MODELS, RECURRENT, Layers, Pool, Server, spans_of

NUMPY = kvcache.get_backend("numpy")
KINDS = ["recurrent", "hybrid", "recurrent pool", "hybrid pool"]


@pytest.mark.parametrize("name", KINDS)
def test_a_hit_ends_at_the_deepest_kept_state(backend, name):
    server = Server(MODELS[name](backend))
    first, reply = [1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]
    assert server.ask(first, reply, resume_points=[3]) == 0
    assert server.ask(first) == 7  # kept one token before the end, which is left to compute
    turn = [*first, *reply]
    assert server.ask([*turn, 12, 13]) == 10  # computed up to the token sampled last
    assert server.ask([*first, 40, 41]) == 8
    assert server.ask([1, 2, 3, 4, 50, 51]) == 3  # parts behind the named point
    assert server.ask([1, 2, 3, 4, 60]) == 4  # where the request before parted
    assert server.ask([1, 2, 70]) == 0  # no state was kept there
    assert server.ask([1, 2, 71]) == 2


@pytest.mark.parametrize("name", ["recurrent", "hybrid"])
def test_a_session_rolls_a_draft_back(backend, name):
    server = Server(MODELS[name](backend))
    ids = [1, 2, 3, 4, 5, 6]
    with server.begin(ids) as session:
        server.compute(session, ids, 0)
        session.caches.checkpoint()
        server.compute(session, [*ids, 30, 31, 32], 6)
        session.caches.rollback(1)
        session.extend([30])
        server.compute(session, [*ids, 30, 8], 7)
        session.extend([8])
    assert server.ask([*ids, 30, 8, 9]) == 8
    assert server.ask([*ids, 30, 31, 9]) == 6


def test_states_of_other_tokens_are_not_stored(backend):
    """What was put in the caches of a session behind its back belongs to no token of it."""
    server, other = (Server(MODELS["recurrent"](backend)) for _ in range(2))
    with other.begin([5, 6, 7]) as session:
        other.compute(session, [5, 6, 7], 0)
        snapshot = session.caches.snapshot().to_host()
    with server.begin([1, 2, 3, 4]) as session:
        server.compute(session, [1, 2, 3], 0)
        session.caches.reset()
        session.caches.restore(snapshot, backend=backend)
        server.model.run(session, [5, 6, 7, 4], 3, 4)
    assert server.ask([1, 2, 3, 4, 9]) == 0


def test_tokens_taken_back_are_not_stored(backend):
    server = Server(MODELS["recurrent"](backend))
    ids = [1, 2, 3, 4, 5, 6]
    with server.begin(ids) as session:
        server.compute(session, ids, 0)
        session.caches.trim(1)
        server.model.run(session, [*ids[:5], 60], 5, 6)
    assert server.ask([*ids, 9]) == 5


# Where states are kept, and which layer ended a hit.


@pytest.mark.parametrize("name", KINDS)
def test_states_are_kept_at_multiples_too_if_asked(name):
    server, ids = Server(MODELS[name](NUMPY), resume_every=4), list(range(1, 16))
    server.ask(ids)
    for length in (4, 8, 12):
        assert server.ask([*ids[:length], 50 + length]) == length
    assert server.ask([*ids[:7], 70]) == 4
    assert server.ask([*ids[:3], 70]) == 0


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_resume_every_is_a_number_of_tokens(every, error):
    with pytest.raises(error, match="resume_every"):
        Server(MODELS["recurrent"](NUMPY), resume_every=every)


def test_a_session_tells_which_layers_ended_its_hit():
    server = Server(Layers(NUMPY, RECURRENT, {}, {"max_size": 5}, RECURRENT))
    server.ask([1, 2, 3, 4, 5, 6, 7, 8], resume_points=[3])
    with server.begin([1, 2, 3, 4, 5, 60]) as session:
        assert (session.matched, session.stored) == (3, 5)
        # The ring has the tokens before 3 as well, and those from 3 on.
        assert session.limited_by == (0, 3)
    with server.begin([1, 2, 3, 4, 5, 6, 7, 8]) as session:
        assert (session.matched, session.stored, session.limited_by) == (7, 8, ())
    with server.begin([60]) as session:
        assert (session.matched, session.stored, session.limited_by) == (0, 0, ())


def test_a_session_over_a_pool_tells_which_part_ended_its_hit():
    server = Server(Pool(NUMPY, {}, RECURRENT, {"window": 8}))
    server.ask([1, 2, 3, 4, 5, 6, 7, 8])
    with server.begin([1, 2, 3, 4, 5, 60]) as session:
        assert (session.matched, session.stored, session.limited_by) == (0, 5, (1,))


def test_no_layer_ended_a_hit_in_front_of_an_image():
    server, image = Server(Layers(NUMPY, {}, RECURRENT)), {(2, 5): "image"}
    ids = [1, 2, 0, 0, 0, 3, 4]
    server.ask(ids, media=image, resume_points=[2, 4])
    with server.begin([1, 2, 0, 0, 0], media=image) as session:
        assert (session.matched, session.stored, session.limited_by) == (2, 5, ())


# What they weigh.


@pytest.mark.parametrize(
    "model",
    [
        lambda: Layers(NUMPY, RECURRENT, {}),
        lambda: Pool(NUMPY, RECURRENT, {}, capacity=40),
    ],
    ids=["layers", "pool"],
)
@pytest.mark.parametrize("policy", ["lru", "s3fifo", "cost", "gittins"])
def test_states_of_earlier_turns_give_way_before_any_token(model, policy):
    server, turn = Server(model(), policy=policy), list(range(1, 9))
    server.ask(turn[:4])
    server.ask(turn)
    index = server.prefix._index
    before, index.budget = index.nbytes, index.nbytes - 1
    index.trim(1.0)
    index.budget = None
    assert index.evictions == 0
    assert before - index.nbytes == 2 * state_nbytes(server), "behind the first 3 and 4 tokens"
    assert server.ask([*turn, 9]) == 8
    assert server.ask([*turn[:4], 50]) == 0


def state_nbytes(server):
    """Bytes of the state behind one position, in all layers."""
    [layer] = [
        part
        for span in spans_of(server.prefix)
        for part in span.payload.snapshot.parts
        if part.spec.visibility.window == 1 and part.rows.positions.size
    ][:1]
    return layer.rows.nbytes // layer.rows.positions.size


def test_tokens_without_a_state_behind_them_go_with_it():
    server, turn = Server(Pool(NUMPY, RECURRENT, {}, capacity=40)), list(range(1, 13))
    for length in (4, 8, 12):
        server.ask(turn[:length])
    index = server.prefix._index
    index.budget = index.nbytes - 4 * state_nbytes(server)  # those of the first two turns
    index.trim(1.0)
    assert index.evictions == 0
    assert len(spans_of(server.prefix)) > 1, "the last has to go, not the first"
    index.budget = index.nbytes - 1
    index.trim(1.0)
    assert server.prefix.lookup([*turn, 13]).matched == 12, "of its two states one has room"
    index.budget = index.nbytes - 1
    index.trim(1.0)
    assert server.prefix.stats.spans == server.prefix.stats.nbytes == 0


def test_parts_of_what_leads_on_lead_on():
    caches = kvcache.LayerCaches([StateCache("numpy"), KVCache("numpy")])
    Layers(NUMPY, RECURRENT, {}).run(Holder(caches), [1, 2, 3, 4], 0, 4)
    way = StoredSnapshot(caches.snapshot()).reduced(9)
    assert not way.resumable_inside
    first, second = way.split(2)
    assert not first.resumable_inside
    assert not second.resumable_inside
    assert not first.join([second]).resumable_inside
    first, second = StoredSnapshot(caches.snapshot()).split(2)
    assert first.reduced(4) is None, "it has no state"
    assert StoredSnapshot(first.snapshot, resumable_inside=False).join([second]).resumable_inside


# Tries.


def test_a_trie_finds_the_deepest_state_of_any_entry():
    def caches(ids, points):
        layers = [StateCache("numpy"), KVCache("numpy")]
        layers[0].schedule(points)
        model = Layers(NUMPY, RECURRENT, {})
        model.run(Holder(layers), ids, 0, len(ids))
        return layers

    trie = PrefixTrie()
    trie.insert([1, 2, 3, 4, 5, 6], caches([1, 2, 3, 4, 5, 6], [2, 4]))
    trie.insert([1, 2, 3, 4, 5, 7, 8], caches([1, 2, 3, 4, 5, 7, 8], [3]))
    trie.insert([1, 2, 9], caches([1, 2, 9], []))
    for query, length in [
        ([1, 2, 3, 4, 5, 6, 60], 6),
        ([1, 2, 3, 4, 5, 60], 4),
        ([1, 2, 3, 4, 5, 7, 60], 4),
        ([1, 2, 3, 60], 3),
        ([1, 2, 60], 2),
        ([1, 2, 9, 60], 3),
        ([1, 60], 0),
    ]:
        found, rest = trie.find_nearest(query)
        assert rest == query[length:]
        assert (found is None) == (length == 0)
        if found is not None:
            Layers(NUMPY, RECURRENT, {}).run(Holder(found), query, length, len(query))


class Holder:
    """Caches as those of a session."""

    def __init__(self, caches):
        self.caches = caches
