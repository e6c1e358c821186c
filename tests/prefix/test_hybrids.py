"""Sessions of models with recurrent layers: a hit ends where a state was kept."""

import pytest

from .served import MODELS, Server


@pytest.mark.parametrize("name", ["recurrent", "hybrid"])
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
