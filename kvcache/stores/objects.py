"""A store in any place that fsspec knows: object stores, file servers, memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from kvcache.errors import PageError, StoreError

from .base import Store
from .frames import HEADER_NBYTES, OVERHEAD, checked, framed, read_header
from .outcomes import (
    ContainsOutcome,
    Corrupt,
    Deadline,
    Deleted,
    DeleteOutcome,
    Entry,
    GetOutcome,
    Item,
    Key,
    Miss,
    Present,
    PutOutcome,
    Stored,
    Unavailable,
    Usage,
)
from .workers import A, R, Workers

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


_LISTED = 100


class _Object(NamedTuple):
    key: Key
    nbytes: int
    used: float


class ObjectStore(Store):
    """Values as objects below an fsspec URL, such as ``s3://bucket/prefix``.

    options: of the file system, such as credentials: those that fsspec takes for such a URL.

    It has no budget: object stores delete by rules of age that their owners set. For a directory of
    this machine take :class:`FileStore`, which holds a budget and shows no half-written file.

    Raises: StoreError without fsspec, or the package that it needs for the URL, or for a URL that
        it does not know.
    """

    def __init__(self, url: str, **options: object) -> None:
        super().__init__()
        self._system, self._root = _opened(url, options)
        self._made: set[str] = set()
        self._workers = Workers()

    def __repr__(self) -> str:
        return f"<ObjectStore {self._system.protocol} {self._root}>"  # a URL may hold a password

    def _get(self, keys: Sequence[Key], deadline: Deadline) -> Sequence[GetOutcome]:
        return self._answered(keys, self._read, deadline)

    def _read(self, key: Key) -> GetOutcome:
        try:
            frame = self._system.cat_file(self._path(key))
        except FileNotFoundError:
            return Miss()
        outcome = checked(key, memoryview(frame))
        if isinstance(outcome, Corrupt):
            with suppress(Exception):  # reading is what was asked for
                self._system.rm_file(self._path(key))
        return outcome

    def _put(self, items: Sequence[Item], deadline: Deadline) -> Sequence[PutOutcome]:
        return self._answered(items, self._write, deadline)

    def _write(self, item: Item) -> PutOutcome:
        if not self._exists(item.key):
            self._make_parent(item.key)
            try:
                self._upload(item)
            except FileNotFoundError:
                self._made.clear()  # somebody removed folders
                raise
        return Stored()

    def _make_parent(self, key: Key) -> None:
        """Make the folder of an object once, where there are folders."""
        # Before the upload: fsspec moves a local file by copying it if there is no folder at first.
        parent = self._parent(key)
        if parent not in self._made:
            self._system.makedirs(parent, exist_ok=True)
            self._made.add(parent)

    def _upload(self, item: Item) -> None:
        """Write an object that nobody sees before it is whole, where the system can do that."""
        path = self._path(item.key)
        # Object stores take one in a call. In memory, an open file is there from the beginning.
        if self._system.async_impl or self._system.protocol == "memory":
            self._system.pipe_file(path, b"".join(framed(item)))
            return
        file = self._system.open(path, "wb", autocommit=False)
        try:
            with file:
                for piece in framed(item):
                    file.write(piece)
            file.commit()
        except BaseException:
            with suppress(Exception):
                file.discard()
            raise

    def _contains(self, keys: Sequence[Key], deadline: Deadline) -> Sequence[ContainsOutcome]:
        return self._answered(keys, self._look_up, deadline)

    def _look_up(self, key: Key) -> ContainsOutcome:
        return Present() if self._exists(key) else Miss()

    def _exists(self, key: Key) -> bool:
        self._system.invalidate_cache()  # others write there, too
        try:
            self._system.info(self._path(key))
        except FileNotFoundError:
            return False
        return True

    def _delete(self, keys: Sequence[Key], deadline: Deadline) -> Sequence[DeleteOutcome]:
        return self._answered(keys, self._delete_one, deadline)

    def _delete_one(self, key: Key) -> DeleteOutcome:
        # Many systems delete without a word where nothing is.
        if not self._exists(key):
            return Miss()
        self._system.rm_file(self._path(key))
        return Deleted()

    def _answered(
        self, asked: Sequence[A], answer: Callable[[A], R], deadline: Deadline
    ) -> list[R | Unavailable]:
        return self._workers.answers(asked, answer, deadline)

    def _entries(self, deadline: Deadline) -> Iterator[Entry]:
        listed = self._listed(deadline)
        for first in range(0, len(listed), _LISTED):
            batch = listed[first : first + _LISTED]
            for entry in self._workers.answers(batch, self._entry, deadline):
                if isinstance(entry, Unavailable):
                    raise StoreError(entry.reason)
                if entry is not None:
                    yield entry

    def _entry(self, listed: _Object) -> Entry | None:
        key, nbytes, used = listed
        try:
            header = self._system.cat_file(self._path(key), 0, HEADER_NBYTES)
            label = read_header(header, key, nbytes)
        except (FileNotFoundError, PageError):  # gone since, or to be found out by a read
            return None
        return Entry(key, nbytes - OVERHEAD, label, used)

    def _listed(self, deadline: Deadline) -> list[_Object]:
        """Return all objects, their labels unread."""
        self._system.invalidate_cache()
        [listed] = self._workers.answers(
            [self._root], lambda root: self._system.find(root, detail=True), deadline
        )
        if isinstance(listed, Unavailable):
            raise StoreError(listed.reason)
        objects = []
        for path, status in listed.items():
            with suppress(ValueError):  # not ours
                key = bytes.fromhex(path.rsplit("/", 1)[-1])
                if path.rstrip("/").endswith(self._path(key).lstrip("/")):
                    objects.append(_Object(key, int(status["size"]), _time_of(status)))
        return objects

    def _usage(self, deadline: Deadline) -> Usage:
        sizes = [listed.nbytes for listed in self._listed(deadline)]
        return Usage(len(sizes), sum(sizes), None)

    def _parent(self, key: Key) -> str:
        return f"{self._root}/{key.hex()[:2]}"

    def _path(self, key: Key) -> str:
        return f"{self._parent(key)}/{key.hex()}"


def _opened(url: str, options: dict[str, object]) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a URL, and the path in it."""
    try:
        core = importlib.import_module("fsspec.core")
    except ImportError as error:
        raise StoreError(
            "objects are stored through fsspec, which is not installed. "
            "pip install 'kvcache[objects]'"
        ) from error
    try:
        system, root = core.url_to_fs(url, **options)
    except Exception as error:
        raise StoreError(f"fsspec cannot open this URL: {error}") from error
    return system, root.rstrip("/")


def _time_of(status: dict[str, object]) -> float:
    """Return the time of an object in seconds, 0 if the system gives none."""
    for name in ("mtime", "LastModified", "updated", "created"):
        value = status.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0
