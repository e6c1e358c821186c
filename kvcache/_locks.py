"""Locks that do not hang a forked child, and that pickle with the objects around them."""

from __future__ import annotations

import _thread
import os
import threading
import weakref
from typing import TYPE_CHECKING, Protocol


class _Forkable(Protocol):
    """The calls that the standard library makes on its own locks after a fork."""

    def _is_owned(self) -> bool: ...
    def _at_fork_reinit(self) -> None: ...


_LOCKS: weakref.WeakSet[_Forkable] = weakref.WeakSet()

if TYPE_CHECKING:
    Lock = threading.RLock
else:

    class Lock(_thread.RLock):
        """A reentrant lock: free in a forked child, and pickled as a new one.

        A subclass of the C type, because every pass takes such a lock, and a wrapper in Python
        costs several times as much.
        """

        def __init__(self) -> None:
            super().__init__()
            _LOCKS.add(self)

        def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
            return Lock, ()


def _free_locks_of_other_threads() -> None:
    """Free locks whose owners stayed in the parent; the thread that forked keeps its own."""
    for lock in _LOCKS:
        if not lock._is_owned():
            lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_free_locks_of_other_threads)
