"""Stores that hang, die or lie, and values that tell their key and each of their positions."""

import threading

import numpy as np

from kvcache.stores import Hit, MemoryStore, Present

from .values import key_of


def coded(number, nbytes):
    """Return bytes of which each depends on the number and on its position."""
    positions = np.arange(nbytes, dtype=np.uint64)
    return ((positions * 2654435761 + number * 40503 + 7) >> 8).astype(np.uint8)


class Hanging(MemoryStore):
    """A store of which some calls hang until it is let go on."""

    def __init__(self, *calls):
        super().__init__()
        self.calls, self.go_on, self.hung = calls, threading.Event(), threading.Event()

    def _hang(self, call):
        if call in self.calls:
            self.hung.set()
            assert self.go_on.wait(20)

    def _get(self, keys, deadline):
        self._hang("get")
        return super()._get(keys, deadline)

    def _put(self, items, deadline):
        self._hang("put")
        return super()._put(items, deadline)

    def _contains(self, keys, deadline):
        self._hang("contains")
        return super()._contains(keys, deadline)


class Lying(MemoryStore):
    """A store that answers reads with something else than what was put."""

    def __init__(self, lie):
        super().__init__()
        self.lie = lie

    def _contains(self, keys, deadline):
        return [Present() for _ in keys] if self.lie is presence else super()._contains(keys, 0)

    def _get(self, keys, deadline):
        return self.lie(super()._get(keys, deadline))


def flipped(outcomes):
    return [_changed(outcome, _flip) for outcome in outcomes]


def _flip(value):
    changed = bytearray(value)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def shortened(outcomes):
    return [_changed(outcome, lambda value: value[:-1]) for outcome in outcomes]


def lengthened(outcomes):
    return [_changed(outcome, lambda value: bytes(value) + b"\0") for outcome in outcomes]


def empty(outcomes):
    return [_changed(outcome, lambda value: b"") for outcome in outcomes]


def swapped(outcomes):
    """The values of the keys in the other order, each whole and with its own checksum."""
    return outcomes[::-1]


def too_few(outcomes):
    return outcomes[:-1]


def raising(outcomes):
    raise OSError("the disk is gone")


def presence(outcomes):
    """Everything is present, and nothing can be read."""
    raise ConnectionResetError("by peer")


LIES = [flipped, shortened, lengthened, empty, swapped, too_few, raising, presence]


def _changed(outcome, change):
    if not isinstance(outcome, Hit):
        return outcome
    return Hit(memoryview(change(outcome.value)), outcome.label)


def keys_of(count):
    return [key_of(number) for number in range(count)]
