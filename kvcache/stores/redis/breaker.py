"""A circuit breaker: a server that does not answer is asked again only now and then."""

from __future__ import annotations

import time

from kvcache._locks import Lock

_FAILURES = 3
_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 8.0


class Breaker:
    """State of a server as its callers found it.

    Closed at first: calls go through. After three failures in a row it opens: no call goes through
    for a quarter of a second. Then it is half open: one call goes through as a probe, which closes
    it or opens it for twice as long, for eight seconds at most.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self.failures = 0
        """In a row."""
        self._pause = _FIRST_PAUSE
        self._until = 0.0
        self._probing = False

    @property
    def is_open(self) -> bool:
        """Whether calls, except probes, are kept from the server."""
        return self.failures >= _FAILURES

    def admits(self) -> bool:
        """Return whether a call may go through; it must report how it went."""
        with self._lock:
            if not self.is_open:
                return True
            if self._probing or time.monotonic() < self._until:
                return False
            self._probing = True
            return True

    def succeeded(self) -> None:
        """Report that the server has answered."""
        with self._lock:
            self.failures, self._pause, self._probing = 0, _FIRST_PAUSE, False

    def failed(self) -> None:
        """Report that the server has not answered."""
        with self._lock:
            if self.is_open and not self._probing:
                return  # of a call from before it opened
            if self._probing:
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self.failures += 1
            self._probing = False
            self._until = time.monotonic() + self._pause

    def gave_up(self) -> None:
        """Report a call that ended before it could tell: the next one is a probe again."""
        with self._lock:
            self._probing = False
