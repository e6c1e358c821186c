"""Continuous batching: together as alone, whatever joins, leaves, waits or drops its middle."""

import numpy as np
import pytest

from ... import peek

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

import kvcache
from kvcache import RoPEShift
from kvcache.reference.generate import generate
from kvcache.reference.llama.model import Llama
from kvcache.reference.server import Server

from .conftest import Windowed

LENGTHS = [3, 11, 1, 6, 17, 2, 9, 5]
PROMPTS = [np.random.default_rng(n).integers(0, 64, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def model(tiny_file):
    return Llama.from_gguf(tiny_file, kvcache.get_backend("numpy"))


def alone(model, prompt, count, window=None):
    caches = model.make_caches()
    return list(generate(Windowed(model, window), prompt, caches, count))


def served(model, prompts, counts, **options):
    """What each of them generates together, and what the server said."""
    notes = []
    server = Server(model, note=notes.append, **options)
    requests = [server.submit(p, n) for p, n in zip(prompts, counts, strict=True)]
    given = {request.number: [] for request in requests}
    for request, token in server.run():
        given[request.number].append(token)
    assert [request.generated for request in requests] == list(given.values())
    assert peek.table(server.cache).free == server.cells  # nothing is left behind
    return requests, notes


def test_a_pass_reads_what_its_tokens_see(model, monkeypatch):
    """And not a range of the pool with a mask, whose cost is that of all tokens and all cells."""

    def unread(*_):
        raise AssertionError("the range was read")

    monkeypatch.setattr(kvcache.CausalCache, "get", unread)
    monkeypatch.setattr(kvcache.functional, "get", unread)
    (first, *_), _ = served(model, PROMPTS, [2] * 8, capacity=40)
    assert first.generated == alone(model, PROMPTS[0], 2)


@pytest.mark.parametrize("window", [None, 5])
def test_together_as_alone_on_every_backend(tiny, window):
    """Eight prompts in three places, fed in pieces, of different lengths."""
    counts = [4, 9, 12, 1, 7, 10, 3, 6]
    options = {"max_sequences": 3, "capacity": 40, "max_batch": 8, "window": window, "keep": 0}
    requests, notes = served(tiny, PROMPTS, counts, **options)
    expected = [alone(tiny, p, n, window) for p, n in zip(PROMPTS, counts, strict=True)]
    assert [request.generated for request in requests] == expected
    assert {request.finish for request in requests} == {"max tokens"}
    assert notes == [f"Prompt {n} waits: all of 3 sequences are in use." for n in range(4, 9)]


def test_the_newest_waits_when_the_pool_is_full(model):
    requests, notes = served(model, PROMPTS[:4], [20] * 4, capacity=40, cells=56)
    assert [r.generated for r in requests] == [alone(model, p, 20) for p in PROMPTS[:4]]
    assert notes[0].startswith("The pool is full: prompt 4, the newest, waits. Its ")
    assert notes[0].endswith("tokens will be computed again, nothing is lost.")
    assert all("prompt 1," not in note for note in notes), "the oldest never waits"


def test_joins_while_others_go_on(model):
    server = Server(model, max_sequences=2, capacity=40)
    first = server.submit(PROMPTS[0], 12)
    for _ in range(5):
        server.step()
    second = server.submit(PROMPTS[1], 3)
    list(server.run())
    assert first.generated == alone(model, PROMPTS[0], 12)
    assert second.generated == alone(model, PROMPTS[1], 3)
    assert server.step() == []


def test_decoding_goes_on_while_a_long_prompt_is_fed(model):
    server = Server(model, max_sequences=2, capacity=40, max_batch=4)
    first = server.submit(PROMPTS[0], 20)
    server.step()
    long = server.submit(PROMPTS[4], 2)  # 17 tokens, three in a pass beside that of the first
    for passes in range(1, 6):
        assert [request.number for request, _ in server.step()] == [1]
        assert (len(first.generated), long.held) == (1 + passes, 3 * passes)


def shifted(model, prompt, count, capacity, keep):
    """The slow oracle: per-layer caches, rebuilt without the middle when they are full."""
    caches, pending, out = model.make_caches(), list(prompt), []
    while len(out) < count:
        if caches[0].offset + len(pending) > capacity:
            caches = without_middle(model, caches, keep, keep + (capacity - keep + 1) // 2)
        pending = [int(np.argmax(model([pending], caches)[0]))]
        out += pending
    return out


def without_middle(model, caches, start, stop):
    shift = RoPEShift(model.weights.inverse_frequencies)
    rest = np.r_[:start, stop : caches[0].offset]
    offsets = np.where(rest < start, 0, start - stop).astype(np.int32)
    rebuilt = model.make_caches()
    for layer, (cache, new) in enumerate(zip(caches, rebuilt, strict=True)):
        keys, values = (array[0][:, rest] for array in cache.state)
        new.update(shift(layer, keys, offsets)[None], values[None])
    return rebuilt


def test_context_shift(model):
    capacity, keep = 24, 4
    [request], notes = served(
        model, PROMPTS[1:2], [60], capacity=capacity, keep=keep, context_shift=True
    )
    assert request.generated == shifted(model, PROMPTS[1], 60, capacity, keep)
    assert request.generated != alone(model, PROMPTS[1], 60), "it makes no difference: no test"
    assert len(request.generated) == 60
    said = (
        "Prompt 1 reached its capacity of 24 tokens: positions 4 to 13 were dropped, "
        "those behind them moved up."
    )
    assert set(notes) == {said}


def test_ends(model):
    tokens = alone(model, PROMPTS[0], 20)
    stop = tokens[6]
    requests, _ = served(model, PROMPTS[:1] * 2, [20, 3], capacity=40, eos_id=stop)
    assert requests[0].generated == tokens[: tokens.index(stop)]
    assert requests[0].finish == "end token"
    [request], _ = served(model, PROMPTS[:1], [99], capacity=10)
    assert (request.finish, request.generated) == ("capacity", tokens[:8])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_of_the_pool(tiny, dtype):
    server = Server(tiny, 2, 40, dtype=dtype)
    server.submit(PROMPTS[1], 4)
    list(server.run())
    buffer = peek.layers(server.cache)[0][0]
    assert tiny.backend.dtype_name(buffer) == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4, "cells": 8}, "leave out cells and context_shift"),
        ({"window": 4, "context_shift": True}, "leave out cells and context_shift"),
        ({"keep": 39}, "keep must leave room in the capacity of 40; got 39"),
        ({"max_sequences": 0}, "max_sequences must be >= 1; got 0"),
    ],
)
def test_sizes_are_checked(model, options, message):
    with pytest.raises(ValueError, match=message):
        Server(model, **{"capacity": 40, **options})


def test_prompts_are_checked(model):
    server = Server(model, capacity=16)
    for prompt in ([], [1] * 17):
        with pytest.raises(ValueError, match=f"1 to 16 tokens, the capacity; got {len(prompt)}"):
            server.submit(prompt)
    with pytest.raises(ValueError, match="max_tokens must be >= 1; got 0"):
        server.submit([1], 0)
    assert list(server.run()) == []


@pytest.mark.model
@pytest.mark.parametrize("window", [None, 12])
def test_eight_real_prompts(smollm2, story, window):
    """Fewer, of few tokens, where a step is slow; of three lengths, for each of which JAX compiles.

    MLX multiplies float32 matrices on one core, unvectorised, on Linux.
    """
    number, count = (3, 3) if smollm2.backend.name in {"jax", "mlx"} else (8, 12)
    prompts = [story[i : i + 4 + 7 * (i % 3)] for i in range(number)]
    requests, _ = served(smollm2, prompts, [count] * number, capacity=64, window=window)
    expected = [alone(smollm2, prompt, count, window) for prompt in prompts]
    assert [request.generated for request in requests] == expected
