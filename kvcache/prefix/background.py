"""Work in the background: threads with a bounded queue, which nobody waits for unless told to."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue

from kvcache._interrupts import uninterrupted
from kvcache.stores.outcomes import Deadline

_LONGEST_WAIT = 1e6
"""Seconds; a condition takes no infinity."""
_EXIT_SECONDS = 2.0
"""Seconds that the end of the program waits for work that was queued, all queues together."""


class Background:
    """Jobs in threads of their own, in their order.

    threads: at most, started when there is work, daemons. limit: weight of all jobs that wait or
        run, at most; whatever exceeds it is refused.

    A job must not raise. Jobs of a process are not run by its forked children.
    """

    def __init__(self, threads: int, limit: int) -> None:
        self._most, self._limit = threads, limit
        self._forget_parent()
        _ALL.add(self)

    def _forget_parent(self) -> None:
        """Begin with nothing: a forked child has neither the threads nor the state of the locks."""
        self._process = os.getpid()
        self._changed = threading.Condition()
        # Its put() may be called anywhere, by the garbage collector too, and wakes a thread.
        self._jobs: SimpleQueue[tuple[Callable[[], None], int] | None] = SimpleQueue()
        self._threads = self._unfinished = self._weight = 0
        self._stopped = False

    def has_room(self, weight: int = 0) -> bool:
        """Return whether a job of this weight would be taken."""
        return not self._stopped and self._weight + weight <= self._limit

    def submit(self, job: Callable[[], None], weight: int) -> bool:
        """Queue a job; return False if there is no room for it, or after :meth:`stop`."""
        if self._process != os.getpid():
            self._forget_parent()
        with uninterrupted(), self._changed:  # the counts tell of what is queued
            if not self.has_room(weight):
                return False
            if self._threads <= self._unfinished and self._threads < self._most:
                # First, because it may raise.
                threading.Thread(target=self._work, daemon=True).start()
                self._threads += 1
            self._unfinished += 1
            self._weight += weight
            self._jobs.put((job, weight))
        return True

    def drain(self, deadline: Deadline) -> bool:
        """Wait until no job waits or runs; return False if the deadline comes first."""
        if self._process != os.getpid():
            return True
        with self._changed:
            wait = min(deadline.left, _LONGEST_WAIT)
            return self._changed.wait_for(lambda: not self._weight, wait)

    def stop(self) -> None:
        """Take no more jobs. The threads end with the last one that is queued.

        Stopping again does nothing.
        """
        # No lock: the garbage collector may call this in a thread that has it.
        self._stopped = True
        self._jobs.put(None)

    def _work(self) -> None:
        while True:
            taken = self._jobs.get()
            if taken is None:
                if self._is_over():
                    return
                continue
            job, weight = taken
            try:
                job()
            finally:
                del job, taken  # and what they refer to, while the thread waits for the next
                with self._changed:
                    self._unfinished -= 1
                    self._weight -= weight
                    self._changed.notify_all()

    def _is_over(self) -> bool:
        """Return whether a thread ends, and wake the next one."""
        with self._changed:  # a job is put under it, perhaps behind the note that there are no more
            # One note goes from thread to thread, however often they were stopped: with a second
            # one there would always be something left to look at.
            jobs = [job for job in self._queued() if job is not None]
            for job in [*jobs, None]:
                self._jobs.put(job)
            self._threads -= not jobs
            return not jobs

    def _queued(self) -> Iterator[tuple[Callable[[], None], int] | None]:
        """Take all that is queued."""
        with suppress(Empty):
            while True:
                yield self._jobs.get_nowait()


_ALL: weakref.WeakSet[Background] = weakref.WeakSet()


def _drain_all() -> None:
    deadline = Deadline.after(_EXIT_SECONDS)
    for background in list(_ALL):
        background.drain(deadline)


atexit.register(_drain_all)
