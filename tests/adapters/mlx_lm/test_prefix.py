"""Prefix reuse around the generators of mlx-lm, beside what its own cache of prompts reuses."""

import math
from functools import cache
from inspect import signature

import pytest

pytest.importorskip("mlx_lm", reason="needs the extra of this name")

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator, batch_generate, stream_generate
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.models.cache import make_prompt_cache as library_cache

import kvcache
from kvcache.adapters.mlx_lm import caches_of, make_prompt_cache, prefix_cache
from kvcache.stores import NEVER, MemoryStore

from . import tiny, words

IN_CI = ("llama", "gemma3", "qwen3_next")
EVERY = [
    pytest.param(name, marks=() if name in IN_CI else pytest.mark.matrix) for name in tiny.MODELS
]
ONE_OF_EACH = ["llama", "gemma3", "qwen3_next"]
"""Models without and with windows, and with recurrent layers."""
SYSTEM = tiny.prompt_of(40)
"""Longer than windows: they have dropped its first tokens when it ends."""
TOKENS = 10


def branch_of(seed):
    return SYSTEM + tiny.prompt_of(7, seed=50 + seed)


def cold(name, tokens, count=TOKENS):
    """The tokens of a run without reuse."""
    return list(cold_run(name, tuple(tokens))[:count])


@cache
def cold_run(name, tokens):
    return tiny.stream(tiny.model(name), tokens, TOKENS)


def ask(prefix, tokens, count=TOKENS, **options):
    """One request: how many of its tokens were reused, and the tokens generated."""
    [model] = prefix.models
    with prefix.session(tokens, **options) as session:
        answer = []
        for response in stream_generate(
            model, endless(), session.remaining, prompt_cache=session.cache, max_tokens=count
        ):
            answer.append(response.token)
            session.extend([response.token])
    return session.matched, answer


def endless():
    """The tokenizer, without a token that ends an answer."""
    tokenizer = words.tokenizer()
    tokenizer.eos_token_ids = set()
    return tokenizer


def reused_by_library(prompts, name, tokens, answer):
    """How many tokens of a request the library's cache of prompts has. It gets the others."""
    found, rest = prompts.fetch_nearest_cache(name, list(tokens))
    model = tiny.model(name)
    if rest:  # else mlx-lm has no token to generate from
        held = found or library_cache(model)
        model(mx.array([rest + answer]), cache=held)
        prompts.insert_cache(name, tokens + answer, held)
    return len(tokens) - len(rest)


@pytest.mark.parametrize("name", EVERY)
def test_turns_and_branches(name):
    prefix, library = prefix_cache(tiny.model(name)), LRUPromptCache()
    conversation, requests = list(SYSTEM), []
    reused, by_library, answers = [], [], set()
    for turn in range(4):
        conversation = conversation + tiny.prompt_of(9, seed=turn + 1)
        requests.append(conversation)
        conversation = conversation + cold(name, conversation)
    requests += [branch_of(0), branch_of(1), branch_of(2), branch_of(2)]
    for tokens in requests:
        matched, answer = ask(prefix, tokens)
        assert answer == cold(name, tokens)
        answers.update(answer)
        reused.append(matched)
        by_library.append(reused_by_library(library, name, tokens, answer))
    assert len(answers) >= 20
    turns = [0, *(len(tokens) + TOKENS for tokens in requests[:3])]
    full = name not in tiny.WINDOWED + tiny.RECURRENT
    # Where windows dropped tokens, or no state was kept, from the second appearance on.
    assert reused == [*turns, 40 if full else 0, 40, 40, 46]
    assert by_library == [*turns, *([40, 40, 40, 46] if full else [0, 0, 0, 0])]


@pytest.mark.parametrize("name", EVERY)
def test_one_position_off_is_seen(name):
    """The control: of a prefix that is named one token too early, the next scores are others."""
    tokens = SYSTEM + tiny.prompt_of(9, seed=1)
    prefix, [expected] = prefix_cache(tiny.model(name)), scores(name, [*tokens, 7])
    errors = []
    for named in (tokens, [*tokens[1:], 5]):
        cache = make_prompt_cache(tiny.model(name))
        scores(name, tokens, cache)
        prefix.prefix.insert(named, caches_of(cache))
        with prefix.session([*named, 7]) as session:
            assert session.remaining == [7]
            [got] = scores(name, [7], session.cache)
            errors.append(np.abs(got - expected).max())
    assert errors[0] < 1e-4
    assert errors[1] < 1e-4  # the rows are those of `tokens`, whatever their names
    [of_named] = scores(name, [*named, 7])
    assert np.abs(got - of_named).max() > 1e-2


def scores(name, tokens, cache=None):
    """Of the token behind the last one: [1, vocab]."""
    return np.array(tiny.model(name)(mx.array([tokens]), cache=cache)[:, -1])


# Generators.


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_stream_generate(name):
    prefix, tokenizer, prompt = prefix_cache(tiny.model(name)), endless(), branch_of(0)
    expected = [r.text for r in stream_generate(tiny.model(name), tokenizer, prompt, max_tokens=8)]
    for given in (prompt, mx.array(prompt), words.text_of(prompt)):
        responses = list(prefix.stream_generate(tokenizer, given, max_tokens=8))
        assert [response.text for response in responses] == expected
        assert responses[-1].finish_reason == "length"
    assert [response.prompt_tokens for response in responses] == [1] * 8
    answer = [response.token for response in responses]
    assert prefix.prefix.lookup([*prompt, *answer, 1]).matched == len(prompt) + 8


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_loop_that_is_left_early_stores_what_came(name):
    prefix, tokenizer, prompt = prefix_cache(tiny.model(name)), endless(), branch_of(0)
    tokens = []
    for response in prefix.stream_generate(tokenizer, prompt, max_tokens=100):
        tokens.append(response.token)
        if len(tokens) == 3:
            break
    del response
    assert prefix.prefix.stats.active == 0
    assert ask(prefix, [*prompt, *tokens, 5]) == (50, cold(name, [*prompt, *tokens, 5]))


def test_a_failed_generation_keeps_what_was_computed():
    prefix = prefix_cache(tiny.model("llama"))

    def fail(logprobs):
        raise RuntimeError("sampling failed")

    with pytest.raises(RuntimeError, match="sampling failed"):
        list(prefix.stream_generate(endless(), SYSTEM, sampler=fail))
    assert prefix.prefix.stats.active == 0
    assert ask(prefix, branch_of(0)) == (len(SYSTEM), cold("llama", branch_of(0)))


def test_a_session_that_drops_what_it_had_when_it_fails():
    prefix = prefix_cache(tiny.model("qwen3_next"))
    session = prefix.session(SYSTEM, keep_on_error=False)
    session.prefill()
    session.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert (prefix.prefix.stats.spans, prefix.prefix.stats.active) == (0, 0)


@pytest.mark.parametrize("passes", [0, 1])
def test_a_model_that_fails_before_the_session_begins(monkeypatch, passes):
    model, left = tiny.model("qwen3_next"), [passes]
    prefix, run = prefix_cache(model), type(model).__call__

    def fail(self, tokens, cache=None):
        if not left[0]:
            raise MemoryError("no room")
        left[0] -= 1
        return run(self, tokens, cache=cache)

    with monkeypatch.context() as patched:
        patched.setattr(type(model), "__call__", fail)
        with pytest.raises(MemoryError, match="no room"):
            prefix.session(SYSTEM, resume_points=[20, 30])
    assert prefix.prefix.stats.active == 0
    assert ask(prefix, branch_of(0)) == (20 * passes, cold("qwen3_next", branch_of(0)))


@pytest.mark.parametrize("name", EVERY)
def test_a_batch(name):
    """Prompts of unequal length, and depths of hits that are unequal, too."""
    prefix, tokenizer = prefix_cache(tiny.model(name)), endless()
    prompts = [SYSTEM + tiny.prompt_of(length, seed=length) for length in (3, 9, 6)]
    ask(prefix, prompts[1], 2)
    counts = [8, 5, 7]
    # Rings still have the window before 40, within their slack.
    first = [0, 48, 0] if name in tiny.RECURRENT else [40, 48, 40]
    for depths in (first, [len(p) + n for p, n in zip(prompts, counts, strict=True)]):
        assert [prefix.prefix.lookup(tokens).matched for tokens in prompts] == depths
        response = prefix.batch_generate(tokenizer, prompts, max_tokens=counts)
        expected = [cold(name, p, n) for p, n in zip(prompts, counts, strict=True)]
        assert response.token_ids == expected
        assert response.texts == [tokenizer.decode(tokens) for tokens in expected]
        prompts = [
            tokens + answer + tiny.prompt_of(4, seed=len(tokens))
            for tokens, answer in zip(prompts, expected, strict=True)
        ]


def test_a_batch_stops_at_a_token_and_stores_it():
    prefix, prompt = prefix_cache(tiny.model("qwen3_next")), branch_of(0)
    answer = cold("qwen3_next", prompt)
    last = next(n for n, token in enumerate(answer) if n > 2 and token not in answer[:n])
    tokenizer = endless()
    tokenizer.eos_token_ids = {answer[last]}
    assert prefix.batch_generate(tokenizer, [prompt]).token_ids == [answer[:last]]
    assert prefix.prefix.lookup([*prompt, *answer[: last + 1], 1]).matched == 47 + last + 1


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_sessions_around_batch_generate(name):
    """The library's function, which gives back no token that ended an answer."""
    model, prompts = tiny.model(name), [branch_of(0), SYSTEM]
    prefix = prefix_cache(model)
    for length in (0, 46):
        sessions = [prefix.session(tokens) for tokens in prompts]
        for session in sessions:
            session.prefill()
        assert sessions[0].matched == length
        response = batch_generate(
            model,
            endless(),
            [session.remaining for session in sessions],
            prompt_caches=[session.cache for session in sessions],
            max_tokens=6,
            return_prompt_caches=True,
            return_token_ids=True,
        )
        rows = zip(sessions, prompts, response.token_ids, response.caches, strict=True)
        for session, tokens, answer, row in rows:
            assert answer == cold(name, tokens, 6)
            session.finish(tokens + answer, row)
        assert prefix.prefix.lookup([*prompts[0], *response.token_ids[0], 1]).matched == 53


def test_a_request_that_joins_a_batch():
    model, prompts = tiny.model("gemma3"), [branch_of(0), branch_of(1)]
    prefix, generator = prefix_cache(model), BatchGenerator(model, max_tokens=8)
    ask(prefix, prompts[0])
    ask(prefix, prompts[1])
    sessions, answers = {}, {0: [], 1: []}
    for step in range(12):
        if step in (0, 3):
            session = prefix.session(prompts[len(sessions)])
            assert session.matched == 46
            [uid] = generator.insert(
                [session.remaining], caches=[session.cache], all_tokens=[session.computed]
            )
            sessions[uid] = session
        for response in generator.next_generated():
            answers[response.uid].append(response.token)
            if response.finish_reason:
                sessions[response.uid].finish(response.all_tokens, response.prompt_cache)
    generator.close()
    assert [*answers.values()] == [cold("gemma3", tokens, 8) for tokens in prompts]
    for tokens, answer in zip(prompts, answers.values(), strict=True):
        assert prefix.prefix.lookup([*tokens, *answer, 1]).matched == 55


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_speculative_decoding(name):
    """Drafts are taken back, and what is stored of both models are the tokens that stayed."""
    prefix = prefix_cache(tiny.model(name), tiny.drafter(name))
    conversation, end = list(SYSTEM), 0
    for turn in range(3):
        conversation += tiny.prompt_of(5, seed=turn)
        # The last tokens of an answer may not have run.
        assert end - 2 <= prefix.prefix.lookup(conversation).matched <= end
        responses = prefix.stream_generate(
            endless(), conversation, max_tokens=TOKENS, num_draft_tokens=3
        )
        answer = [response.token for response in responses]
        assert answer == cold(name, conversation)
        conversation += answer
        end = len(conversation)


# Sessions.


def test_options_pass_through():
    model = tiny.model("qwen3_next")
    prefix = prefix_cache(model, budget=1 << 20, index_budget=1 << 16, policy="s3fifo")
    assert prefix.prefix.stats.budget == 1 << 20
    assert prefix.prefix.stats.index_budget == 1 << 16
    assert ask(prefix, branch_of(0), salt="a")[0] == 0
    assert ask(prefix, branch_of(0), salt="b")[0] == 0
    assert ask(prefix, branch_of(0), salt="a")[0] == 46
    assert ask(prefix, branch_of(0), salt="c", resume_points=[40])[0] == 0
    assert ask(prefix, branch_of(1), salt="c") == (40, cold("qwen3_next", branch_of(1)))
    prefix = prefix_cache(model, resume_every=16)
    ask(prefix, branch_of(0))
    assert ask(prefix, branch_of(1)) == (32, cold("qwen3_next", branch_of(1)))
    small = prefix_cache(model, budget=0)
    ask(small, branch_of(0))
    assert ask(small, branch_of(0))[0] == 0


def test_prompts_that_a_store_kept():
    store, name = MemoryStore(), "qwen3_next"
    for reused in (0, 46):  # each with a prefix cache of its own, as after a restart
        options = {"store": store, "namespace": name, "page_tokens": 16}
        prefix = prefix_cache(tiny.model(name), **options)
        answer = ask(prefix, branch_of(0), deadline=NEVER)
        assert answer == (reused, cold(name, branch_of(0)))
        assert prefix.prefix.close()


def test_retained_prompts_are_evicted_last():
    prefix = prefix_cache(tiny.model("llama"))
    ask(prefix, branch_of(0), retain=(1, math.inf))
    nbytes = prefix.prefix.stats.nbytes
    assert ask(prefix, [9, 8, 7, 6, 5])[0] == 0
    prefix.prefix.trim(nbytes)
    assert ask(prefix, branch_of(0)) == (46, cold("llama", branch_of(0)))
    assert prefix.prefix.stats.retained_evictions == 0


def test_a_size_limit_is_honoured_by_sessions():
    model, prompt = tiny.model("llama"), branch_of(0)
    prefix = prefix_cache(model, max_kv_size=16, keep=2)
    for matched in (0, 46):
        with prefix.session(prompt) as session:
            assert session.matched == matched
            tiny.stream(model, session.remaining, 3, prompt_cache=session.cache)
            assert {cache.max_size for cache in caches_of(session.cache)} == {16}


def test_a_session_tells_its_hit():
    prefix = prefix_cache(tiny.model("qwen3_next"))
    ask(prefix, branch_of(0))
    with prefix.session(branch_of(1)) as session:
        assert (session.matched, session.stored) == (0, 40)
        assert session.limited_by == (0, 2)
        # It has run up to where the prompt departs, to keep the states there.
        assert session.computed == SYSTEM
        assert session.remaining == branch_of(1)[40:]


def test_tokens_that_are_taken_back_are_not_stored():
    model, prompt = tiny.model("llama"), branch_of(0)
    prefix = prefix_cache(model)
    with prefix.session(prompt) as session:
        answer = tiny.stream(model, session.remaining, 6, prompt_cache=session.cache)
        session.extend(answer)
        session.truncate(50)
        session.extend([1, 2])
        tiny.stream(model, [1], 1, prompt_cache=session.cache)  # runs what it yields as well
    assert prefix.prefix.lookup([*prompt, *answer, 1]).matched == 50
    assert prefix.prefix.lookup([*prompt, *answer[:3], 1, 2, 9]).matched == 52


def test_a_closed_session_stores_once_or_not_at_all():
    prefix = prefix_cache(tiny.model("llama"))
    session = prefix.session(SYSTEM)
    session.close(store=False)
    session.close()
    assert prefix.prefix.stats.spans == 0
    with pytest.raises(kvcache.KVCacheError, match="this one has ended"):
        session.extend([1])


@pytest.mark.parametrize("tokens", [[], "text"])
def test_prompts_are_token_ids(tokens):
    with pytest.raises(ValueError, match="token"):
        prefix_cache(tiny.model("llama")).session(tokens)


def test_rows_of_another_model_are_refused():
    prefix = prefix_cache(tiny.model("llama"))
    session = prefix.session(SYSTEM)
    other = make_prompt_cache(tiny.model("gemma3"))
    tiny.stream(tiny.model("gemma3"), SYSTEM, 1, prompt_cache=other)
    with pytest.raises(ValueError, match="of the kinds given to the prefix cache"):
        session.finish([*SYSTEM, 1], other)


# What the adapter rests on.


def test_canary():
    """If this fails, mlx-lm has moved: see kvcache/adapters/mlx_lm/prefix.py and server.py."""

    def missing(function, *names):
        return set(names) - set(signature(function).parameters)

    moved = "mlx-lm's {} has other parameters; look at kvcache/adapters/mlx_lm/prefix.py"
    wanted = [
        (stream_generate, ("model", "tokenizer", "prompt", "draft_model", "kwargs")),
        (BatchGenerator, ("model", "stop_tokens")),
        (BatchGenerator.insert, ("prompts", "max_tokens", "caches", "all_tokens")),
        (BatchGenerator.next_generated, ()),
        (BatchGenerator.stats, ()),
    ]
    for function, names in wanted:
        assert not missing(function, *names), moved.format(function.__qualname__)
