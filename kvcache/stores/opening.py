"""Stores by URL."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

from kvcache.errors import StoreError

from .base import Store
from .files import FileStore
from .memory import MemoryStore
from .objects import ObjectStore


def open_store(url: str, **options: Any) -> Store:
    """Return the store of a URL, with the options that its class takes as keyword arguments.

    - ``memory:``: :class:`MemoryStore`;
    - ``file:///var/cache/kv``, ``file:cache``: :class:`FileStore`;
    - ``redis://host:port``, ``rediss://``, ``unix://``, ``redis+cluster://host:port,host:port``:
      ``kvcache.stores.redis.RedisStore``;
    - any other: :class:`ObjectStore`, through fsspec.

    Raises: ValueError for what is no URL of a store, or an option that the store does not have;
        StoreError without the package that the store needs.
    """
    scheme = url.partition(":")[0] if ":" in url else ""
    if len(scheme) < 2:  # one letter is a drive
        raise ValueError(f"a store is given by a URL; got {url!r}. For a directory: file:{url}")
    kind, place = _KINDS.get(scheme, _object_store)(url)
    try:
        inspect.signature(kind).bind(*place, **options)
    except TypeError as error:
        raise ValueError(f"{kind.__name__} has other options: {error}.") from error
    return kind(*place, **options)


def _memory_store(url: str) -> tuple[type[Store], tuple[str, ...]]:
    if url != "memory:":
        raise ValueError(f"a store in memory is memory: and nothing else; got {url!r}.")
    return MemoryStore, ()


def _file_store(url: str) -> tuple[type[Store], tuple[str, ...]]:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(
            f"files are of this machine; got {url!r}. An absolute path has three slashes."
        )
    if not parts.path:
        raise ValueError(f"a directory has a path; got {url!r}.")
    return FileStore, (unquote(parts.path),)


def _redis_store(url: str) -> tuple[type[Store], tuple[str, ...]]:
    try:
        from .redis import RedisStore
    except ImportError as error:
        raise StoreError(str(error)) from error
    return RedisStore, (url,)


def _object_store(url: str) -> tuple[type[Store], tuple[str, ...]]:
    return ObjectStore, (url,)


_KINDS: dict[str, Callable[[str], tuple[type[Store], tuple[str, ...]]]] = {
    "file": _file_store,
    "memory": _memory_store,
    "redis": _redis_store,
    "redis+cluster": _redis_store,
    "rediss": _redis_store,
    "rediss+cluster": _redis_store,
    "unix": _redis_store,
}
