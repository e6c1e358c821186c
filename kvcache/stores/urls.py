"""Stores by URL."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import unquote, urlsplit

from kvcache.errors import StoreError

from .base import Store
from .files import FileStore
from .memory import MemoryStore
from .objects import ObjectStore


def open_store(url: str | Store, **options: object) -> Store:
    """Return the store of a URL; a store as it is.

    ``file:///var/cache/kv`` is a :class:`FileStore`, ``memory:`` a :class:`MemoryStore`,
    ``redis://host:port``, ``rediss://`` (TLS), ``unix://path`` or
    ``redis+cluster://host:port,host:port`` a ``kvcache.stores.redis.RedisStore``, and any other one
    an :class:`ObjectStore`. options: of that class, such as `budget`.

    Raises: StoreError for a URL that leads to no store; TypeError for no URL, or for options that
        the store does not have.
    """
    if isinstance(url, Store):
        return url
    if not isinstance(url, str):
        raise TypeError(f"a store is a URL or a kvcache.stores.Store; got {url!r}.")
    scheme, colon, _ = url.partition(":")
    if not colon:
        raise StoreError(f"a store is named by a URL, such as file:///var/cache/kv; got {url!r}.")
    return _OPENERS.get(scheme, ObjectStore)(url, **options)


def _open_files(url: str, **options: object) -> Store:
    parts = urlsplit(url)
    if parts.netloc not in {"", "localhost"} or not parts.path.startswith("/"):
        raise StoreError(
            f"a directory of this machine is file:///path, with three slashes; got {url!r}."
        )
    return FileStore(unquote(parts.path), **options)  # type: ignore[arg-type]


def _open_memory(url: str, **options: object) -> Store:
    if url not in {"memory:", "memory://"}:
        raise StoreError(f"host memory is memory: without a path; got {url!r}.")
    return MemoryStore(**options)  # type: ignore[arg-type]


def _open_servers(url: str, **options: object) -> Store:
    try:
        from .redis import RedisStore
    except ImportError as error:
        raise StoreError(str(error)) from error
    return RedisStore(url, **options)  # type: ignore[arg-type]


_OPENERS: dict[str, Callable[..., Store]] = {
    "file": _open_files,
    "memory": _open_memory,
    "redis": _open_servers,
    "redis+cluster": _open_servers,
    "rediss": _open_servers,
    "rediss+cluster": _open_servers,
    "unix": _open_servers,
}
