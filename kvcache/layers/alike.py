"""Checks of caches that are joined to one."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import TypeVar

from .base import LayerCache

C = TypeVar("C", bound=LayerCache)
T = TypeVar("T")


def as_caches(caches: Iterable[T], kind: type[object]) -> tuple[T, ...]:
    """Return what is to be joined as a tuple. Raises: TypeError unless all are of `kind`."""
    listed = list(caches) if hasattr(caches, "__iter__") else None
    if listed is None or not all(isinstance(cache, kind) for cache in listed):
        raise TypeError(f"concat joins a list of {kind.__name__}; got {reprlib.repr(caches)}.")
    return tuple(listed)


def check_alike(kind: type[C], caches: Iterable[C]) -> tuple[C, ...]:
    """Return `caches`, of one kind, with the same options, and all with tokens or all empty.

    Raises: TypeError for anything but caches; ValueError for no cache, for other kinds or options,
        for empty ones among others; ExportedError.
    """
    listed = as_caches(caches, LayerCache)
    if not listed:
        raise ValueError("concat joins one cache or more; got none.")
    first = listed[0]
    for cache in listed:
        cache.check_not_exported()
        if not isinstance(cache, kind) or type(cache) is not type(first):
            raise ValueError(f"{kind.__name__}.concat joins caches of that kind; got {cache!r}.")
        if cache.options != first.options:
            raise ValueError(
                f"concat joins caches with the same options; got {dict(first.options)} and "
                f"{dict(cache.options)}."
            )
    empty = [not cache.offset for cache in listed]
    if any(empty) and not all(empty):
        raise ValueError(
            f"concat joins caches with tokens; {sum(empty)} of {len(empty)} have none. Leave them "
            "out."
        )
    if all(empty) and any(cache.padding is not None for cache in listed):
        raise ValueError(
            "concat joins tokens; got padding without any. Declare it for the joined cache."
        )
    return listed
