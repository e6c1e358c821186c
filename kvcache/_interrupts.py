"""Ctrl-C, held back while a change that cannot fail is carried out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _Noted:
    """A handler that notes signals, to be raised later."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self, number: int, _: FrameType | None) -> None:
        self.numbers.append(number)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back: a KeyboardInterrupt within the block is raised at its end instead.

    For the commit of a change, which would otherwise stay half done. A pair of system calls, a few
    microseconds: too much for a decode step, which is undone instead when it is interrupted. Within
    such a block another one costs nothing.
    """
    handler = signal.getsignal(signal.SIGINT)
    # Python runs signal handlers in the main thread only, and only there can they be replaced.
    # A handler of C code (None) cannot be put back, and raises nothing in Python.
    held = handler is None or isinstance(handler, _Noted)
    if held or threading.current_thread() is not threading.main_thread():
        yield
        return
    noted = _Noted()
    signal.signal(signal.SIGINT, noted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for number in noted.numbers[:1]:
            signal.raise_signal(number)
