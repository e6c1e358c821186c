"""Models of mlx-lm with caches of kvcache, token for token, however they are run."""

import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from mlx_lm.models.cache import (  # noqa: E402
    LRUPromptCache,
    RotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
)
from mlx_lm.models.cache import make_prompt_cache as library_prompt_cache  # noqa: E402

from kvcache import LayerCaches, StateCache  # noqa: E402
from kvcache.adapters.mlx_lm import (  # noqa: E402
    AttentionEntry,
    caches_of,
    make_prompt_cache,
    prompt_cache,
)

from . import tiny  # noqa: E402

PROMPT, TOKENS = 32, 40
SIZE, SINKS = 16, 3
# Each way to run a model: tokens with caches of kvcache, and those expected.


def streamed(name, path):
    model, prompt = tiny.model(name), tiny.prompt_of(PROMPT)
    ours = tiny.stream(model, prompt, TOKENS, prompt_cache=make_prompt_cache(model))
    return ours, tiny.stream(model, prompt, TOKENS)


def in_chunks(name, path):
    model, prompt = tiny.model(name), tiny.prompt_of(PROMPT)
    ours = [
        tiny.stream(
            model, prompt, TOKENS, prompt_cache=make_prompt_cache(model), prefill_step_size=size
        )
        for size in (1, 5)
    ]
    return ours, [tiny.stream(model, prompt, TOKENS)] * 2


def drafted(name, path):
    model, drafter, ours, theirs = tiny.model(name), tiny.drafter(name), [], []
    for length, tokens in ((3, 6), (PROMPT, TOKENS)):
        prompt = tiny.prompt_of(length)
        cache = make_prompt_cache(model) + make_prompt_cache(drafter)
        ours += tiny.speculative(model, drafter, prompt, tokens, cache)
        theirs += tiny.stream(model, prompt, tokens)
    return ours, theirs


def saved(name, path):
    model, prompt = tiny.model(name), tiny.prompt_of(PROMPT)
    first = make_prompt_cache(model)
    save_prompt_cache(str(path / "none.safetensors"), first)
    first = load_prompt_cache(str(path / "none.safetensors"))
    start = tiny.stream(model, prompt, 10, prompt_cache=first)
    save_prompt_cache(str(path / "theirs.safetensors"), first)
    caches_of(first).save(path / "ours.safetensors")
    again = [
        load_prompt_cache(str(path / "theirs.safetensors")),
        prompt_cache(model, LayerCaches.load(path / "ours.safetensors", backend="mlx")),
    ]
    turn = tiny.prompt_of(7)
    ours = [start + tiny.stream(model, turn, TOKENS, prompt_cache=cache) for cache in again]
    expected = tiny.stream(model, prompt, 10)
    expected += tiny.stream(model, prompt + expected + turn, TOKENS)
    return ours, [expected] * 2


def in_batches(name, path):
    model = tiny.model(name)
    prompts = [tiny.prompt_of(length, length) for length in (PROMPT, 3, 17, 2, 44)]
    alone = [tiny.stream(model, prompt, 20 + row) for row, prompt in enumerate(prompts)]
    ours, expected = [], []
    for options in ({}, {"prefill_step_size": 5, "prefill_batch_size": 2}):
        caches = [make_prompt_cache(model) for _ in prompts]
        rows, left = tiny.batched(model, prompts, 20, caches, **options)
        ours += rows
        expected += alone
    # A request that was in a batch goes on alone, in a cache of its own.
    for prompt, row, cache in zip(prompts[:2], rows, left, strict=False):
        assert caches_of(cache).offset == len(prompt) + len(row)
        ours.append(tiny.stream(model, [5, 6], 10, prompt_cache=cache))
        expected.append(tiny.stream(model, [*prompt, *row, 5, 6], 10))
    return ours, expected


def from_lru(name, path):
    model, prompt, lru = tiny.model(name), tiny.prompt_of(PROMPT), LRUPromptCache()
    first = make_prompt_cache(model)
    key = prompt + tiny.stream(model, prompt, 10, prompt_cache=first)
    lru.insert_cache("model", key, first)
    requests = {"goes on": [*key, 4, 5], "branches": [*key[:20], 9, 9], "anew": [8, 9, 8]}
    ours, expected = [], []
    for kind, request in requests.items():
        cache, rest = lru.fetch_nearest_cache("model", request)
        reused = kind == "goes on" or (kind == "branches" and name in ("llama", "qwen3"))
        assert (cache is not None) is reused
        cache = cache or make_prompt_cache(model)
        ours += tiny.stream(model, rest, TOKENS, prompt_cache=cache)
        expected += tiny.stream(model, request, TOKENS)
    return ours, expected


def limited(name, path):
    model, prompt = tiny.model(name), tiny.prompt_of(PROMPT)
    ours, expected = [], []
    for keep in (0, SINKS):
        own = [resized(cache, keep) for cache in library_prompt_cache(model)]
        stepwise = tiny.stepwise(model, prompt, TOKENS, own)
        for size in (2048, 5, 1):
            cache = make_prompt_cache(model, SIZE, keep)
            ours += tiny.stream(model, prompt, TOKENS, prompt_cache=cache, prefill_step_size=size)
            expected += stepwise
    return ours, expected


def resized(own, keep):
    """The library's own cache, limited by hand."""
    if type(own).__name__ == "KVCache":
        return RotatingKVCache(max_size=SIZE, keep=keep)
    if type(own).__name__ == "CacheList":
        own.caches = [resized(part, keep) for part in own.caches]
    return own


WAYS = [streamed, in_chunks, drafted, saved, in_batches, from_lru, limited]
ALWAYS = {
    (streamed, "falcon_h1"),
    (in_chunks, "gemma3"),
    (drafted, "gemma3"),
    (saved, "falcon_h1"),
    (in_batches, "gemma3"),
    (in_batches, "qwen3_next"),
    (from_lru, "llama"),
    (limited, "llama"),
}
"""Cells that every run of the tests has; the others are run with the matrix."""


def cells(always):
    return [
        pytest.param(
            name,
            way,
            id=f"{name}-{way.__name__}",
            marks=[] if (way, name) in always else [pytest.mark.matrix],
        )
        for name in tiny.MODELS
        for way in WAYS
        if way is not drafted or name not in tiny.RECURRENT
    ]


def only_always(*names, of=tuple(tiny.MODELS)):
    return [pytest.param(n, marks=[] if n in names else [pytest.mark.matrix]) for n in of]


@pytest.mark.parametrize(("name", "way"), cells(ALWAYS))
def test_tokens_are_those_of_the_library(name, way, tmp_path):
    ours, expected = way(name, tmp_path)
    assert ours == expected


@pytest.mark.parametrize(("name", "way"), cells({(in_chunks, "gemma3")}))
def test_values_that_are_lost_fail_every_cell(name, way, tmp_path, monkeypatch):
    update = AttentionEntry.update_and_fetch

    def forgetful(self, keys, values):
        keys, values = update(self, keys, values)
        return keys, mx.concatenate([0 * values[:, :, :-1], values[:, :, -1:]], axis=2)

    monkeypatch.setattr(AttentionEntry, "update_and_fetch", forgetful)
    ours, expected = way(name, tmp_path)
    assert ours != expected


@pytest.mark.parametrize(
    ("name", "way"),
    [cell for cell in cells({(streamed, "lfm2")}) if cell.values[0] in tiny.RECURRENT],
)
def test_states_that_are_lost_fail_every_cell(name, way, tmp_path, monkeypatch):
    state = StateCache.state

    def blank(self):
        return tuple(mx.zeros_like(array) for array in state.fget(self))

    monkeypatch.setattr(StateCache, "state", property(blank))
    ours, expected = way(name, tmp_path)
    assert ours != expected


@pytest.mark.parametrize("name", only_always("gemma3", "falcon_h1"))
def test_the_output_varies(name):
    assert len(set(tiny.stream(tiny.model(name), tiny.prompt_of(PROMPT), TOKENS))) >= 20


# What the library's own caches get wrong.


@pytest.mark.parametrize("name", only_always("gemma3", of=tiny.WINDOWED))
def test_the_library_drafts_past_a_window_with_other_tokens(name):
    model, drafter, prompt = tiny.model(name), tiny.drafter(name), tiny.prompt_of(PROMPT)
    own = library_prompt_cache(model) + library_prompt_cache(drafter)
    theirs = tiny.speculative(model, drafter, prompt, TOKENS, own)
    assert theirs != tiny.stream(model, prompt, TOKENS)


def test_the_library_loses_sinks_in_a_chunked_prefill():
    model, prompt = tiny.model("llama"), tiny.prompt_of(PROMPT)
    chunked, stepwise = (
        [RotatingKVCache(max_size=SIZE, keep=SINKS) for _ in model.layers] for _ in range(2)
    )
    theirs = tiny.stream(model, prompt, TOKENS, prompt_cache=chunked, prefill_step_size=5)
    assert theirs != tiny.stepwise(model, prompt, TOKENS, stepwise)


@pytest.mark.parametrize("name", only_always("gemma3", of=list(tiny.MODELS)[2:]))
def test_the_library_ignores_a_size_given_to_models_that_make_caches(name):
    model, prompt = tiny.model(name), tiny.prompt_of(PROMPT)
    assert tiny.stream(model, prompt, TOKENS, max_kv_size=SIZE) == tiny.stream(
        model, prompt, TOKENS
    )
    cache = make_prompt_cache(model, SIZE)
    assert tiny.stream(model, prompt, TOKENS, prompt_cache=cache) != tiny.stream(
        model, prompt, TOKENS
    )
    assert all(c.len <= SIZE + 16 for c in caches_of(cache) if not isinstance(c, StateCache))
