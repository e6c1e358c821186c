"""Conversations with a hybrid: each turn goes on from those before, and says the same."""

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

from kvcache.reference.chat import Chat, Turn
from kvcache.reference.generate import generate

KINDS = ["kv", "rotating", "pool"]
SIZES = {"max_size": 14, "keep": 2, "capacity": 160}


def cold(model, kind, prompt, count):
    sizes = {name: SIZES[name] for name in ("max_size", "keep")}
    caches = model.make_caches("rotating" if kind == "rotating" else "kv", **sizes)
    # Where slices are copies, every length is compiled: token by token there is only one.
    piece = None if model.backend.slices_are_views else 1
    return list(generate(model, prompt, caches, count, prefill_chunk=piece))


@pytest.mark.parametrize("kind", KINDS)
def test_every_turn_goes_on_from_those_before(tiny, kind):
    chat = Chat(tiny, kind, **SIZES)
    rng = np.random.default_rng(3)
    said = []
    for number in range(3):
        # With the last token of the answer, 8 to compute: one length where each is compiled.
        said += rng.integers(0, 64, 7 if number else 8).tolist()
        turn = Turn(list(said))
        answer = list(chat.reply(turn, 5))
        assert answer == turn.tokens == cold(tiny, kind, said, 5)
        # All of the turn before but the last token of its answer, which nobody fed.
        assert turn.reused == (len(said) - 8 if number else 0)
        said += answer
    assert chat.prefix.stats.active == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_may_be_asked_for_again(tiny, kind):
    chat = Chat(tiny, kind, compare=True, **SIZES)
    prompt = list(range(1, 17))
    edited = [*prompt[:8], *range(40, 48)]
    turns = [Turn(ids) for ids in (prompt, prompt, edited, [*prompt[:8], *range(50, 58)])]
    for turn in turns:
        assert list(chat.reply(turn, 4)) == cold(tiny, kind, turn.prompt, 4)
        assert turn.cold_seconds > 0
    # Where requests part, no state was kept the first time.
    assert [turn.reused for turn in turns] == [0, 15, 0, 8]
