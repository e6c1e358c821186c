"""Jobs for a store in threads of their own, for programs that must not wait for it.

::

    jobs = Jobs(store, timeout=30.0)
    jobs.load([Place(key, buffer)], then=finished.put)     # returns at once
    jobs.look_up(keys).wait().succeeded                    # returns within the timeout

Every job that is begun ends, once, and is reported once: when all of its keys have an answer, at
its deadline, or when the jobs are closed. Whatever a store does, a key that failed is one that is
not there.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import SupportsIndex

from kvcache._checks import as_index
from kvcache._interrupts import uninterrupted

from .base import Store
from .outcomes import Deadline, Key
from .transfers import Job, Load, LookUp, Place, Put, Removal, Report

_logger = logging.getLogger("kvcache.stores")

_LONGEST_WAIT = 1e6
"""Seconds; a condition takes no infinity."""
_CLOSING = 1.0
"""Seconds that closing waits for calls of the store."""
_KEPT = 64
"""Deadlines of ended jobs that may wait for their moment beside those of others."""

Then = Callable[[Report], None]


class Jobs:
    """Jobs for one store. All calls may come from several threads at once; none but drain waits.

    store: closed with the jobs, by whichever of their threads leaves it last. threads: 2 or more,
    of which one never puts, so that look-ups and loads go on. timeout: seconds from the beginning
    of a job to its end, whatever happens. lookup_timeout: the same for look-ups.

    then: called with the report of a job, in a thread of the jobs, or in the one that closes them,
    with no lock held. It must not wait for a job: the thread may be the one that ends late ones.

    A thread whose call of the store hangs is lost until the call returns; jobs that find no thread
    fail at their deadline.
    """

    def __init__(
        self,
        store: Store,
        *,
        threads: SupportsIndex = 8,
        timeout: float = 30.0,
        lookup_timeout: float = 1.0,
    ) -> None:
        self._most = as_index(threads, "threads")
        if self._most < 2:
            raise ValueError(f"threads must be >= 2, one of them for reads; got {self._most}.")
        if not (timeout > 0 and lookup_timeout > 0):
            raise ValueError(
                f"timeouts must be > 0 seconds; got {timeout} and {lookup_timeout} for look-ups."
            )
        self.store = store
        self._timeout, self._lookup_timeout = timeout, lookup_timeout
        # Taken before the lock of a job, by who needs both. No lock is held while the store is
        # asked, or a report is made.
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._clock = threading.Condition(self._lock)
        self._fewer = threading.Condition(self._lock)
        self._reads: dict[Job, None] = {}  # with pieces that no thread has taken; the oldest first
        self._puts: dict[Job, None] = {}
        self._unfinished: set[Job] = set()
        self._deadlines: list[tuple[float, int, Job]] = []
        self._order = itertools.count()
        self._threads = self._idle = self._putting = 0
        self._watched = self._closed = False

    def look_up(self, keys: Sequence[Key], then: Then | None = None) -> Job:
        """Ask which keys there are."""
        return self._begin(LookUp(keys, Deadline.after(self._lookup_timeout), then))

    def load(
        self, places: Sequence[Place], then: Then | None = None, deadline: Deadline | None = None
    ) -> Job:
        """Load values into buffers, which belong to the job until it is over.

        A buffer whose key failed is as it was. deadline: from :meth:`deadline`, to give several
        jobs the same.
        """
        return self._begin(Load(places, deadline or self.deadline(), then))

    def deadline(self) -> Deadline:
        """Return the end of all jobs but look-ups that begin at this moment."""
        return Deadline.after(self._timeout)

    def put(self, places: Sequence[Place], then: Then | None = None) -> Job:
        """Put the values in buffers, which must not change until the job is over."""
        return self._begin(Put(places, Deadline.after(self._timeout), then))

    def remove(self, keys: Sequence[Key], then: Then | None = None) -> Job:
        """Remove values."""
        return self._begin(Removal(keys, Deadline.after(self._timeout), then))

    @property
    def unfinished(self) -> int:
        """Jobs that are not over."""
        with self._lock:
            return len(self._unfinished)

    def drain(self) -> None:
        """Wait until all jobs are over and reported; the deadline of the last is the longest."""
        with self._lock:
            self._fewer.wait_for(lambda: not self._unfinished)

    def close(self) -> None:
        """End all jobs now; their keys without an answer have failed. Closing twice is fine.

        Jobs begun later fail at once. The store is closed as soon as no thread is in it.
        """
        with self._lock:
            self._closed = True
            unfinished = list(self._unfinished)
            self._work.notify_all()
            self._clock.notify_all()
        for job in unfinished:
            self._end(job)
        with self._lock:
            self._fewer.wait_for(lambda: not (self._threads or self._unfinished), _CLOSING)
            unused = not self._threads
        if unused:
            self.store.close()

    def _begin(self, job: Job) -> Job:
        with uninterrupted(), self._lock:
            begun = job.has_pieces and not self._closed and self._start_threads()
            if begun:
                self._unfinished.add(job)
                (self._puts if job.is_put else self._reads)[job] = None
                heapq.heappush(self._deadlines, (job.deadline.at, next(self._order), job))
                if self._deadlines[0][2] is job:
                    self._clock.notify()
                self._work.notify()
        if not begun:
            job.end()
        return job

    def _start_threads(self) -> bool:
        """Start the watch, and a thread more if all are busy; return whether there is a watch."""
        try:
            if not self._watched:
                _start(self._watch, "kvcache-watch")
                self._watched = True
            if not self._idle and self._threads < self._most:
                _start(self._serve, "kvcache-store")
                self._threads += 1
        except RuntimeError:  # the system has no more: others do the work, or it ends in time
            _logger.warning("a thread for a store could not be started", exc_info=True)
        return self._watched

    def _serve(self) -> None:
        """Answer pieces until the jobs are closed; the last thread closes the store."""
        while (taken := self._take()) is not None:
            job, piece = taken
            answered = job.answer(self.store, piece)
            with self._lock:
                self._putting -= job.is_put
                self._work.notify()
            if answered:
                self._end(job)
        with self._lock:
            self._threads -= 1
            last = not self._threads
        if last:
            self.store.close()
        with self._lock:
            self._fewer.notify_all()

    def _take(self) -> tuple[Job, range] | None:
        """Return the next piece, when there is one; None when the jobs are closed."""
        with self._lock:
            while not self._closed:
                if (taken := self._next()) is not None:
                    return taken
                self._idle += 1
                self._work.wait()
                self._idle -= 1
        return None

    def _next(self) -> tuple[Job, range] | None:
        may_put = self._putting < self._most - 1
        for waiting in (self._reads, self._puts) if may_put else (self._reads,):
            while waiting:
                job = next(iter(waiting))
                piece = job.next_piece()
                if piece is None or not job.has_pieces:  # over, or all of it taken
                    del waiting[job]
                if piece is not None:
                    self._putting += job.is_put
                    self._more()
                    return job, piece
        return None

    def _more(self) -> None:
        """Get another thread for the pieces that are left."""
        if self._reads or self._puts:
            self._start_threads()
            self._work.notify()

    def _watch(self) -> None:
        """End jobs whose deadline has passed."""
        while (late := self._late()) is not None:
            self._end(late)

    def _late(self) -> Job | None:
        """Return the next job that is late, when it is; None when the jobs are closed."""
        with self._lock:
            while not self._closed:
                while self._deadlines and self._deadlines[0][2] not in self._unfinished:
                    heapq.heappop(self._deadlines)
                job = self._deadlines[0][2] if self._deadlines else None
                if job is not None and job.deadline.passed:
                    heapq.heappop(self._deadlines)
                    return job
                left = _LONGEST_WAIT if job is None else job.deadline.left
                self._clock.wait(min(left, _LONGEST_WAIT))
        return None

    def _end(self, job: Job) -> None:
        """End a job that may be over, and forget it once it is reported."""
        with uninterrupted():
            if job.end():
                with self._lock:
                    self._unfinished.discard(job)
                    self._reads.pop(job, None)
                    self._puts.pop(job, None)
                    self._forget_deadlines()
                    self._fewer.notify_all()

    def _forget_deadlines(self) -> None:
        """Forget ended jobs, of which there are thousands when the deadline of the first comes."""
        if len(self._deadlines) > 2 * len(self._unfinished) + _KEPT:
            self._deadlines = [late for late in self._deadlines if late[2] in self._unfinished]
            heapq.heapify(self._deadlines)


def _start(target: Callable[[], None], name: str) -> None:
    """Start a thread that does not hold up the end of the program."""
    threading.Thread(target=target, name=name, daemon=True).start()
