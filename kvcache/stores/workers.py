"""Calls that nothing interrupts, made in threads that their caller need not wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from .base import describe
from .outcomes import Deadline, Unavailable

A = TypeVar("A")
R = TypeVar("R")

_AT_ONCE = 8
_MOST = 32
_LONGEST_WAIT = 1e6
"""Seconds; a condition takes no infinity."""


class Workers:
    """Threads that answer several questions side by side, until a deadline.

    A thread whose call hangs is left behind; of those there are never more than a few, because
    questions find the store unavailable while too many hang.
    """

    def __init__(self) -> None:
        self._free = threading.BoundedSemaphore(_MOST)

    def answers(
        self, asked: Sequence[A], answer: Callable[[A], R], deadline: Deadline
    ) -> list[R | Unavailable]:
        """Return the answer to each of `asked`, or why there is none by the deadline."""
        call = _Call(asked, answer, deadline)
        started = 0
        for _ in range(min(_AT_ONCE, len(asked))):
            if self._free.acquire(blocking=False):
                # Daemons: one that hangs must not keep the program from its end.
                threading.Thread(target=self._work, args=(call,), daemon=True).start()
                started += 1
        if not started:
            return [Unavailable(f"{_MOST} calls hang")] * len(asked)
        return call.wait()

    def _work(self, call: _Call[A, R]) -> None:
        try:
            call.work()
        finally:
            self._free.release()


class _Call(Generic[A, R]):
    """Questions, and the answers so far."""

    def __init__(self, asked: Sequence[A], answer: Callable[[A], R], deadline: Deadline) -> None:
        self._asked, self._answer, self._deadline = asked, answer, deadline
        self._answers: dict[int, R | Unavailable] = {}
        self._next = 0
        self._changed = threading.Condition()

    def work(self) -> None:
        """Answer one question after the other, until there is none left."""
        while (index := self._taken()) is not None:
            try:
                answer: R | Unavailable = self._answer(self._asked[index])
            except Exception as error:  # noqa: BLE001 - the outcome of this question
                answer = Unavailable(describe(error))
            with self._changed:
                self._answers[index] = answer
                self._changed.notify()

    def _taken(self) -> int | None:
        """Return the number of the next question; None if there is none, or no time."""
        with self._changed:
            if self._next == len(self._asked) or self._deadline.passed:
                return None
            self._next += 1
            return self._next - 1

    def wait(self) -> list[R | Unavailable]:
        """Return all answers, at the deadline at the latest."""
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._answers) == len(self._asked),
                min(self._deadline.left, _LONGEST_WAIT),
            )
            late = Unavailable("the deadline has passed")
            return [self._answers.get(index, late) for index in range(len(self._asked))]
