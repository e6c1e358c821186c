"""Generation: when it stops, what it feeds, and the caches it is given."""

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

import kvcache
from kvcache.errors import DTypeError
from kvcache.reference.generate import generate
from kvcache.reference.llama.model import Llama

from .conftest import Windowed

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@pytest.fixture(scope="module")
def model(tiny_file):
    return Llama.from_gguf(tiny_file, kvcache.get_backend("numpy"))


@pytest.fixture(scope="module")
def tokens(model):
    """The 20 tokens that follow the prompt, found without generate."""
    ids = list(PROMPT)
    for _ in range(20):
        ids.append(int(np.argmax(model([ids])[0])))
    return ids[len(PROMPT) :]


def caches_for(model, **options):
    return model.make_caches(**options)


def test_uncached_on_every_backend(tiny, tokens):
    assert list(generate(tiny, PROMPT, None, 20)) == tokens


@pytest.mark.parametrize("chunk", [None, 1, 4, 11, 100])
def test_cached_on_every_backend(tiny, tokens, chunk):
    caches = caches_for(tiny)
    assert list(generate(tiny, PROMPT, caches, 20, prefill_chunk=chunk)) == tokens
    # The last token was never fed.
    assert {cache.offset for cache in caches} == {len(PROMPT) + 19}


def test_continues_what_the_caches_hold(model, tokens):
    caches = caches_for(model)
    first = list(generate(model, PROMPT, caches, 8))
    rest = list(generate(model, first[-1:], caches, 12))
    assert first + rest == tokens


def test_chunks_are_fed_whole(model):
    fed = []

    class Counting:
        backend = model.backend

        def __call__(self, ids, *args, **kwargs):
            fed.append(len(ids[0]))
            return model(ids, *args, **kwargs)

    list(generate(Counting(), PROMPT, caches_for(model), 3, prefill_chunk=4))
    assert fed == [4, 4, 3, 1, 1]


@pytest.mark.parametrize("cached", [True, False])
def test_stops_in_front_of_the_end_token(model, tokens, cached):
    end = tokens[6]
    expected = tokens[: tokens.index(end)]
    caches = caches_for(model) if cached else None
    assert list(generate(model, PROMPT, caches, 20, eos_id=end)) == expected
    assert end not in expected


def test_no_tokens_compute_nothing(model):
    caches = caches_for(model)
    assert list(generate(model, PROMPT, caches, 0)) == []
    assert caches[0].offset == 0


def test_window(model, tokens):
    windowed = list(generate(Windowed(model, 3), PROMPT, caches_for(model), 20))
    assert windowed == list(generate(Windowed(model, 3), PROMPT, None, 20))
    assert windowed != tokens


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompt_ids": []}, "at least one token"),
        ({"max_tokens": -1}, "max_tokens must be >= 0; got -1"),
        ({"prefill_chunk": 0}, "prefill_chunk must be >= 1 token; got 0"),
    ],
)
def test_bad_arguments_raise_at_once(model, arguments, says):
    with pytest.raises(ValueError, match=says):
        generate(model, **({"prompt_ids": PROMPT} | arguments))


def test_make_caches(model):
    kv = caches_for(model, dtype="bfloat16")
    assert [type(cache) for cache in kv] == [kvcache.KVCache] * 2
    assert kv[0].dtype == "bfloat16"
    rotating = caches_for(model, kind="rotating", max_size=9, keep=2)
    assert [type(cache) for cache in rotating] == [kvcache.RotatingKVCache] * 2
    assert (rotating[0].max_size, rotating[0].keep) == (9, 2)


def test_make_caches_refuses(model):
    with pytest.raises(ValueError, match="'kv' or 'rotating'; got 'paged'"):
        caches_for(model, kind="paged")
    with pytest.raises(ValueError, match="keep must be 0 to max_size - 1"):
        caches_for(model, kind="rotating", max_size=4, keep=4)
    with pytest.raises(DTypeError, match="float7"):
        caches_for(model, dtype="float7")
