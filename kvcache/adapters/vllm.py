"""A store of kvcache as a tier of vLLM's offloading: Redis, a directory, any URL.

A line of configuration is all that vLLM needs; the guide is ``docs/vllm.md``::

    "secondary_tiers": [{"type": "KVCacheTier", "module_path": "kvcache.adapters.vllm",
                         "url": "redis://127.0.0.1:6379"}]
"""

from __future__ import annotations

import json
import queue
from collections.abc import Collection, Iterable, Mapping
from functools import partial

from kvcache.errors import BackendNotAvailableError
from kvcache.stores import open_store
from kvcache.stores.jobs import Jobs
from kvcache.stores.named import NamedKeys
from kvcache.stores.transfers import Place, Report

try:
    from vllm.v1.kv_offload.base import (
        Locality,
        LookupResult,
        Medium,
        OffloadingEvent,
        OffloadingSpec,
        OffloadKey,
        ReqContext,
        RequestOffloadingContext,
        ScheduleEndContext,
    )
    from vllm.v1.kv_offload.file_mapper import FileMapper
    from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector
    from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
except ImportError as error:
    raise BackendNotAvailableError(
        f"this needs vllm 0.32 with its tiered offloading, which is missing or another ({error}). "
        "Try: pip install 'vllm>=0.32'"
    ) from error


class _LookUps(AsyncLookupManager):
    """vLLM's own table of look-ups, which asks from a thread of its own."""

    def __init__(self, tier_type: str, jobs: Jobs, names: NamedKeys) -> None:
        self._jobs, self._names = jobs, names
        super().__init__(tier_type=tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        return self._jobs.look_up([self._names.key(key) for key in keys]).wait().succeeded


class KVCacheTier(SecondaryTierManager):
    """A tier of chunks in a store, behind the tier in host memory.

    No call waits for the store, except drain_jobs, which does for `timeout` seconds at most. Chunks
    are verified by a checksum when they are loaded. Whatever fails is a miss: the chunks of a load
    that came are kept, the others are computed again.

    url, options: of the store, see ``kvcache.stores.open_store``. namespace: tells apart what vLLM
    does not, such as weights under one name. threads, timeout, lookup_timeout: of
    ``kvcache.stores.jobs.Jobs``. locality: "LOCAL" or "REMOTE", for vLLM's filters and events.
    enable_kv_events: whether vLLM, if it publishes events, tells of chunks stored here, as of its
    own tiers; of those that the store gives up later nobody knows. The other arguments are vLLM's.

    Raises: StoreError, TypeError, ValueError for a store that cannot be opened.
    """

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        url: str,
        options: Mapping[str, object] | None = None,
        namespace: str = "",
        threads: int = 8,
        timeout: float = 30.0,
        lookup_timeout: float = 1.0,
        locality: str | None = None,
        enable_kv_events: bool = False,
        backpressure_detector: BackpressureDetector | None = None,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = None if locality is None else Locality(locality)
        published = offloading_spec.kv_events_config.enable_kv_cache_events
        self._tells = enable_kv_events and published
        self._events: list[OffloadingEvent] = []
        self._chunks = primary_kv_view.cast("B")
        self._names = NamedKeys(
            {
                "engine": "vllm",
                "namespace": namespace,
                "chunk_nbytes": self.block_size_bytes,
                **_run_of(offloading_spec),
            }
        )
        self._jobs = Jobs(
            open_store(url, **dict(options or {})),
            threads=threads,
            timeout=timeout,
            lookup_timeout=lookup_timeout,
        )
        self._finished: queue.SimpleQueue[tuple[TransferJob, Report]] = queue.SimpleQueue()
        self._look_ups = _LookUps(tier_type, self._jobs, self._names)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        found = self._look_ups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._jobs.put(self._places(job_metadata), self._then(job_metadata))

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._jobs.load(self._places(job_metadata), self._then(job_metadata))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results: list[JobResult] = []
        while True:
            try:
                job, report = self._finished.get_nowait()
            except queue.Empty:
                return results
            results.append(self._result(job, report))

    def take_events(self) -> Iterable[OffloadingEvent]:
        events, self._events = self._events, []
        return events

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._look_ups.cleanup(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._look_ups.flush()

    def drain_jobs(self) -> None:
        self._jobs.drain()

    def shutdown(self) -> None:
        self._jobs.close()  # first: it ends the look-up that the other one waits for
        self._look_ups.shutdown()
        self._chunks.release()

    def _places(self, job: TransferJob) -> list[Place]:
        size = self.block_size_bytes
        return [
            Place(self._names.key(key), self._chunks[chunk * size : (chunk + 1) * size])
            for key, chunk in zip(job.keys, map(int, job.chunk_ids), strict=True)
        ]

    def _then(self, job: TransferJob) -> partial[None]:
        return partial(_put_both, self._finished, job)

    def _result(self, job: TransferJob, report: Report) -> JobResult:
        succeeded = all(report.succeeded)
        if self._tells and not job.is_promotion:
            self._tell_stored(job, report)
        loaded: Collection[OffloadKey] | None = None
        if job.is_promotion and not succeeded:
            answers = list(zip(job.keys, report.succeeded, strict=True))
            loaded = tuple(key for key, is_loaded in answers if is_loaded) or None
            # Else the next look-up finds them again, and loads them again, for ever.
            self._look_ups.mark_miss([key for key, is_loaded in answers if not is_loaded])
        return JobResult(
            job_id=job.job_id,
            success=succeeded,
            successful_keys=loaded,
            transfer_time=report.seconds,
            transfer_bytes=report.nbytes,
        )

    def _tell_stored(self, job: TransferJob, report: Report) -> None:
        answers = zip(job.keys, report.succeeded, strict=True)
        stored = [key for key, is_stored in answers if is_stored]
        if stored:
            event = OffloadingEvent(stored, self.medium, removed=False, locality=self.locality)
            self._events.append(event)


def _put_both(
    finished: queue.SimpleQueue[tuple[TransferJob, Report]], job: TransferJob, report: Report
) -> None:
    finished.put((job, report))


def _run_of(spec: OffloadingSpec) -> dict[str, object]:
    """Return what vLLM tells directories of chunks apart by: model, dtype, groups, ranks."""
    mapper = FileMapper.from_offloading_spec(
        root_dir="",
        offloading_spec=spec,
        blocks_per_file=spec.blocks_per_chunk,
        parallel_agnostic=True,
    )
    run: dict[str, object] = json.loads(json.dumps(mapper.get_run_config(), default=str))
    return {**run, "rank": mapper.rank}
