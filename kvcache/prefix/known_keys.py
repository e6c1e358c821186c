"""Keys that a store has, or is about to have, so that no session puts them again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from sys import getsizeof

from kvcache._locks import Lock
from kvcache.stores.outcomes import KEY_NBYTES, Key

from .footprint import ORDERED_ENTRY

_KEY_NBYTES = getsizeof(bytes(KEY_NBYTES))


class KnownKeys:
    """Keys that need not be put, the newest ones. Any thread may call its methods.

    limit: bytes of memory that they take at most.
    """

    def __init__(self, limit: int) -> None:
        self._keys: OrderedDict[Key, None] = OrderedDict()
        self._most, self._lock = limit // (ORDERED_ENTRY + _KEY_NBYTES), Lock()
        self.nbytes = getsizeof(self._keys)
        """Bytes of memory that they take."""

    def __contains__(self, key: Key) -> bool:
        with self._lock:
            return key in self._keys

    def add(self, key: Key) -> None:
        """Remember that a key need not be put."""
        with self._lock:
            self._keys[key] = None
            while len(self._keys) > self._most:
                self._keys.popitem(last=False)
            self._measure()

    def discard(self, keys: Iterable[Key]) -> None:
        """Let a later session put `keys`."""
        with self._lock:
            for key in keys:
                self._keys.pop(key, None)
            self._measure()

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._keys.clear()
            self._measure()

    def _measure(self) -> None:
        # As a number, as it is asked for with every span that is evicted.
        self.nbytes = getsizeof(self._keys) + len(self._keys) * _KEY_NBYTES
