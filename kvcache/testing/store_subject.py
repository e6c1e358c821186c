"""The store under test, and the values that the checks of its rules put into it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from kvcache.stores import Hit, Item, Label, Store

Change: TypeAlias = Callable[[bytes], bytes]
"""Returns other bytes in place of those that lie in a store."""


@dataclass(frozen=True)
class StoreSubject:
    """A store under test.

    open: makes a store of a budget in bytes, None for no limit; all of one subject are of one
        place, empty at first. persistent: what one has put, the next one finds.
    has_budget: whether it holds one; else `open` is given None only.
    damage: changes the bytes that lie in a store under a key; None where nobody can.
    """

    open: Callable[[int | None], Store]
    persistent: bool = True
    has_budget: bool = True
    damage: Callable[[Store, bytes, Change], None] | None = None


def key_of(number: int) -> bytes:
    """Return a key."""
    return hashlib.sha256(b"key %d" % number).digest()


def value_of(number: int, nbytes: int = 1000) -> bytes:
    """Return bytes that no other number has."""
    return random.Random(number).randbytes(nbytes)  # noqa: S311 - the same in every process


def item_of(number: int, nbytes: int = 1000) -> Item:
    """Return an item of a key of its own, in two buffers, with a label of its own."""
    value = value_of(number, nbytes)
    label = Label(key_of(-1), key_of(number - 1), number, number + 1)
    return Item(key_of(number), [value[: nbytes // 3], value[nbytes // 3 :]], label)


@contextmanager
def opened(subject: StoreSubject, budget: int | None = None) -> Iterator[Store]:
    """Open a store, and close it in the end."""
    store = subject.open(budget)
    try:
        yield store
    finally:
        store.close()


def expect_value(outcome: object, number: int, nbytes: int = 1000) -> None:
    """Check that an outcome is the value of a number."""
    assert isinstance(outcome, Hit), f"a value was put under the key; got {outcome}"
    assert bytes(outcome.value) == value_of(number, nbytes), "the value is another one"
