"""Greedy generation with a hybrid decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvcache.reference._greedy import greedy

from .model import Hybrid, HybridCache


def generate(
    model: Hybrid,
    prompt_ids: Sequence[int],
    caches: Sequence[HybridCache] | None = None,
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
    return greedy(
        model.backend,
        lambda ids: model([ids], caches),
        prompt_ids,
        max_tokens,
        keeps=caches is not None,
        eos_id=eos_id,
        prefill_chunk=prefill_chunk,
    )
