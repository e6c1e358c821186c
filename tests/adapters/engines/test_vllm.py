"""A store as a tier of vLLM, driven by vLLM's own manager of tiers and through its abstract class.

This needs vLLM's sources and a few packages, and no GPU: `nox -s engines` puts them there.
"""

import hashlib
import threading
import time
import uuid

import numpy as np
import pytest

from kvcache.stores import MemoryStore

from ...stores.servers import RunningServer, running, wait_for
from ...stores.trouble import LIES, Hanging, Lying, coded, flipped, raising
from .packages import import_tiers, imported_or_skipped
from .signatures import abstract_calls, moved

pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("ignore")]
CHUNK_NBYTES = 4096
CHUNKS = 16


@pytest.fixture(scope="module")
def vllm():
    """The modules of vLLM that tiers are about."""
    imported_or_skipped(import_tiers, "vLLM's tiers")
    from vllm.v1.kv_offload import base, config
    from vllm.v1.kv_offload.cpu import shared_offload_region
    from vllm.v1.kv_offload.tiering import base as tiering
    from vllm.v1.kv_offload.tiering import factory, manager

    class Modules:
        pass

    modules = Modules()
    for module in (base, config, shared_offload_region, tiering, factory, manager):
        vars(modules).update({k: v for k, v in vars(module).items() if not k.startswith("_")})
    return modules


def spec_of(vllm, model="org/model", dtype="bfloat16", tp_size=1, tokens=16, events=False):
    """A real specification, as vLLM's connector makes it of its configuration."""

    class Spec(vllm.OffloadingSpec):
        def get_manager(self):
            raise NotImplementedError

        def get_worker(self, kv_caches):
            raise NotImplementedError

    groups = tuple(vllm.OffloadingGroupConfig(tokens, (f"layer.{g}",), g) for g in range(2))
    parallel = vllm.OffloadingParallelConfig(
        rank=0,
        world_size=tp_size,
        tp_size=tp_size,
        pp_size=1,
        pcp_size=1,
        dcp_size=1,
        data_parallel_index=0,
        data_parallel_size=1,
        data_parallel_rank_local=None,
        is_parallelism_agnostic=False,
    )
    return Spec(
        vllm.OffloadingConfig(
            groups=groups,
            worker_kv_bytes_per_block=CHUNK_NBYTES // tp_size,
            enable_kv_cache_events=events,
            extra_config={},
            engine_id="test",
            model=vllm.OffloadingModelConfig(model, dtype),
            cache=vllm.OffloadingCacheConfig(tokens_per_hash=tokens, blocks_per_chunk=1),
            parallel=parallel,
        )
    )


@pytest.fixture
def make_tier(vllm):
    """Tiers made by vLLM's factory of a line of configuration, shut down behind the test."""
    tiers = []

    def make_tier(store, view=None, spec=None, **options):
        view = memoryview(np.zeros((CHUNKS, CHUNK_NBYTES), np.int8)) if view is None else view
        config = {"type": "KVCacheTier", "module_path": "kvcache.adapters.vllm", "url": store}
        tier = vllm.SecondaryTierFactory.create_secondary_tier(
            {"timeout": 20, "lookup_timeout": 20, **config, **options}, view, spec or spec_of(vllm)
        )
        tier.view = view
        tiers.append((tier, store))
        return tier

    yield make_tier
    for tier, store in tiers:
        if isinstance(store, Hanging):
            store.go_on.set()
        if tier.view is not None:
            tier.shutdown()


def key_of(vllm, number, group=0):
    digest = hashlib.sha256(str(number).encode()).digest()
    return vllm.make_offload_key(digest, group)


def job_of(vllm, job_id, keys, chunks, *, is_promotion):
    return vllm.TransferJob(
        job_id=job_id,
        keys=keys,
        chunk_ids=np.array(chunks, np.int32),
        is_promotion=is_promotion,
        req_context=vllm.ReqContext(req_id="request"),
    )


def fill(view, chunk, number):
    np.asarray(view)[chunk] = coded(number, CHUNK_NBYTES).view(np.int8)


def is_right(view, chunk, number):
    return np.array_equal(np.asarray(view)[chunk], coded(number, CHUNK_NBYTES).view(np.int8))


def results_of(tier, count):
    """The results of so many jobs, polled as a scheduler does."""
    results = []
    wait_for(lambda: results.extend(tier.get_finished_jobs()) or len(results) >= count, "results")
    return {result.job_id: result for result in results}


def look_up(vllm, tier, keys):
    """The answers of a tier after as many steps as it needs."""
    context = vllm.ReqContext(req_id=uuid.uuid4().hex)
    tier.on_new_request(context)
    answers = []

    def step():
        answers[:] = [tier.lookup(key, context) for key in keys]
        tier.on_schedule_end(None)
        return vllm.LookupResult.RETRY not in answers

    wait_for(step, "answers")
    tier.on_request_finished(context)
    return [answer is vllm.LookupResult.HIT for answer in answers]


def store(vllm, tier, numbers, group=0):
    for chunk, number in enumerate(numbers):
        fill(tier.view, chunk, number)
    keys = [key_of(vllm, number, group) for number in numbers]
    tier.submit_store(job_of(vllm, 1, keys, range(len(keys)), is_promotion=False))
    return results_of(tier, 1)[1]


def load(vllm, tier, numbers, group=0):
    np.asarray(tier.view)[:] = 0x5A
    keys = [key_of(vllm, number, group) for number in numbers]
    tier.submit_load(job_of(vllm, 2, keys, range(len(keys)), is_promotion=True))
    return results_of(tier, 1)[2]


def untouched(tier, chunk):
    return bool((np.asarray(tier.view)[chunk] == 0x5A).all())


def test_the_protocol_is_the_one_that_the_tier_was_written_for(vllm):
    assert abstract_calls(vllm.SecondaryTierManager) == [
        "drain_jobs",
        "get_finished_jobs",
        "lookup",
        "on_new_request",
        "submit_load",
        "submit_store",
    ], "vLLM has other abstract calls of a tier"
    changed = moved(
        vllm.SecondaryTierManager,
        {
            "__init__": "offloading_spec, primary_kv_view, tier_type, backpressure_detector=",
            "lookup": "key, req_context",
            "submit_store": "job_metadata",
            "submit_load": "job_metadata",
            "get_finished_jobs": "",
            "on_new_request": "req_context",
            "on_request_finished": "req_context",
            "on_schedule_end": "context",
            "drain_jobs": "",
            "shutdown": "",
        },
    )
    from vllm.v1.kv_offload.file_mapper import FileMapper
    from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager

    changed += moved(
        AsyncLookupManager,
        {
            "__init__": "tier_type",
            "batch_lookup": "keys, req_context",
            "lookup": "key, req_context",
            "flush": "",
            "mark_miss": "keys",
            "cleanup": "req_id",
            "shutdown": "",
        },
    )
    changed += moved(
        FileMapper,
        {
            "from_offloading_spec": "root_dir, offloading_spec, blocks_per_file=, "
            "parallel_agnostic=",
            "get_run_config": "",
        },
    )
    fields = {
        vllm.TransferJob: "job_id keys chunk_ids is_promotion req_context submit_time",
        vllm.JobResult: "job_id success successful_keys transfer_time transfer_bytes",
    }
    for owner, names in fields.items():
        if " ".join(owner.__dataclass_fields__) != names:
            changed.append(f"{owner.__name__} has the fields {list(owner.__dataclass_fields__)}")
    assert not changed, f"vLLM's protocol has moved: {changed}. See kvcache/adapters/vllm.py."


@pytest.mark.parametrize("url", ["memory:", "file://{}", "redis"])
def test_chunks_come_back_byte_by_byte(vllm, make_tier, tmp_path, url):
    if url == "redis":
        with running(RunningServer, "redis", tmp_path) as server:
            check_round_trip(vllm, make_tier(server.url))
    else:
        check_round_trip(vllm, make_tier(url.format(tmp_path)))


def check_round_trip(vllm, tier):
    result = store(vllm, tier, range(5))
    assert result.success
    assert result.transfer_bytes == 5 * CHUNK_NBYTES
    assert look_up(vllm, tier, [key_of(vllm, number) for number in range(6)]) == [True] * 5 + [
        False
    ]
    result = load(vllm, tier, range(5))
    assert result.success
    assert result.transfer_bytes == 5 * CHUNK_NBYTES
    assert result.transfer_time > 0
    assert all(is_right(tier.view, chunk, chunk) for chunk in range(5))


def test_groups_of_a_hybrid_are_apart(vllm, make_tier):
    tier = make_tier("memory:")
    store(vllm, tier, [1, 2], group=0)
    store(vllm, tier, [2], group=1)
    keys = [key_of(vllm, number, group) for group in range(2) for number in (1, 2)]
    assert look_up(vllm, tier, keys) == [True, True, False, True]
    assert not load(vllm, tier, [1], group=1).success
    assert load(vllm, tier, [2], group=1).success
    assert is_right(tier.view, 0, 2)


def test_a_partial_load_keeps_what_came(vllm, make_tier):
    tier = make_tier("memory:")
    store(vllm, tier, [0, 2])
    result = load(vllm, tier, [0, 1, 2, 3])
    assert not result.success
    assert result.successful_keys == (key_of(vllm, 0), key_of(vllm, 2))
    assert is_right(tier.view, 0, 0)
    assert is_right(tier.view, 2, 2)
    assert untouched(tier, 1)
    assert untouched(tier, 3)


def test_a_failed_load_is_a_miss_of_the_request_that_found_it(vllm, make_tier):
    backing = Lying(lambda outcomes: outcomes)
    tier = make_tier(backing)
    store(vllm, tier, [0])
    context = vllm.ReqContext(req_id="one")
    tier.lookup(key_of(vllm, 0), context)
    tier.on_schedule_end(None)
    wait_for(
        lambda: (
            tier.lookup(key_of(vllm, 0), context) is vllm.LookupResult.HIT
            or tier.on_schedule_end(None)
        ),
        "the hit",
    )
    backing.lie = raising
    assert not load(vllm, tier, [0]).success
    assert tier.lookup(key_of(vllm, 0), context) is vllm.LookupResult.MISS


@pytest.mark.parametrize("lie", LIES)
def test_a_store_that_lies_gives_misses(vllm, make_tier, lie):
    backing = Lying(lambda outcomes: outcomes)
    tier = make_tier(backing)
    store(vllm, tier, [0, 1])
    backing.lie = lie
    result = load(vllm, tier, [0, 1])
    assert not result.success
    assert result.successful_keys is None
    assert untouched(tier, 0)
    assert untouched(tier, 1)


def test_a_server_that_is_killed_gives_misses(vllm, make_tier, tmp_path):
    with running(RunningServer, "redis", tmp_path) as server:
        tier = make_tier(server.url, timeout=5, lookup_timeout=5)
        assert store(vllm, tier, [0]).success
        server.kill()
        assert not load(vllm, tier, [0]).success
        assert untouched(tier, 0)
        assert look_up(vllm, tier, [key_of(vllm, 0)]) == [False]
        assert not store(vllm, tier, [1]).success


def test_no_call_of_a_step_waits_for_a_store_that_hangs(vllm, make_tier):
    backing = Hanging("get", "put", "contains")
    tier = make_tier(backing, timeout=1, lookup_timeout=1)
    context, began = vllm.ReqContext(req_id="request"), time.monotonic()
    keys = [key_of(vllm, number) for number in range(4)]
    assert tier.lookup(keys[0], context) is vllm.LookupResult.RETRY
    tier.on_schedule_end(None)
    tier.submit_store(job_of(vllm, 1, keys, range(4), is_promotion=False))
    tier.submit_load(job_of(vllm, 2, keys, range(4), is_promotion=True))
    steps = time.monotonic() - began
    tier.drain_jobs()
    results = {result.job_id: result.success for result in tier.get_finished_jobs()}
    assert results == {1: False, 2: False}
    assert steps < 1  # waiting for the store would take one of its timeouts, or 20 s
    assert look_up(vllm, tier, [keys[1]]) == [False]


def test_a_pending_job_has_no_result_until_the_store_has_answered(vllm, make_tier):
    backing = Hanging("get")
    tier = make_tier(backing)
    assert store(vllm, tier, [0]).success
    np.asarray(tier.view)[:] = 0x5A
    tier.submit_load(job_of(vllm, 2, [key_of(vllm, 0)], [0], is_promotion=True))
    assert backing.hung.wait(20)
    assert list(tier.get_finished_jobs()) == []
    assert untouched(tier, 0)
    assert look_up(vllm, tier, [key_of(vllm, 0)]) == [True]  # others go on
    backing.go_on.set()
    assert results_of(tier, 1)[2].success
    assert is_right(tier.view, 0, 0)


def test_draining_makes_all_results_available(vllm, make_tier):
    tier = make_tier("memory:")
    for job in range(30):
        tier.submit_store(job_of(vllm, job, [key_of(vllm, job)], [job % 4], is_promotion=False))
    tier.drain_jobs()
    assert len(list(tier.get_finished_jobs())) == 30


def test_shutting_down_in_the_middle_reports_every_job(vllm, make_tier):
    backing = Hanging("get", "put", "contains")
    tier = make_tier(backing)
    tier.submit_store(job_of(vllm, 1, [key_of(vllm, 1)], [1], is_promotion=False))
    tier.submit_load(job_of(vllm, 2, [key_of(vllm, 2)], [2], is_promotion=True))
    tier.lookup(key_of(vllm, 3), vllm.ReqContext(req_id="request"))
    tier.on_schedule_end(None)
    assert backing.hung.wait(20)
    tier.shutdown()
    tier.view = None
    results = {result.job_id: result.success for result in tier.get_finished_jobs()}
    assert results == {1: False, 2: False}


@pytest.mark.parametrize(
    "other", [{"model": "org/other"}, {"dtype": "float16"}, {"tp_size": 2}, {"tokens": 32}]
)
def test_two_models_never_meet(vllm, make_tier, tmp_path, other):
    url = f"file://{tmp_path}"
    store(vllm, make_tier(url), [0])
    assert look_up(vllm, make_tier(url), [key_of(vllm, 0)]) == [True]
    assert look_up(vllm, make_tier(url, spec=spec_of(vllm, **other)), [key_of(vllm, 0)]) == [False]
    assert look_up(vllm, make_tier(url, namespace="tuned"), [key_of(vllm, 0)]) == [False]


@pytest.fixture
def manager_of(vllm):
    """vLLM's own manager of tiers, with its real tier of shared host memory."""
    managers = []

    def manager_of(make_tier, backing, chunks=CHUNKS, **options):
        region = vllm.SharedOffloadRegion(
            engine_id=uuid.uuid4().hex,
            num_chunks=chunks,
            rank=None,
            kv_bytes_per_chunk=CHUNK_NBYTES,
            cpu_page_size=CHUNK_NBYTES,
        )
        primary = vllm.CPUPrimaryTierOffloadingManager(chunks, region)
        tier = make_tier(backing, view=primary.get_kv_memoryview(), **options)
        managers.append(vllm.TieringOffloadingManager(primary, [tier]))
        return managers[-1], tier

    yield manager_of
    for manager in managers:
        if manager.secondary_tiers[0].view is not None:
            end(manager)


def end(manager):
    [tier] = manager.secondary_tiers
    tier.view = None
    manager.shutdown()


class Engine:
    """A scheduler that runs vLLM's manager step by step; the copies from a GPU are its own."""

    def __init__(self, vllm, manager, tier):
        self.vllm, self.manager, self.tier = vllm, manager, tier

    def step(self):
        self.manager.on_schedule_end(self.vllm.ScheduleEndContext((), ()))

    def store(self, numbers, group=0):
        context = self.vllm.ReqContext(req_id=uuid.uuid4().hex)
        self.manager.on_new_request(context)
        keys = [key_of(self.vllm, number, group) for number in numbers]
        output = self.manager.prepare_store(keys, context)
        order = {key_of(self.vllm, number, group): number for number in numbers}
        for key, chunk in zip(output.keys_to_store, output.store_spec.chunk_ids, strict=True):
            fill(self.tier.view, chunk, order[key])
        self.manager.complete_store(output.keys_to_store, context)
        self.manager.on_request_finished(context)
        self.step()

    def load(self, numbers, group=0):
        """The numbers whose chunks came, each checked byte by byte."""
        context = self.vllm.ReqContext(req_id=uuid.uuid4().hex)
        self.manager.on_new_request(context)
        keys = [key_of(self.vllm, number, group) for number in numbers]
        results = []

        def ready():
            results[:] = [self.manager.lookup(key, context) for key in keys]
            self.step()
            return not {self.vllm.LookupResult.RETRY, self.vllm.LookupResult.HIT_PENDING} & set(
                results
            )

        wait_for(ready, "the promotion")
        hits = [n for n, r in zip(numbers, results, strict=True) if r is self.vllm.LookupResult.HIT]
        for number in hits:
            key = key_of(self.vllm, number, group)
            source = self.manager.prepare_load([key], context)
            assert is_right(self.tier.view, source.chunk_ids[0], number)
            self.manager.complete_load([key], context)
        self.manager.on_request_finished(context)
        self.step()
        return hits


def test_the_manager_of_vllm_stores_and_promotes(vllm, make_tier, manager_of, tmp_path):
    url = f"file://{tmp_path}"
    manager, tier = manager_of(make_tier, url)
    engine = Engine(vllm, manager, tier)
    engine.store(range(6))
    engine.store([2, 3], group=1)
    tier.drain_jobs()
    engine.step()
    end(manager)

    engine = Engine(vllm, *manager_of(make_tier, url))  # of another process, with nothing in memory
    assert engine.load(range(8)) == list(range(6))
    assert engine.load(range(8), group=1) == [2, 3]
    engine.manager.reset_cache()
    assert engine.load([5]) == [5]


def test_the_manager_of_vllm_goes_on_when_a_store_lies(vllm, make_tier, manager_of):
    backing = Lying(lambda outcomes: outcomes)
    engine = Engine(vllm, *manager_of(make_tier, backing))
    engine.store(range(4))
    engine.manager.reset_cache()
    backing.lie = flipped
    assert engine.load(range(4)) == []
    backing.lie = lambda outcomes: outcomes
    engine.store(range(4))  # computed again
    engine.manager.reset_cache()
    assert engine.load(range(4)) == list(range(4))


def test_the_manager_of_vllm_goes_on_when_a_store_hangs(vllm, make_tier, manager_of):
    backing = Hanging("get")
    engine = Engine(vllm, *manager_of(make_tier, backing, timeout=1))
    engine.store(range(4))
    engine.manager.reset_cache()
    assert engine.load(range(4)) == []
    backing.go_on.set()
    engine.manager.reset_cache()
    assert engine.load(range(4)) == list(range(4))


@pytest.mark.parametrize(("published", "enabled"), [(True, True), (True, False), (False, True)])
def test_chunks_in_a_store_are_told_of_as_those_of_the_file_tier(
    vllm, make_tier, manager_of, tmp_path, published, enabled
):
    """The events of the manager, with this tier and with vLLM's own."""

    def make_theirs(root_dir, view, spec, **options):
        config = {"type": "fs", "root_dir": root_dir, **options}
        tier = vllm.SecondaryTierFactory.create_secondary_tier(config, view, spec)
        tier.view = view
        return tier

    told, spec = [], spec_of(vllm, events=published)
    for make, place in ((make_tier, "memory:"), (make_theirs, str(tmp_path))):
        options = {"spec": spec, "enable_kv_events": enabled, "locality": "REMOTE"}
        manager, tier = manager_of(make, place, **options)
        engine = Engine(vllm, manager, tier)
        engine.store([0, 1])
        tier.drain_jobs()
        engine.step()
        told.append([event for event in manager.take_events() if event.medium is tier.medium])
        assert list(manager.take_events()) == []
    ours, theirs = told
    assert ours == theirs
    assert bool(ours) == (published and enabled)


def test_chunks_that_were_not_stored_are_not_told_of(vllm, make_tier):
    backing = Hanging("put")
    tier = make_tier(backing, spec=spec_of(vllm, events=True), enable_kv_events=True)
    tier.submit_store(job_of(vllm, 1, [key_of(vllm, 1)], [1], is_promotion=False))
    assert backing.hung.wait(20)
    tier.shutdown()
    tier.view = None
    assert not results_of(tier, 1)[1].success
    assert list(tier.take_events()) == []


def test_memory_pressure_evicts_and_brings_back(vllm, make_tier, manager_of):
    engine = Engine(vllm, *manager_of(make_tier, MemoryStore(), chunks=4))
    for number in range(20):
        engine.store([number])
        engine.tier.drain_jobs()
        engine.step()
    for number in range(20):
        assert engine.load([number]) == [number]


@pytest.mark.parametrize("seconds", [1, pytest.param(60, marks=pytest.mark.slow)])
def test_no_job_of_eight_threads_is_lost(vllm, make_tier, seconds):
    """Eight threads submit, one polls, as the scheduler does."""
    tier = make_tier(MemoryStore(budget=200 * CHUNK_NBYTES), threads=4)
    begun, results, end_at = [], [], time.monotonic() + seconds

    def submit(thread):
        random = np.random.default_rng(thread)
        number = thread
        while time.monotonic() < end_at:
            keys = [key_of(vllm, n) for n in random.integers(0, 400, 2)]
            is_promotion = bool(random.integers(2))
            job = job_of(
                vllm, number, keys, [2 * thread, 2 * thread + 1], is_promotion=is_promotion
            )
            (tier.submit_load if is_promotion else tier.submit_store)(job)
            begun.append(number)
            number += 8
            while len(begun) - len(results) > 200:
                time.sleep(0)  # to the other threads

    threads = [threading.Thread(target=submit, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        results += tier.get_finished_jobs()
    tier.drain_jobs()
    results += tier.get_finished_jobs()
    assert sorted(result.job_id for result in results) == sorted(begun)
