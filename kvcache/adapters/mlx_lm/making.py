"""Prompt caches for models of mlx-lm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from mlx.nn.layers.base import Module
from mlx_lm.models import cache as library
from mlx_lm.models.cache import make_prompt_cache as library_prompt_cache

from kvcache import KVCache, LayerCaches, NotSupportedError, RotatingKVCache, StateCache

from .entries import AttentionEntry
from .lists import Entry, EntryList
from .states import RecurrentEntry

PromptCache: TypeAlias = list[Entry]
"""A prompt cache of a model: an entry for each layer."""
LibraryCache: TypeAlias = Any
"""An entry of the library's own, whose classes have no types."""
DRAFTS = 16
"""Tokens that speculative decoding may draft unless more are asked for."""

# Functions of mlx-lm that read files look for classes by their names, in this module only.
for _kind in (AttentionEntry, RecurrentEntry, EntryList):
    setattr(library, _kind.__name__, _kind)


def make_prompt_cache(
    model: Module, max_kv_size: int | None = None, keep: int = 0, *, drafts: int = DRAFTS
) -> PromptCache:
    """Return a prompt cache for `model`, as mlx-lm's function of this name does.

    Its entries keep the protocol of mlx-lm's own, so that models and generators take it.

    max_kv_size: tokens that a query sees at most, sinks included, in every layer with keys and
        values; layers with a smaller window keep that. None for what the model says.
    keep: first tokens that are seen for good, of `max_kv_size`.
    drafts: tokens that speculative decoding drafts at most. Layers with a window hold as many more,
        so as to take them back.

    Raises: NotSupportedError for a model with another kind of cache; ValueError for sizes that make
        no window.
    """
    return prompt_cache(model, layer_caches(model, max_kv_size, keep, drafts=drafts))


def layer_caches(
    model: Module, max_kv_size: int | None = None, keep: int = 0, *, drafts: int = DRAFTS
) -> LayerCaches[Any]:
    """Return the empty caches of a prompt cache for `model`, in the order of its layers.

    A layer with attention and a state has two. Arguments and errors are those of
    :func:`make_prompt_cache`.
    """
    return LayerCaches(
        _cache_for(own, max_kv_size, keep, drafts) for own in _flat(_templates(model))
    )


def prompt_cache(model: Module, caches: LayerCaches[Any]) -> PromptCache:
    """Return a prompt cache for `model` of `caches`, as :func:`layer_caches` made them.

    caches: taken over, not copied; with tokens or without, from a file or a copy for instance.

    Raises: ValueError for other kinds of caches than the layers of `model` have.
    """
    templates = _templates(model)
    wanted = [_kind_for(own) for own in _flat(templates)]
    kinds = [KVCache if isinstance(cache, KVCache) else type(cache) for cache in caches]
    if kinds != wanted:
        raise ValueError(
            "a prompt cache has the caches that layer_caches(model) makes, "
            f"{_names(wanted)}; got {_names(kinds)}."
        )
    remaining = iter(caches)
    return [_entry_for(own, remaining) for own in templates]


def caches_of(prompt_cache: Iterable[Entry]) -> LayerCaches[Any]:
    """Return the caches in a prompt cache, in the order of the layers.

    They are those of the prompt cache, not copies, until a batch is joined or ends its prompts.
    """
    return LayerCaches(entry.cache for entry in _flat_entries(prompt_cache))


def _flat_entries(prompt_cache: Iterable[Entry]) -> Iterator[Entry]:
    for entry in prompt_cache:
        yield from entry.entries if isinstance(entry, EntryList) else [entry]


def _templates(model: Module) -> list[LibraryCache]:
    """Return the library's own caches for `model`, also where a program put ours in their place."""
    templates: list[LibraryCache] = library_prompt_cache(model)
    return templates


def _flat(templates: Iterable[LibraryCache]) -> Iterator[LibraryCache]:
    for own in templates:
        yield from _flat(own.caches) if type(own) is library.CacheList else [own]


def _kind_for(own: LibraryCache) -> type[KVCache | StateCache]:
    """Return the kind of cache for a layer, rotating ones being of the kind of full ones."""
    if type(own) is library.ArraysCache:
        return StateCache
    if type(own) in (library.KVCache, library.RotatingKVCache):
        return KVCache
    raise NotSupportedError(
        "prompt caches are made of layers with keys and values, a window of them, or a recurrent "
        f"state; this model has a {type(own).__name__}. Use mlx-lm's own cache for it."
    )


def _names(kinds: Iterable[type]) -> str:
    return ", ".join(kind.__name__ for kind in kinds)


def _cache_for(
    own: LibraryCache, max_kv_size: int | None, keep: int, drafts: int
) -> KVCache | StateCache:
    if _kind_for(own) is StateCache:
        return StateCache("mlx")
    window, sinks = getattr(own, "max_size", None), getattr(own, "keep", 0)
    if max_kv_size is not None and (window is None or max_kv_size < window):
        window, sinks = max_kv_size, keep
    if window is None:
        return KVCache("mlx")
    return RotatingKVCache(window, sinks, "mlx", slack=drafts)


def _entry_for(own: LibraryCache, caches: Iterator[Entry]) -> Entry:
    if type(own) is library.CacheList:
        return EntryList(*(_entry_for(part, caches) for part in own.caches))
    if _kind_for(own) is StateCache:
        return RecurrentEntry(next(caches), len(own.cache))
    return AttentionEntry(next(caches))
