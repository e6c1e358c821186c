"""A store of kvcache as the storage of SGLang's HiCache: Redis, a directory, any URL.

Two options are all that SGLang needs; the guide is ``docs/sglang.md``::

    --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{"backend_name": "kvcache",
        "module_path": "kvcache.adapters.sglang", "class_name": "KVCacheStorage",
        "interface_v1": 1, "url": "redis://127.0.0.1:6379"}'
"""

from __future__ import annotations

import ctypes
import logging
import queue
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from kvcache.errors import BackendNotAvailableError
from kvcache.stores import open_store
from kvcache.stores.jobs import Jobs
from kvcache.stores.named import NamedKeys
from kvcache.stores.transfers import Place, Report, Sink

try:
    import torch
    from sglang.srt.mem_cache.hicache_storage import (
        HiCacheStorage,
        HiCacheStorageConfig,
        HiCacheStorageExtraInfo,
        PoolHitPolicy,
        PoolName,
        PoolTransfer,
        PoolTransferResult,
    )
except ImportError as error:
    raise BackendNotAvailableError(
        f"this needs sglang 0.5.23 with its HiCache, which is missing or another ({error}). "
        "Try: pip install 'sglang>=0.5.23'"
    ) from error

if TYPE_CHECKING:
    from sglang.srt.mem_cache.pool_host import HostKVCache

_logger = logging.getLogger("kvcache.adapters")
_KV = str(PoolName.KV)
_OPTIONS = ("threads", "timeout", "lookup_timeout")

_JOBS, _JOB_NBYTES = 2, 1 << 23
"""Jobs of one call at a time, and bytes of each."""

_Arrivals: TypeAlias = "queue.SimpleQueue[tuple[int, memoryview] | None]"
"""Pages by their number in a call, as they come; None behind the last of a job."""


class KVCacheStorage(HiCacheStorage):
    """Pages of all pools in a store.

    Calls wait for the store, in the threads that SGLang has for that, until their timeout at most:
    what has not come by then is not there. Pages are verified by a checksum when they are read, and
    copied into the pool of the host by the thread that asked, one after the other as they come.

    storage_config: of SGLang. Its extra_config has `url`, and may have `options`, both of
    ``kvcache.stores.open_store``; `namespace`, which tells apart what SGLang does not, such as
    weights under one name; and `threads`, `timeout` and `lookup_timeout` of
    ``kvcache.stores.jobs.Jobs``.

    Raises: StoreError, TypeError, ValueError for a store that cannot be opened.
    """

    def __init__(
        self, storage_config: HiCacheStorageConfig, kwargs: Mapping[str, object] | None = None
    ) -> None:
        extra = storage_config.extra_config or {}
        if "url" not in extra:
            raise ValueError(
                f"the extra config has the url of a store, such as redis://host:6379; got {extra}."
            )
        self._config = storage_config
        self._namespace = str(extra.get("namespace", ""))
        self._names: dict[str, NamedKeys] = {_KV: self._names_of(_KV, None)}
        self._pools: dict[str, HostKVCache] = {}
        store = open_store(extra["url"], **extra.get("options", {}))
        self._jobs = Jobs(store, **{name: extra[name] for name in _OPTIONS if name in extra})

    def register_mem_pool_host(self, mem_pool_host: HostKVCache) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._register(_KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: HostKVCache, host_pool_name: PoolName) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._register(str(host_pool_name), host_pool)

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        return _leading(self._found(_KV, keys))

    def get(
        self, key: str, target_location: torch.Tensor | None = None, target_sizes: object = None
    ) -> torch.Tensor | None:
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self,
        keys: list[str],
        target_locations: Sequence[torch.Tensor | None] | None = None,
        target_sizes: object = None,
    ) -> list[torch.Tensor | None]:
        if target_locations is None and _KV not in self._pools:
            return [None] * len(keys)
        targets = target_locations or [None] * len(keys)
        pages = [self._fresh_page(_KV) if page is None else page for page in targets]
        # Bytes of a page that is not contiguous are those of a copy.
        flat = [page.contiguous() for page in pages]
        loaded = self._load(_KV, keys, flat)
        for page, copy, is_loaded in zip(pages, flat, loaded, strict=True):
            if is_loaded and copy is not page:
                page.copy_(copy)
        return [page if is_loaded else None for page, is_loaded in zip(pages, loaded, strict=True)]

    def set(
        self,
        key: str,
        value: torch.Tensor | None = None,
        target_location: object = None,
        target_sizes: object = None,
    ) -> bool:
        return self.batch_set([key], [value])

    def batch_set(
        self,
        keys: list[str],
        values: Sequence[torch.Tensor | None] | None = None,
        target_locations: object = None,
        target_sizes: object = None,
    ) -> bool:
        pages = [value for value in values or () if value is not None]
        return len(pages) == len(keys) and all(self._put(_KV, keys, pages))

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        return self._load_pages(_KV, keys, host_indices)

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        return self._put_pages(_KV, keys, host_indices)

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        kv_pages = _leading(self._found(_KV, keys))
        hits = {PoolName.KV: kv_pages} if kv_pages else {}
        restorable = set(range(1, kv_pages + 1))
        for transfer in pool_transfers or []:
            if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS or not restorable:
                continue  # it never shortens the prefix, and a pool may go without a verdict
            found = self._found(str(transfer.name), keys[:kv_pages])
            lengths = _lengths(found, transfer)
            if lengths:
                hits[transfer.name] = max(lengths)
            restorable &= lengths
        return PoolTransferResult(max(restorable, default=0), hits, sorted(restorable))

    def batch_get_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        return {
            one.name: self._load_pages(str(one.name), one.keys or [], one.host_indices)
            for one in transfers
        }

    def batch_set_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        return {
            one.name: self._put_pages(str(one.name), one.keys or [], one.host_indices)
            for one in transfers
        }

    def close(self) -> None:
        self._jobs.close()

    def _register(self, name: str, pool: HostKVCache) -> None:
        self._pools[name] = pool
        self._names[name] = self._names_of(name, pool)

    def _names_of(self, name: str, pool: HostKVCache | None) -> NamedKeys:
        return NamedKeys(
            {
                "engine": "sglang",
                "namespace": self._namespace,
                "pool": name,
                "kind": type(pool).__name__,
                "dtype": str(getattr(pool, "dtype", None)),
                "layout": str(getattr(pool, "layout", None)),
                "page_tokens": getattr(pool, "page_size", None),
                **_run_of(self._config, is_mamba=name == str(PoolName.MAMBA)),
            }
        )

    def _found(self, name: str, keys: Sequence[str]) -> tuple[bool, ...]:
        return self._jobs.look_up(self._keys(name, keys)).wait().succeeded

    def _load(
        self, name: str, keys: Sequence[str], pages: Sequence[torch.Tensor]
    ) -> tuple[bool, ...]:
        return self._jobs.load(self._places(name, keys, pages)).wait().succeeded

    def _put(
        self, name: str, keys: Sequence[str], pages: Sequence[torch.Tensor]
    ) -> tuple[bool, ...]:
        return self._jobs.put(self._places(name, keys, pages)).wait().succeeded

    def _places(self, name: str, keys: Sequence[str], pages: Sequence[torch.Tensor]) -> list[Place]:
        buffers = (page.view(torch.uint8).numpy().data for page in pages)
        return list(map(Place, self._keys(name, keys), buffers))

    def _keys(self, name: str, keys: Sequence[str]) -> list[bytes]:
        names = self._names.get(name) or self._names_of(name, None)
        return [names.key(key.encode()) for key in keys]

    def _load_pages(
        self, name: str, keys: Sequence[str], indices: torch.Tensor | None
    ) -> list[bool]:
        firsts = self._first_indices(name, keys, indices)
        loaded = [False] * len(keys)
        if not firsts:
            return loaded
        pool = self._pools[name]
        form = self._fresh_page(name)
        for number, content in self._arriving(name, keys, form.nbytes):
            page = _as_tensor(content, form.dtype) if content.nbytes else form
            # In this thread, which may hold locks of SGLang's that others would wait for.
            pool.set_from_flat_data_page(firsts[number], page)
            loaded[number] = True
        return loaded

    def _arriving(
        self, name: str, keys: Sequence[str], nbytes: int
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield pages with their numbers as they come, until all have or the time is over.

        A few jobs at a time: pages that wait are memory that cannot be used again.
        """
        arrivals: _Arrivals = queue.SimpleQueue()
        sinks = (Sink(nbytes, partial(_arrive, arrivals, number)) for number in range(len(keys)))
        places = list(map(Place, self._keys(name, keys), sinks))
        step = max(1, _JOB_NBYTES // max(1, nbytes))
        waiting = deque(places[start : start + step] for start in range(0, len(places), step))
        running, deadline = 0, self._jobs.deadline()
        while waiting or running:
            while waiting and running < _JOBS:
                self._jobs.load(waiting.popleft(), partial(_finish, arrivals), deadline)
                running += 1
            arrival = arrivals.get()
            if arrival is not None:
                yield arrival
            else:
                running -= 1

    def _put_pages(
        self, name: str, keys: Sequence[str], indices: torch.Tensor | None
    ) -> list[bool]:
        firsts = self._first_indices(name, keys, indices)
        pages = [self._pools[name].get_data_page(first, flat=True) for first in firsts]
        put = self._put(name, keys[: len(firsts)], [page.contiguous() for page in pages])
        return list(put) or [False] * len(keys)

    def _first_indices(
        self, name: str, keys: Sequence[str], indices: torch.Tensor | None
    ) -> list[int]:
        """Return the index of the first token of each page in a pool; none if they do not fit."""
        size = getattr(self._pools.get(name), "page_size", 1) or 1
        if name not in self._pools or indices is None or indices.numel() != len(keys) * size:
            _logger.error("%s: %d pages and their indices do not fit its pool", name, len(keys))
            return []
        return [int(index) for index in indices[::size]]

    def _fresh_page(self, name: str) -> torch.Tensor:
        page: torch.Tensor = self._pools[name].get_dummy_flat_data_page()
        return page


def _as_tensor(content: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor over read-only memory, to be read only and as long as there is `content`."""
    # By its address: torch warns of memory that it may not write to, and a copy takes as long as
    # the one into the pool.
    address = np.frombuffer(content, np.uint8).ctypes.data
    return torch.frombuffer((ctypes.c_ubyte * content.nbytes).from_address(address), dtype=dtype)


def _arrive(arrivals: _Arrivals, number: int, content: memoryview) -> None:
    arrivals.put((number, content))


def _finish(arrivals: _Arrivals, _: Report) -> None:
    arrivals.put(None)


def _leading(found: Sequence[bool]) -> int:
    """Return how many there are before the first that is missing."""
    return len(list(takewhile(bool, found)))


def _lengths(found: Sequence[bool], transfer: PoolTransfer) -> set[int]:
    """Return the lengths of a prefix, in pages, for which a pool has what it needs."""
    if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
        return set(range(1, _leading(found) + 1))
    if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
        last = max(1, len(transfer.keys or ()))
        lengths = range(1, len(found) + 1)
        return {length for length in lengths if all(found[max(0, length - last) : length])}
    raise ValueError(f"policies of pools are those of sglang 0.5.23; got {transfer.hit_policy}.")


def _run_of(config: HiCacheStorageConfig, *, is_mamba: bool) -> dict[str, object]:
    """Return what tells the pages of a rank from those of all others.

    The KV of MLA is the same in all ranks of tensor parallelism, which share its pages.
    """
    shared = config.is_mla_model and not is_mamba
    run = {
        "model": config.model_name,
        "is_mla": config.is_mla_model,
        "is_page_first": config.is_page_first_layout,
        "tp": None if shared else [config.tp_rank, config.tp_size],
        "pp": [config.pp_rank, config.pp_size],
        "cp": [config.attn_cp_rank, config.attn_cp_size],
    }
    if config.dcp_size > 1:
        run["dcp"] = [config.tp_size, config.dcp_rank, config.dcp_size, config.logical_page_size]
    return run
