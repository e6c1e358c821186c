"""A store as the storage of SGLang's HiCache, made by its factory and called as its controllers do.

This needs the wheel of SGLang without its dependencies and a few packages, and no GPU: `nox -s
engines` puts them there.
"""

import importlib
import threading
import time

import numpy as np
import pytest

from kvcache.stores import MemoryStore

from ...stores.servers import RunningServer, running
from ...stores.trouble import LIES, Hanging, Lying, coded
from .packages import imported_or_skipped
from .signatures import abstract_calls, moved

pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("ignore")]
PAGE_TOKENS, LAYERS, WIDTH, PAGES = 4, 2, 8, 32
PAGE_NBYTES = 2 * LAYERS * PAGE_TOKENS * WIDTH * 2


@pytest.fixture(scope="module")
def sglang():
    name = "sglang.srt.mem_cache.storage.backend_factory"
    imported_or_skipped(lambda: importlib.import_module(name), name)
    from sglang.srt.mem_cache import hicache_storage
    from sglang.srt.mem_cache.storage import backend_factory

    hicache_storage.create_backend = backend_factory.StorageBackendFactory.create_backend
    return hicache_storage


class HostPool:
    """Pages in host memory, with the calls of SGLang's pools that storages use."""

    page_size = PAGE_TOKENS

    def __init__(self, layout="layer_first", dtype="bfloat16", page_tokens=PAGE_TOKENS):
        import torch

        self.layout, self.dtype = layout, getattr(torch, dtype)
        self.page_size = page_tokens
        shape = (2, LAYERS, PAGES * page_tokens, WIDTH)
        self.kv_buffer = torch.zeros(shape, dtype=self.dtype)
        self.made, self.threads = 0, set()

    def get_data_page(self, index, flat=True):
        page = self.kv_buffer[:, :, index : index + self.page_size]
        return page.flatten() if flat else page

    def get_dummy_flat_data_page(self):
        self.made += 1  # pinned memory, on a GPU
        return self.get_data_page(0).clone().zero_()

    def set_from_flat_data_page(self, index, data_page):
        self.threads.add(threading.get_ident())
        page = self.kv_buffer[:, :, index : index + self.page_size]
        page.copy_(data_page.reshape(page.shape))

    def fill(self, page, number):
        import torch

        data = torch.from_numpy(coded(number, self.nbytes)).view(self.dtype)
        self.set_from_flat_data_page(page * self.page_size, data)

    def is_right(self, page, number):
        import torch

        data = self.get_data_page(page * self.page_size).view(torch.uint8).numpy()
        return np.array_equal(data, coded(number, self.nbytes))

    def is_blank(self, page):
        return not self.get_data_page(page * self.page_size).any()

    @property
    def nbytes(self):
        return PAGE_NBYTES * self.page_size // PAGE_TOKENS


def indices(pages, page_tokens=PAGE_TOKENS):
    import torch

    return torch.cat([torch.arange(page * page_tokens, (page + 1) * page_tokens) for page in pages])


def config_of(sglang, **options):
    extra = {
        "backend_name": "kvcache",
        "module_path": "kvcache.adapters.sglang",
        "class_name": "KVCacheStorage",
        "interface_v1": 1,
        "timeout": 20,
        "lookup_timeout": 20,
    }
    run = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": False,
        "model_name": "org/model",
    }
    run |= {name: options.pop(name) for name in list(options) if name in run}
    return sglang.HiCacheStorageConfig(**run, extra_config=extra | options)


@pytest.fixture
def make_storage(sglang):
    """Storages made by SGLang's factory of its extra config, closed behind the test."""
    made = []

    def make_storage(url, pool=None, **options):
        pool = pool or HostPool()
        config = config_of(sglang, url=url, **options)
        storage = sglang.create_backend("dynamic", config, pool)
        storage.register_mem_pool_host(pool)
        storage.on_host_pools_registered()
        made.append((storage, url))
        return storage, pool

    yield make_storage
    for storage, url in made:
        if isinstance(url, Hanging):
            url.go_on.set()
        storage.close()


def names(numbers):
    return [f"page{number:04}" for number in numbers]


def put(storage, pool, numbers):
    for page, number in enumerate(numbers):
        pool.fill(page, number)
    return storage.batch_set_v1(names(numbers), indices(range(len(numbers))))


def get(storage, pool, numbers):
    pool.kv_buffer.zero_()
    return storage.batch_get_v1(names(numbers), indices(range(len(numbers))))


def test_the_protocol_is_the_one_that_the_storage_was_written_for(sglang):
    assert abstract_calls(sglang.HiCacheStorage) == [
        "batch_get",
        "batch_set",
        "exists",
        "get",
        "set",
    ], "SGLang has other abstract calls of a storage"
    changed = moved(
        sglang.HiCacheStorage,
        {
            "register_mem_pool_host": "mem_pool_host",
            "register_mem_host_pool_v2": "host_pool, host_pool_name",
            "on_host_pools_registered": "",
            "exists": "key",
            "batch_exists": "keys, extra_info=",
            "get": "key, target_location=, target_sizes=",
            "batch_get": "keys, target_locations=, target_sizes=",
            "set": "key, value=, target_location=, target_sizes=",
            "batch_set": "keys, values=, target_locations=, target_sizes=",
            "batch_get_v1": "keys, host_indices, extra_info=",
            "batch_set_v1": "keys, host_indices, extra_info=",
            "batch_exists_v2": "keys, pool_transfers=, extra_info=",
            "batch_get_v2": "transfers, extra_info=",
            "batch_set_v2": "transfers, extra_info=",
            "clear": "",
        },
    )
    fields = {
        sglang.PoolTransfer: "name host_indices device_indices keys hit_policy nodes_to_load "
        "indices_from_pool block_pages group_pages",
        sglang.PoolTransferResult: "kv_hit_pages extra_pool_hit_pages restorable_prefix_pages",
        sglang.HiCacheStorageConfig: "tp_rank tp_size pp_rank pp_size attn_cp_rank attn_cp_size "
        "is_mla_model enable_storage_metrics is_page_first_layout model_name tp_lcm_size "
        "should_split_heads dp_rank extra_config dcp_size dcp_rank logical_page_size",
    }
    for owner, recorded in fields.items():
        if " ".join(owner.__dataclass_fields__) != recorded:
            changed.append(f"{owner.__name__} has the fields {list(owner.__dataclass_fields__)}")
    policies = [policy.value for policy in sglang.PoolHitPolicy]
    if policies != ["all_pages", "trailing_pages", "block_groups"]:
        changed.append(f"policies of pools are {policies}")
    assert not changed, f"SGLang's protocol has moved: {changed}. See kvcache/adapters/sglang.py."


@pytest.mark.parametrize("url", ["memory:", "file://{}", "redis"])
def test_pages_come_back_byte_by_byte(make_storage, tmp_path, url):
    if url == "redis":
        with running(RunningServer, "redis", tmp_path) as server:
            check_round_trip(*make_storage(server.url))
    else:
        check_round_trip(*make_storage(url.format(tmp_path)))


def check_round_trip(storage, pool):
    assert put(storage, pool, range(5)) == [True] * 5
    assert storage.batch_exists(names(range(8))) == 5
    assert storage.exists("page0004")
    assert not storage.exists("page0005")
    assert get(storage, pool, range(5)) == [True] * 5
    assert all(pool.is_right(page, page) for page in range(5))


def test_a_partial_load_leaves_the_other_pages_as_they_were(make_storage):
    storage, pool = make_storage("memory:")
    put(storage, pool, [0, 2])
    assert storage.batch_exists(names([0, 1, 2])) == 1
    assert get(storage, pool, [0, 1, 2, 3]) == [True, False, True, False]
    assert pool.is_right(0, 0)
    assert pool.is_right(2, 2)
    assert pool.is_blank(1)
    assert pool.is_blank(3)


def test_a_call_makes_one_page_and_touches_the_pool_in_its_own_thread_only(make_storage):
    """Callers may hold a lease of the pool, for which all other threads would wait."""
    storage, pool = make_storage("memory:")
    put(storage, pool, range(20))
    pool.made, pool.threads = 0, set()
    assert get(storage, pool, range(20)) == [True] * 20
    assert pool.made == 1
    assert pool.threads == {threading.get_ident()}


def test_other_calls_go_on_while_one_is_pending(make_storage):
    backing = Hanging("get")
    storage, pool = make_storage(backing)
    put(storage, pool, [0])
    answers = []
    thread = threading.Thread(target=lambda: answers.extend(get(storage, pool, [0])))
    thread.start()
    assert backing.hung.wait(20)
    assert storage.batch_exists(names([0, 1])) == 1
    assert storage.batch_set_v1(names([1]), indices([1])) == [True]
    assert pool.is_blank(0)
    assert not answers
    backing.go_on.set()
    thread.join()
    assert answers == [True]
    assert pool.is_right(0, 0)


def test_the_calls_of_single_tensors(make_storage):
    import torch

    storage, pool = make_storage("memory:")
    pages = [pool.get_data_page(0) + number for number in range(3)]
    assert storage.batch_set(names(range(3)), pages)
    assert storage.set("single", pages[1])
    targets = [pool.get_dummy_flat_data_page() for _ in range(4)]
    found = storage.batch_get(names(range(4)), targets)
    assert found[3] is None
    assert all(torch.equal(one, page) for one, page in zip(found, pages, strict=False))
    assert found[0] is targets[0]
    assert torch.equal(storage.get("single", targets[3]), pages[1])
    assert torch.equal(storage.get("single"), pages[1])
    assert storage.get("nothing", targets[3]) is None
    strided = torch.zeros(2 * pages[1].numel(), dtype=pages[1].dtype)[::2]
    assert storage.get("single", strided) is strided
    assert torch.equal(strided, pages[1])
    assert not storage.set("none")


def hybrid(sglang, make_storage):
    """A storage with the pages of a hybrid: KV, states of Mamba, and an indexer."""
    storage, pool = make_storage("memory:")
    pools = {
        sglang.PoolName.MAMBA: HostPool(page_tokens=1),
        sglang.PoolName.INDEXER: HostPool(dtype="float16"),
    }
    for name, other in pools.items():
        storage.register_mem_host_pool_v2(other, name)
    put(storage, pool, range(6))
    return storage, pools


def transfer(sglang, name, pool, numbers, policy="ALL_PAGES"):
    return sglang.PoolTransfer(
        name=name,
        keys=names(numbers),
        host_indices=indices(range(len(numbers)), pool.page_size),
        hit_policy=sglang.PoolHitPolicy[policy],
    )


def put_into(sglang, storage, pools, name, numbers):
    for page, number in enumerate(numbers):
        pools[name].fill(page, 100 + number)
    one = transfer(sglang, name, pools[name], numbers)
    assert storage.batch_set_v2([one]) == {name: [True] * len(numbers)}


def test_pools_of_a_hybrid_are_apart_and_exact(sglang, make_storage):
    storage, pools = hybrid(sglang, make_storage)
    mamba, indexer = pools
    put_into(sglang, storage, pools, mamba, [3, 5])
    put_into(sglang, storage, pools, indexer, range(4))
    for pool in pools.values():
        pool.kv_buffer.zero_()
    answers = storage.batch_get_v2(
        [
            transfer(sglang, mamba, pools[mamba], [3, 4, 5]),
            transfer(sglang, indexer, pools[indexer], [0, 3]),
        ]
    )
    assert answers == {mamba: [True, False, True], indexer: [True, True]}
    assert pools[mamba].is_right(0, 103)
    assert pools[mamba].is_blank(1)
    assert pools[mamba].is_right(2, 105)
    assert pools[indexer].is_right(1, 103)


def test_hits_of_a_hybrid_follow_the_policies_as_in_the_file_storage(
    sglang, make_storage, tmp_path
):
    """Every set of stored pages and every policy: the answer is that of SGLang's own storage."""
    random = np.random.default_rng(0)
    file_config = config_of(sglang, file_storage_path=str(tmp_path))
    mamba, indexer = sglang.PoolName.MAMBA, sglang.PoolName.INDEXER
    for round_ in range(30):
        storage, pool = make_storage("memory:")
        files = sglang.HiCacheFile(file_config)
        files.clear()
        files.register_mem_pool_host(pool)
        pools = {sglang.PoolName.KV: pool, mamba: HostPool(page_tokens=1), indexer: HostPool()}
        for one in (storage, files):
            for name, host_pool in pools.items():
                one.register_mem_host_pool_v2(host_pool, name)
        for name, host_pool in pools.items():
            numbers = np.flatnonzero(random.random(8) < 0.8).tolist()
            if numbers:
                for one in (storage, files):
                    one.batch_set_v2([transfer(sglang, name, host_pool, numbers)])
        asked = [
            transfer(sglang, mamba, pools[mamba], range(1 + round_ % 3), "TRAILING_PAGES"),
            transfer(sglang, indexer, pools[indexer], range(8), "ALL_PAGES"),
        ][: round_ % 3 or 2]
        keys = names(range(8))
        assert storage.batch_exists_v2(keys, asked) == files.batch_exists_v2(keys, asked)
        assert storage.batch_exists(keys) == files.batch_exists(keys)


def test_a_pool_of_block_groups_has_no_verdict(sglang, make_storage):
    storage, pools = hybrid(sglang, make_storage)
    [mamba, _] = pools
    one = transfer(sglang, mamba, pools[mamba], range(6), "BLOCK_GROUPS")
    result = storage.batch_exists_v2(names(range(6)), [one])
    assert result.kv_hit_pages == 6
    assert result.extra_pool_hit_pages == {sglang.PoolName.KV: 6}


def test_indices_that_do_not_fit_and_pools_that_nobody_registered_are_misses(sglang, make_storage):
    storage, pools = hybrid(sglang, make_storage)
    assert storage.batch_get_v1(names(range(3)), indices(range(2))) == [False] * 3
    swa = sglang.PoolName.SWA
    one = transfer(sglang, swa, pools[sglang.PoolName.MAMBA], range(2))
    assert storage.batch_get_v2([one]) == {swa: [False, False]}
    assert storage.batch_set_v2([one]) == {swa: [False, False]}
    assert storage.batch_exists_v2(names(range(6)), [one]).kv_hit_pages == 0


@pytest.mark.parametrize("lie", LIES)
def test_a_store_that_lies_gives_misses(make_storage, lie):
    backing = Lying(lambda outcomes: outcomes)
    storage, pool = make_storage(backing)
    put(storage, pool, [0, 1])
    backing.lie = lie
    assert get(storage, pool, [0, 1]) == [False, False]
    assert pool.is_blank(0)
    assert pool.is_blank(1)


def test_a_server_that_is_killed_gives_misses(make_storage, tmp_path):
    with running(RunningServer, "redis", tmp_path) as server:
        storage, pool = make_storage(server.url, timeout=5, lookup_timeout=5)
        assert put(storage, pool, [0]) == [True]
        server.kill()
        assert get(storage, pool, [0]) == [False]
        assert pool.is_blank(0)
        assert storage.batch_exists(names([0])) == 0
        assert put(storage, pool, [1]) == [False]


def test_calls_return_at_their_deadline_when_a_store_hangs(make_storage):
    backing = Hanging("get", "put", "contains")
    storage, pool = make_storage(backing, timeout=0.1, lookup_timeout=0.1)
    began = time.monotonic()
    assert put(storage, pool, [0]) == [False]
    assert get(storage, pool, [0]) == [False]
    assert storage.batch_exists(names([0])) == 0
    assert time.monotonic() - began < 10  # each would hang for 20 s
    backing.go_on.set()
    storage.close()
    assert pool.is_blank(0)


def test_closing_in_the_middle_ends_every_call_as_a_miss(make_storage):
    backing = Hanging("get")
    storage, pool = make_storage(backing)
    put(storage, pool, [0])
    answers = []
    thread = threading.Thread(target=lambda: answers.extend(get(storage, pool, [0])))
    thread.start()
    assert backing.hung.wait(20)
    storage.close()
    thread.join()
    assert answers == [False]
    assert pool.is_blank(0)


@pytest.mark.parametrize(
    "other",
    [
        {"model_name": "org/other"},
        {"tp_size": 2},
        {"tp_rank": 1, "tp_size": 2},
        {"pp_size": 2},
        {"attn_cp_size": 2},
        {"is_page_first_layout": True},
        {"is_mla_model": True},
        {"namespace": "tuned"},
    ],
)
def test_two_models_never_meet(make_storage, tmp_path, other):
    url = f"file://{tmp_path}"
    put(*make_storage(url), [0])
    assert make_storage(url)[0].exists("page0000")
    assert not make_storage(url, **other)[0].exists("page0000")


@pytest.mark.parametrize("other", [{"layout": "page_first"}, {"dtype": "float16"}])
def test_two_forms_of_pages_never_meet(make_storage, tmp_path, other):
    url = f"file://{tmp_path}"
    put(*make_storage(url), [0])
    assert not make_storage(url, pool=HostPool(**other))[0].exists("page0000")


def test_ranks_share_the_latent_pages_of_mla_and_not_its_states(sglang, make_storage):
    backing = MemoryStore()
    mamba = sglang.PoolName.MAMBA
    ranks = [make_storage(backing, is_mla_model=True, tp_rank=rank, tp_size=2) for rank in range(2)]
    pool = HostPool(page_tokens=1)
    for storage, _ in ranks:
        storage.register_mem_host_pool_v2(pool, mamba)
    put(*ranks[0], [0])
    put_into(sglang, ranks[0][0], {mamba: pool}, mamba, [0])
    assert ranks[1][0].exists("page0000")
    one = transfer(sglang, mamba, pool, [0], "TRAILING_PAGES")
    assert ranks[0][0].batch_exists_v2(names([0]), [one]).kv_hit_pages == 1
    assert ranks[1][0].batch_exists_v2(names([0]), [one]).kv_hit_pages == 0


def test_a_config_without_a_url(sglang):
    with pytest.raises(ValueError, match="url of a store"):
        sglang.create_backend("dynamic", config_of(sglang), HostPool())


class Load:
    """Calls of eight threads, for single tensors and for pages of one pool."""

    def __init__(self, storage, pool, seconds):
        self.storage, self.pool, self.end = storage, pool, time.monotonic() + seconds
        self.calls, self.wrong = [], []

    def work(self, thread):
        random = np.random.default_rng(thread)
        pages = range(4 * thread, 4 * thread + 4)
        calls = [self.set_tensor, self.get_tensor, self.put_pages, self.get_pages]
        while time.monotonic() < self.end:
            calls[random.integers(4)](random.integers(0, 200, 4).tolist(), pages)
            self.calls.append(thread)

    def set_tensor(self, numbers, pages):
        import torch

        self.storage.set(f"{numbers[0]}", torch.from_numpy(coded(numbers[0], PAGE_NBYTES)))

    def get_tensor(self, numbers, pages):
        import torch

        wanted = torch.from_numpy(coded(numbers[0], PAGE_NBYTES))
        found = self.storage.get(f"{numbers[0]}", torch.zeros_like(wanted))
        if found is not None and not torch.equal(found, wanted):
            self.wrong.append(numbers)

    def put_pages(self, numbers, pages):
        self._fill(numbers, pages)
        self.storage.batch_set_v1(names(numbers), indices(pages))

    def get_pages(self, numbers, pages):
        before = [1000, 1001, 1002, 1003]
        self._fill(before, pages)
        loaded = self.storage.batch_get_v1(names(numbers), indices(pages))
        for page, number, other, is_loaded in zip(pages, numbers, before, loaded, strict=True):
            if not self.pool.is_right(page, number if is_loaded else other):
                self.wrong.append(numbers)

    def _fill(self, numbers, pages):
        for page, number in zip(pages, numbers, strict=True):
            self.pool.fill(page, number)


@pytest.mark.parametrize("seconds", [1, pytest.param(60, marks=pytest.mark.slow)])
def test_calls_of_eight_threads_are_exact(make_storage, seconds):
    run = Load(*make_storage(MemoryStore(budget=100 * PAGE_NBYTES), threads=4), seconds)
    threads = [threading.Thread(target=run.work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not run.wrong
    assert len(run.calls) > 100
