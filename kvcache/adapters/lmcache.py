"""A store of kvcache as an L2 adapter of LMCache: Redis, a directory, any URL.

One option is all that LMCache needs; the guide is ``docs/lmcache.md``::

    --l2-adapter '{"type": "plugin", "module_path": "kvcache.adapters.lmcache",
        "class_name": "KVCacheAdapter", "adapter_params": {"url": "redis://127.0.0.1:6379"}}'
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from kvcache.errors import BackendNotAvailableError
from kvcache.stores import open_store
from kvcache.stores.jobs import Jobs
from kvcache.stores.named import NamedKeys
from kvcache.stores.transfers import Place, Report

try:
    from lmcache.lmcache_native import Bitmap
    from lmcache.v1.distributed.internal_api import L2StoreResult
    from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface, L2TaskId
    from lmcache.v1.platform import create_event_notifier
except ImportError as error:
    raise BackendNotAvailableError(
        f"this needs lmcache 0.5.6 with its L2 adapters, which is missing or another ({error}). "
        "Try: pip install 'lmcache>=0.5.6'"
    ) from error

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.internal_api import L1MemoryDesc
    from lmcache.v1.memory_management import MemoryObj

_OPTIONS = ("threads", "timeout", "lookup_timeout")


class KVCacheAdapter(L2AdapterInterface):
    """Objects in a store.

    No call waits for the store, except delete and close. Every task ends within its timeout, and is
    signalled then. Objects are verified by a checksum when they are loaded, which covers their
    shapes and dtypes too: one of another form is not loaded. Nothing is locked: an object that the
    store gave up after the look-up is a miss of the load.

    params: `url`, and `options` if any, both of ``kvcache.stores.open_store``; `namespace`, which
    tells apart what LMCache does not, such as weights under one name; `threads`, `timeout` and
    `lookup_timeout` of ``kvcache.stores.jobs.Jobs``.

    Raises: StoreError, TypeError, ValueError for a store that cannot be opened.
    """

    def __init__(
        self, params: Mapping[str, Any], l1_memory_desc: L1MemoryDesc | None = None
    ) -> None:
        super().__init__()
        if unknown := set(params) - {"url", "options", "namespace", *_OPTIONS}:
            raise ValueError(f"adapter_params has no {', '.join(sorted(unknown))}.")
        if "url" not in params:
            raise ValueError(
                f"adapter_params has the url of a store, such as redis://host:6379; got {params}."
            )
        store = open_store(params["url"], **params.get("options", {}))
        self._jobs = Jobs(store, **{name: params[name] for name in _OPTIONS if name in params})
        self._names = NamedKeys({"engine": "lmcache", "namespace": params.get("namespace", "")})
        self._task_ids = itertools.count()
        self._lock = threading.Lock()
        self._stored: dict[L2TaskId, L2StoreResult] = {}
        self._bitmaps: dict[L2TaskId, Bitmap] = {}
        self._nbytes: dict[tuple[str, int, int], int] = {}  # of an object, by its group
        self._store_signal = create_event_notifier()
        self._lookup_signal = create_event_notifier()
        self._load_signal = create_event_notifier()

    def get_store_event_fd(self) -> int:
        return int(self._store_signal.fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        return int(self._lookup_signal.fileno())

    def get_load_event_fd(self) -> int:
        return int(self._load_signal.fileno())

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2TaskId:
        task = next(self._task_ids)
        self._jobs.put(self._places(keys, objects), partial(self._end_store, task, keys))
        return task

    def pop_completed_store_tasks(self) -> dict[L2TaskId, L2StoreResult]:
        with self._lock:
            stored, self._stored = self._stored, {}
        return stored

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> L2TaskId:
        task = next(self._task_ids)
        self._jobs.look_up(list(map(self._key, keys)), partial(self._end_look_up, task))
        return task

    def query_lookup_and_lock_result(self, task_id: L2TaskId) -> Bitmap | None:
        with self._lock:
            return self._bitmaps.pop(task_id, None)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Do nothing: a look-up locks nothing."""

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2TaskId:
        task = next(self._task_ids)
        self._jobs.load(self._places(keys, objects), partial(self._end_load, task, keys))
        return task

    def query_load_result(self, task_id: L2TaskId) -> Bitmap | None:
        return self.query_lookup_and_lock_result(task_id)

    def delete(self, keys: list[ObjectKey]) -> None:
        removed = self._jobs.remove(list(map(self._key, keys))).wait().succeeded
        gone = [key for key, is_gone in zip(keys, removed, strict=True) if is_gone]
        if gone:
            self._notify_keys_deleted(gone, [self._nbytes.get(_group(key), 0) for key in gone])

    def close(self) -> None:
        self._jobs.close()
        for signal in (self._store_signal, self._lookup_signal, self._load_signal):
            signal.close()

    def report_status(self) -> dict[str, object]:
        stats = self._jobs.store.stats
        return {
            "is_healthy": True,
            "type": type(self).__name__,
            "store": repr(self._jobs.store),
            "unfinished": self._jobs.unfinished,
            "unavailable": stats.unavailable,
            "corrupt": stats.corrupt,
        }

    def _key(self, key: ObjectKey) -> bytes:
        fields = (
            key.chunk_hash.hex(),
            key.model_name,
            key.kv_rank,
            key.object_group_id,
            key.cache_salt,
        )
        return self._names.key(json.dumps(fields).encode())

    def _places(self, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]) -> list[Place]:
        return [
            Place(self._key(key), memoryview(place.byte_array), _form(place))
            for key, place in zip(keys, objects, strict=True)
        ]

    def _end_store(self, task: L2TaskId, keys: Sequence[ObjectKey], report: Report) -> None:
        with self._lock:
            self._stored[task] = L2StoreResult(all(report.succeeded), report.nbytes)
        self._store_signal.notify()
        new = {key: nbytes for key, nbytes in zip(keys, report.moved, strict=True) if nbytes}
        self._nbytes.update({_group(key): nbytes for key, nbytes in new.items()})
        if new:
            self._notify_keys_stored(list(new), list(new.values()))

    def _end_look_up(self, task: L2TaskId, report: Report) -> None:
        self._note(task, report)
        self._lookup_signal.notify()

    def _end_load(self, task: L2TaskId, keys: Sequence[ObjectKey], report: Report) -> None:
        self._note(task, report)
        self._load_signal.notify()
        loaded = [key for key, ok in zip(keys, report.succeeded, strict=True) if ok]
        if loaded:
            self._notify_keys_accessed(loaded)

    def _note(self, task: L2TaskId, report: Report) -> None:
        bitmap = Bitmap(len(report.moved))
        bitmap.batched_set([index for index, ok in enumerate(report.succeeded) if ok])
        with self._lock:
            self._bitmaps[task] = bitmap


def _group(key: ObjectKey) -> tuple[str, int, int]:
    """Return what objects of one size have in common."""
    return key.model_name, key.kv_rank, key.object_group_id


def _form(place: MemoryObj) -> bytes:
    """Return the form of an object: its shapes and dtypes."""
    shapes = [tuple(shape) for shape in place.get_shapes()]
    return f"{shapes} {place.get_dtypes()}".encode()
