"""The common part of all stores: what authors of stores may rely on."""

import logging

import numpy as np
import pytest

from kvcache.errors import StoreError
from kvcache.stores import (
    NEVER,
    Corrupt,
    Deadline,
    Hit,
    Item,
    Label,
    MemoryStore,
    Miss,
    Stored,
    Unavailable,
)

from .values import item_of, key_of


class Broken(MemoryStore):
    """Raises in every call, as clients of servers do."""

    error = ConnectionError("no server")

    def _raise(self, *arguments):
        raise self.error

    _get = _put = _contains = _delete = _usage = _entries = _close = _raise


def test_whatever_is_raised_is_an_outcome(caplog):
    with Broken() as store:
        lost = Unavailable("ConnectionError: no server")
        assert store.get([key_of(1), key_of(2)]) == [lost, lost]
        assert store.put([item_of(1)]) == [lost]
        assert store.contains([key_of(1)]) == store.delete([key_of(1)]) == [lost]
        assert store.usage() == lost
        with pytest.raises(StoreError, match=r"cannot be listed: ConnectionError: no server"):
            list(store.entries())
        assert store.stats.unavailable == 5
    warnings = [record.getMessage() for record in caplog.records]
    assert [warning.split(": ")[1] for warning in warnings] == [
        "the store is unavailable",
        "it does not close",
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_are_no_outcomes(error):
    class Interrupted(MemoryStore):
        def _get(self, keys, deadline):
            raise error

    with Interrupted() as store, pytest.raises(error):
        store.get([key_of(1)])


def test_an_outcome_for_every_key(caplog):
    class Short(MemoryStore):
        def _get(self, keys, deadline):
            return [Miss()]

    with Short() as store:
        [one, two] = store.get([key_of(1), key_of(2)])
        assert one == two == Unavailable("StoreError: 2 were asked for; the store answered 1")


def test_damage_is_counted_and_told_once(caplog):
    class Damaged(MemoryStore):
        def _get(self, keys, deadline):
            return [Corrupt(f"bit {number}") for number, _ in enumerate(keys)]

    with caplog.at_level(logging.WARNING), Damaged() as store:
        store.get([key_of(1), key_of(2)])
        store.get([key_of(1)])
        assert store.stats.corrupt == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"{store!r}: a value is damaged: bit 0. Further cases are counted in its stats only."
    ]


def test_entries_stop_at_the_deadline():
    with MemoryStore() as store:
        store.put([item_of(number) for number in range(3)])
        deadline = Deadline.after(1000)
        listed = store.entries(deadline=deadline)
        next(listed)
        deadline.at = 0
        with pytest.raises(StoreError, match="TimeoutError: the deadline has passed"):
            next(listed)


def test_entries_of_a_closed_store():
    store = MemoryStore()
    store.close()
    with pytest.raises(StoreError, match=r"is closed\. Make a new one"):
        next(store.entries())


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ((key_of(1), []), TypeError, r"values are put as kvcache\.stores\.Item; got tuple"),
        (Item(b"short", []), ValueError, "a key has 32 bytes; got 5"),
        (Item(key_of(1), [np.zeros((4, 4))[:, 1].data]), ValueError, "contiguous"),
        (Item(key_of(1), [], Label(layout=b"")), ValueError, "the layout of a label has 32 bytes"),
        (Item(key_of(1), [], Label(parent=b"")), ValueError, "the parent of a label has 32 bytes"),
        (Item(key_of(1), [], Label(start=2, stop=1)), ValueError, "0 <= start <= stop"),
        (Item(key_of(1), [], Label(stop=2**32)), ValueError, r"stop < 2\*\*32"),
    ],
)
def test_wrong_items_are_refused(item, error, message):
    with MemoryStore() as store:
        with pytest.raises(error, match=message):
            store.put([item_of(2), item])
        assert store.contains([key_of(2)]) == [Miss()]


def test_deadlines():
    assert NEVER.left == float("inf")
    assert not NEVER.passed
    assert 0 < Deadline.after(1000).left <= 1000
    assert Deadline.after(-1).left == 0
    with pytest.raises(TimeoutError, match="the deadline has passed"):
        Deadline.after(-1).check()


def test_values_of_a_memory_store_live_as_long_as_they_are_used():
    store = MemoryStore(1000)
    store.put([item_of(1)])
    [hit] = store.get([key_of(1)])
    value = bytes(hit.value)
    assert store.put([item_of(2)]) == [Stored()]
    store.close()
    assert isinstance(hit, Hit)
    assert bytes(hit.value) == value
