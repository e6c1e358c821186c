"""Conversations: what is reused, and that the answers are those of a model that starts anew."""

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

from kvcache.reference.chat import Chat, Conversation, Turn, pieces
from kvcache.reference.generate import generate
from kvcache.reference.llama.tokenizer import GGUFTokenizer

KINDS = ["kv", "rotating", "pool"]
SIZES = {"max_size": 14, "keep": 2, "capacity": 160}


def cold_tiny(model, kind, prompt, count):
    # Where slices are copies, every length is compiled: token by token there is only one.
    piece = None if model.backend.slices_are_views else 1
    return cold(model, kind, prompt, count, piece, **SIZES)


def cold(model, kind, prompt, count, piece=None, **sizes):
    sizes = {name: sizes[name] for name in ("max_size", "keep")}
    caches = model.make_caches(kind if kind != "pool" else "kv", **sizes)
    return list(generate(model, prompt, caches, count, prefill_chunk=piece))


@pytest.mark.parametrize("kind", KINDS)
def test_every_turn_goes_on_from_those_before(tiny, kind):
    chat = Chat(tiny, kind, **SIZES)
    rng = np.random.default_rng(3)
    said = []
    for number in range(5):
        said += rng.integers(0, 64, 1 + number).tolist()
        turn = Turn(list(said))
        answer = list(chat.reply(turn, 5))
        assert answer == turn.tokens == cold_tiny(tiny, kind, said, 5)
        # All of the turn before but the last token of its answer, which nobody fed.
        assert turn.reused == len(said) - (2 + number if number else 1)
        said += answer
    assert chat.prefix.stats.active == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_may_be_asked_for_again(tiny, kind):
    """The same prompt is found up to its last token, an edited one up to the edit at most."""
    chat = Chat(tiny, kind, **SIZES)
    prompt = list(range(1, 30))
    first, again, edited = Turn(prompt), Turn(prompt), Turn([*prompt[:20], 50, 51])
    for turn in (first, again, edited):
        assert list(chat.reply(turn, 4)) == cold_tiny(tiny, kind, turn.prompt, 4)
    assert again.tokens == first.tokens
    assert (first.reused, again.reused) == (0, 28)
    assert edited.reused == (2 if kind == "rotating" else 20)  # the sinks
    # Where requests have parted once, a ring can go on from the second time.
    third = Turn([*prompt[:20], 60])
    assert list(chat.reply(third, 4)) == cold_tiny(tiny, kind, third.prompt, 4)
    assert third.reused == 20


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_token_and_an_abandoned_answer(tiny, kind):
    prompt = list(range(5))
    expected = cold_tiny(tiny, kind, prompt, 6)
    turn = Turn(prompt)
    chat = Chat(tiny, kind, eos_id=expected[3], compare=True, **SIZES)
    end = expected.index(expected[3])
    assert list(chat.reply(turn, 6)) == expected[:end]
    assert turn.seconds > 0
    assert turn.cold_seconds > 0
    before = chat.prefix.stats
    answer = chat.reply(Turn([*prompt, 9]), 6)
    next(answer)
    answer.close()
    after = chat.prefix.stats
    assert (after.nbytes, after.active, after.pinned) == (before.nbytes, 0, 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "ring"}, ValueError, "kind 'kv', 'rotating' or 'pool'; got 'ring'"),
        ({"budget": "1"}, TypeError, "budget must be an integer; got '1'"),
        ({"policy": "best"}, ValueError, "there is no policy 'best'"),
        ({"eos_id": "</s>"}, TypeError, "eos_id must be an integer; got '</s>'"),
        ({"kind": "pool", "capacity": 0}, ValueError, "capacity must be >= 1"),
        ({"kind": "rotating", "max_size": 0}, ValueError, "max_size"),
    ],
)
def test_what_a_chat_cannot_be_made_with(tiny, options, error, message):
    with pytest.raises(error, match=message):
        Chat(tiny, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compare", [False, True])
def test_an_odd_turn_is_refused_and_the_next_goes_on(tiny, kind, compare):
    chat = Chat(tiny, kind, compare=compare, **SIZES)
    prompt = list(range(1, 8))
    list(chat.reply(Turn(prompt), 2))
    before = chat.prefix.stats
    for odd in ([], [64], [1, -1], [1.0], "text", [[1], [2, 3]], None):
        with pytest.raises(ValueError, match=r"(at least one token, of ids in|lists? of integers)"):
            next(chat.reply(Turn(odd), 2))
    for max_tokens, error in ((0, ValueError), (-1, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match=f"got .*{max_tokens}"):
            next(chat.reply(Turn(prompt), max_tokens))
    assert chat.prefix.stats == before
    turn = Turn(prompt)
    assert list(chat.reply(turn, 3)) == cold_tiny(tiny, kind, prompt, 3)
    assert turn.reused == len(prompt) - 1


def test_pieces_have_few_lengths_where_each_is_compiled():
    assert list(pieces(0, 8, powers_of_two=True)) == []
    assert list(pieces(21, 8, powers_of_two=False)) == [(0, 8), (8, 16), (16, 21)]
    lengths = {
        stop - start for n in range(1, 70) for start, stop in pieces(n, 8, powers_of_two=True)
    }
    assert lengths == {1, 2, 4, 8}
    assert [stop for _, stop in pieces(21, 8, powers_of_two=True)] == [8, 16, 20, 21]


@pytest.fixture(scope="module")
def tokenizer(smollm2_file):
    return GGUFTokenizer.from_gguf(smollm2_file)


@pytest.mark.model
def test_what_was_said_stays_as_the_tokens_that_were_said(tokenizer):
    conversation = Conversation(tokenizer, "Be brief.")
    first = conversation.ask("Hello")
    odd = [*tokenizer.encode("He"), *tokenizer.encode("llo")]  # one token if encoded together
    assert tokenizer.encode(tokenizer.decode(odd)) != odd
    assert conversation.answer(odd) == "Hello"
    second = conversation.ask("Again")
    assert second[: len(first) + len(odd)] == [*first, *odd]
    messages = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hello")]
    messages = [{"role": role, "content": text} for role, text in [*messages, ("user", "Again")]]
    assert tokenizer.decode(second) == tokenizer.render_chat(messages)


class Rewriting:
    """A tokenizer of letters, with a template that rewrites earlier turns."""

    def render_chat(self, messages):
        return f"{len(messages)}:" + "".join(message["content"] for message in messages)

    def encode(self, text, special):
        assert special
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_a_turn_that_fails_was_not_said():
    class Failing(Rewriting):
        def encode(self, text, special):
            if "!" in text:
                raise MemoryError
            return super().encode(text, special)

    conversation = Conversation(Failing())
    assert conversation.ask("a") == [*map(ord, "1:a")]
    with pytest.raises(MemoryError):
        conversation.ask("!")
    for odd in (None, 5, b"b"):
        with pytest.raises(TypeError, match="a turn is text, a str; got"):
            conversation.ask(odd)
    with pytest.raises(ValueError, match="lists of integers"):
        conversation.answer("b")
    assert conversation.ask("b") == [*map(ord, "2:ab")]
    with pytest.raises(TypeError, match="instructions are text, a str; got 5"):
        Conversation(Rewriting(), 5)


def test_a_template_that_rewrites_what_was_said():
    conversation = Conversation(Rewriting())
    assert conversation.ask("a") == [*map(ord, "1:a")]
    conversation.answer([*map(ord, "b")])
    assert conversation.ask("c") == [*map(ord, "3:abc")]


@pytest.mark.model
@pytest.mark.parametrize("kind", KINDS)
def test_ten_turns_with_a_real_model(smollm2, tokenizer, kind):
    """Reuses all earlier turns, and says what it would say without; in fewer where that is slow."""
    if smollm2.backend.name == "mlx" and kind != "rotating":
        pytest.skip("a prompt of 200 tokens takes MLX 10 s on CPU, once is enough")
    sizes = {"max_size": 80, "keep": 4, "capacity": 600}
    chat = Chat(smollm2, kind, eos_id=tokenizer.eos_id, **sizes)
    conversation = Conversation(tokenizer)
    held = 0
    for number in range({"mlx": 4, "jax": 5}.get(smollm2.backend.name, 10)):
        turn = Turn(conversation.ask(f"Say {number}."))
        assert list(chat.reply(turn, 2)) == turn.tokens
        assert turn.reused == held
        conversation.answer(turn.tokens)
        # The cache has not seen the last token, unless the end token came behind it.
        ended = len(turn.tokens) < 2
        held = len(turn.prompt) + len(turn.tokens) - (0 if ended else 1)
    expected = cold(smollm2, kind, turn.prompt, 2, **sizes)[: len(turn.tokens)]
    assert turn.tokens == expected
