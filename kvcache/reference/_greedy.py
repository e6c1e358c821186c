"""The loop of greedy generation, for every language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from kvcache.backends import Array, Backend

Feed: TypeAlias = Callable[[list[int]], Array]
"""Compute the next tokens of one sequence; return the logits after the last one, [1, vocab]."""


def greedy(
    backend: Backend,
    feed: Feed,
    prompt_ids: Sequence[int],
    max_tokens: int,
    *,
    keeps: bool,
    eos_id: int | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[int]:
    """Yield the most likely next token, up to `max_tokens` times.

    keeps: `feed` goes on from the tokens fed before; otherwise it is fed everything each time.
    eos_id: stop at this token, which is not yielded; None goes on past it.
    prefill_chunk: feed the prompt in pieces of so many tokens; None feeds it at once.

    Raises: ValueError for an empty prompt, a negative max_tokens, a chunk below 1.
    """
    # This function is no generator itself, so that bad arguments raise here and not at next().
    if not len(prompt_ids):
        raise ValueError("a prompt must have at least one token; got none.")
    if max_tokens < 0:
        raise ValueError(f"max_tokens must be >= 0; got {max_tokens}.")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk must be >= 1 token; got {prefill_chunk}.")
    chunk = prefill_chunk if keeps else None
    return _until(_tokens(backend, feed, list(prompt_ids), keeps, chunk), max_tokens, eos_id)


def _until(tokens: Iterator[int], count: int, eos_id: int | None) -> Iterator[int]:
    for _ in range(count):
        token = next(tokens)
        if token == eos_id:
            return
        yield token


def _tokens(
    backend: Backend, feed: Feed, ids: list[int], keeps: bool, chunk: int | None
) -> Iterator[int]:
    """Yield greedy tokens after `ids` without end."""
    while True:
        token = _next(backend, feed, ids, chunk or len(ids))
        yield token
        ids = [token] if keeps else [*ids, token]


def _next(backend: Backend, feed: Feed, ids: list[int], step: int) -> int:
    """Feed `ids` in pieces of `step` tokens; return the token after them."""
    for start in range(0, len(ids), step):
        logits = feed(ids[start : start + step])
        # A lazy framework would otherwise pile up the graphs of all pieces.
        backend.sync(logits)
    return _argmax(backend, logits)


def _argmax(backend: Backend, logits: Array) -> int:
    """Find the likeliest token on the device: one number crosses to the host, not a vocabulary."""
    # Frameworks differ in the dtype of argmax, and MLX's is unsigned.
    best = backend.xp.astype(backend.xp.argmax(logits, axis=-1), backend.dtype("int32"))
    return int(backend.to_host(best)[0])
