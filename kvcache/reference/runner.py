"""Greedy generation, and the caches for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

from kvcache import KVCache, RotatingKVCache
from kvcache.backends.base import Array, Backend

from .gguf import LlamaConfig
from .llama import LayerCache, Llama

__all__ = ["CacheKind", "generate", "make_caches"]

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
    """One cache per layer of the model, or None for kind ``"none"``.

    kind: ``"kv"`` holds every token; ``"rotating"`` the first `keep` and the latest others,
        `max_size` in all.
    dtype: what the caches hold. The model casts, if it is not float32.

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
    if not len(prompt_ids):
        raise ValueError("a prompt must have at least one token; got none.")
    if max_tokens < 0:
        raise ValueError(f"max_tokens must be >= 0; got {max_tokens}.")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk must be >= 1 token; got {prefill_chunk}.")
    tokens = _tokens(model, list(prompt_ids), caches, prefill_chunk, window)
    return _until(tokens, max_tokens, eos_id)


def _until(tokens: Iterator[int], count: int, eos_id: int | None) -> Iterator[int]:
    for _ in range(count):
        token = next(tokens)
        if token == eos_id:
            return
        yield token


def _tokens(
    model: Llama,
    ids: list[int],
    caches: Sequence[LayerCache] | None,
    chunk: int | None,
    window: int | None,
) -> Iterator[int]:
    while True:
        token = _next(model, ids, caches, chunk, window)
        yield token
        ids = [token] if caches is not None else [*ids, token]


def _next(
    model: Llama,
    ids: list[int],
    caches: Sequence[LayerCache] | None,
    chunk: int | None,
    window: int | None,
) -> int:
    step = chunk if chunk and caches is not None else len(ids)
    for start in range(0, len(ids), step):
        logits = model([ids[start : start + step]], caches, window=window)
        # A lazy framework would otherwise pile up the graphs of all chunks.
        model.backend.sync(logits)
    return _argmax(model, logits)


def _argmax(model: Llama, logits: Array) -> int:
    """Found on the device: one number crosses to the host instead of a whole vocabulary."""
    backend = model.backend
    best = backend.xp.astype(backend.xp.argmax(logits, axis=-1), backend.dtype("int32"))
    return int(backend.to_host(best)[0])
