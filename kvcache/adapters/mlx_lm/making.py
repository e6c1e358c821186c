"""Prompt caches for models of mlx-lm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mlx import nn
from mlx_lm.models import cache as library
from mlx_lm.models.cache import make_prompt_cache as library_prompt_cache

from kvcache import KVCache, LayerCaches, NotSupportedError, RotatingKVCache, StateCache

from .entries import AttentionEntry
from .lists import EntryList
from .states import RecurrentEntry

SLACK = 16
"""Tokens that rotating caches hold beyond their window, so that as many can be taken back."""

# Functions of mlx-lm that read files look for classes by their names, in this module only.
for _entry in (AttentionEntry, RecurrentEntry, EntryList):
    setattr(library, _entry.__name__, _entry)


def make_prompt_cache(model: nn.Module, max_kv_size: int | None = None, keep: int = 0) -> list[Any]:
    """Return what mlx-lm's function of this name returns, of caches of kvcache."""
    return prompt_cache(model, layer_caches(model, max_kv_size, keep))


def layer_caches(
    model: nn.Module, max_kv_size: int | None = None, keep: int = 0
) -> LayerCaches[Any]:
    """Return an empty cache for every layer of `model` that has one, in order."""
    return LayerCaches(_cache_for(own, max_kv_size, keep) for own in _flat(_templates(model)))


def prompt_cache(model: nn.Module, caches: LayerCaches[Any]) -> list[Any]:
    """Return a prompt cache for `model` of `caches`, as :func:`layer_caches` made them."""
    remaining = iter(caches)
    return [_entry_for(own, remaining) for own in _templates(model)]


def caches_of(prompt_cache: Iterable[Any]) -> LayerCaches[Any]:
    """Return the caches in a prompt cache, in the order of the layers."""
    return LayerCaches(entry.cache for entry in _flat_entries(prompt_cache))


def _flat_entries(prompt_cache: Iterable[Any]) -> Iterator[Any]:
    for entry in prompt_cache:
        yield from entry.entries if isinstance(entry, EntryList) else [entry]


def _templates(model: nn.Module) -> list[Any]:
    """Return the library's own caches for `model`, also where a program put ours in their place."""
    templates: list[Any] = library_prompt_cache(model)
    return templates


def _flat(templates: Iterable[Any]) -> Iterator[Any]:
    for own in templates:
        yield from _flat(own.caches) if type(own) is library.CacheList else [own]


def _cache_for(own: Any, max_kv_size: int | None, keep: int) -> Any:
    kind = type(own)
    if kind is library.ArraysCache:
        return StateCache("mlx")
    if kind not in (library.KVCache, library.RotatingKVCache):
        raise NotSupportedError(
            "prompt caches are made of layers with keys and values, a window of them, or a "
            f"recurrent state; this model has a {kind.__name__}. Use mlx-lm's own cache for it."
        )
    window, sinks = getattr(own, "max_size", None), getattr(own, "keep", 0)
    if max_kv_size is not None and (window is None or max_kv_size < window):
        window, sinks = max_kv_size, keep
    if window is None:
        return KVCache("mlx")
    return RotatingKVCache(window, sinks, "mlx", slack=SLACK)


def _entry_for(own: Any, caches: Iterator[Any]) -> Any:
    if type(own) is library.CacheList:
        return EntryList(*(_entry_for(part, caches) for part in own.caches))
    if type(own) is library.ArraysCache:
        return RecurrentEntry(next(caches), len(own.cache))
    return AttentionEntry(next(caches))
