"""Greedy generation, and the caches for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableSequence, Sequence
from itertools import cycle
from typing import Literal, TypeAlias

from kvcache import KVCache, RotatingKVCache
from kvcache.backends import Backend
from kvcache.reference._greedy import greedy

from .gguf import LlamaConfig
from .model import LayerCache, Llama

__all__ = ["CacheKind", "generate", "make_caches", "relay"]

CacheKind: TypeAlias = Literal["kv", "rotating", "none"]


def make_caches(
    backend: Backend,
    config: LlamaConfig,
    kind: CacheKind = "kv",
    *,
    max_size: int = 4096,
    keep: int = 0,
    dtype: str = "float32",
) -> list[KVCache] | None:
    """Make one cache per layer of the model, or None for kind ``"none"``.

    kind: ``"kv"`` holds every token; ``"rotating"`` the first `keep` and the latest others,
        `max_size` in all.
    dtype: of keys and values in the caches. The model casts, if it is not float32.

    Raises: ValueError for an unknown kind or sizes that leave no window; DTypeError for a
        dtype that the backend lacks.
    """
    backend.dtype(dtype)
    match kind:
        case "none":
            return None
        case "kv":
            return [KVCache(backend, dtype=dtype) for _ in range(config.layers)]
        case "rotating":
            return [
                RotatingKVCache(max_size, keep, backend, dtype=dtype) for _ in range(config.layers)
            ]
    raise ValueError(f"a cache is of kind 'kv', 'rotating' or 'none'; got {kind!r}.")


def generate(
    model: Llama,
    prompt_ids: Sequence[int],
    caches: Sequence[LayerCache] | None = None,
    max_tokens: int = 64,
    *,
    eos_id: int | None = None,
    prefill_chunk: int | None = None,
    window: int | None = None,
) -> Iterator[int]:
    """Yield the most likely next token, up to `max_tokens` times.

    caches: one per layer, continued from what they hold; None recomputes everything for
        every token. At the end they hold the prompt and all yielded tokens but the last.
    eos_id: stop at this token, which is not yielded; None goes on past it.
    prefill_chunk: feed the prompt in pieces of so many tokens; None feeds it at once.
    window: attend to so many tokens at most, the token itself included.

    Raises: ValueError for an empty prompt, a negative max_tokens, a chunk below 1.
    """
    return greedy(
        model.backend,
        lambda ids: model([ids], caches, window=window),
        prompt_ids,
        max_tokens,
        keeps=caches is not None,
        eos_id=eos_id,
        prefill_chunk=prefill_chunk,
    )


def relay(
    models: Sequence[Llama],
    prompt_ids: Sequence[int],
    caches: MutableSequence[KVCache],
    max_tokens: int = 64,
    *,
    every: int = 4,
    eos_id: int | None = None,
    prefill_chunk: int | None = None,
    note: Callable[[Llama], None] | None = None,
) -> Iterator[int]:
    """Generate as :func:`generate`, going on with the next of `models` after `every` tokens.

    models: the same model on several backends, used in turn. The caches go from one to the next
        with :meth:`KVCache.to_backend`, and nothing is computed again.
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
