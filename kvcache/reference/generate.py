"""Greedy generation, on one backend or handed from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableSequence, Sequence
from itertools import cycle
from typing import Any, TypeAlias

from kvcache.backends import Array, Backend

from .decoder import Decoder

__all__ = ["generate", "likeliest", "relay"]

AnyCache: TypeAlias = Any
"""A per-layer cache of a kind that the model takes."""


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    caches: Sequence[AnyCache] | None = None,
    max_tokens: int = 64,
    *,
    eos_id: int | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[int]:
    """Yield the most likely next token, up to `max_tokens` times.

    caches: one per layer, continued from what they hold; None recomputes everything for
        every token. At the end they hold the prompt and all yielded tokens but the last.
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
    chunk = prefill_chunk if caches is not None else None
    return _until(_tokens(model, list(prompt_ids), caches, chunk), max_tokens, eos_id)


def relay(
    models: Sequence[Decoder],
    prompt_ids: Sequence[int],
    caches: MutableSequence[AnyCache],
    max_tokens: int = 64,
    *,
    every: int = 4,
    eos_id: int | None = None,
    prefill_chunk: int | None = None,
    note: Callable[[Decoder], None] | None = None,
) -> Iterator[int]:
    """Generate as :func:`generate`, going on with the next of `models` after `every` tokens.

    models: the same model on several backends, used in turn. The caches go from one to the next
        with ``to_backend``, and nothing is computed again.
    caches: as for `generate`, on the backend of the first model; a hand-over puts those of the
        next in their places.
    note: called with the next model when it has the caches.

    Raises: with the first token, ValueError for no model or `every` below 1, and as `generate`.
    """
    if not models or every < 1:
        raise ValueError(
            f"a relay has models, and an `every` >= 1 token; got {len(models)} and {every}."
        )
    ids, left = list(prompt_ids), max_tokens
    for turn, model in enumerate(cycle(models)):
        if turn:
            caches[:] = [cache.to_backend(model.backend) for cache in caches]
            if note is not None:
                note(model)
        leg = min(every, left)
        left_after_leg = left - leg
        for token in generate(model, ids, caches, leg, eos_id=eos_id, prefill_chunk=prefill_chunk):
            yield token
            # The caches lack the last token only: it is all that the next model has to be fed.
            ids, left = [token], left - 1
        if left > left_after_leg or not left:  # the end token came, or all tokens have
            return


def _until(tokens: Iterator[int], count: int, eos_id: int | None) -> Iterator[int]:
    for _ in range(count):
        token = next(tokens)
        if token == eos_id:
            return
        yield token


def _tokens(
    model: Decoder, ids: list[int], caches: Sequence[AnyCache] | None, chunk: int | None
) -> Iterator[int]:
    """Yield greedy tokens after `ids` without end."""
    while True:
        token = _next(model, ids, caches, chunk or len(ids))
        yield token
        ids = [*ids, token] if caches is None else [token]


def _next(model: Decoder, ids: list[int], caches: Sequence[AnyCache] | None, step: int) -> int:
    """Feed `ids` in pieces of `step` tokens; return the token after them."""
    for start in range(0, len(ids), step):
        logits = model([ids[start : start + step]], caches)
        # A lazy framework would otherwise pile up the graphs of all pieces.
        model.backend.sync(logits)
    return likeliest(model.backend, logits)[0]


def likeliest(backend: Backend, logits: Array) -> list[int]:
    """Find the likeliest token of each row of `logits` [rows, vocab].

    On the device: one number for each row crosses to the host, not a vocabulary.
    """
    # Frameworks differ in the dtype of argmax, and MLX's is unsigned.
    best = backend.xp.astype(backend.xp.argmax(logits, axis=-1), backend.dtype("int32"))
    tokens: list[int] = backend.to_host(best).tolist()
    return tokens
