"""Checks of caches that are joined to one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from .base import LayerCache

C = TypeVar("C", bound=LayerCache)


def check_alike(caches: Sequence[C]) -> C:
    """Return the first of `caches`, which are of one kind, with the same options.

    Raises: ValueError for no cache, for other kinds or options, for empty ones among others;
        ExportedError.
    """
    if not caches:
        raise ValueError("concat joins one cache or more; got none.")
    first = caches[0]
    for cache in caches:
        cache.check_not_exported()
        if type(cache) is not type(first) or cache.options != first.options:
            raise ValueError(
                f"concat joins caches of one kind with the same options; got {first!r} with "
                f"{dict(first.options)} and {cache!r} with {dict(cache.options)}."
            )
    empty = [not cache.offset for cache in caches]
    if any(empty) and not all(empty):
        raise ValueError(
            f"concat joins caches with tokens; {sum(empty)} of {len(empty)} have none. Leave them "
            "out."
        )
    if all(empty) and any(cache.padding is not None for cache in caches):
        raise ValueError(
            "concat joins tokens; got padding without any. Declare it for the joined cache."
        )
    return first
