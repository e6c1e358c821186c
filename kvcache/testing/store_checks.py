"""The rules of stores: ``check(subject)`` raises or returns. Nothing here needs pytest."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import TypeAlias

from kvcache.stores import (
    Corrupt,
    Deadline,
    Deleted,
    Entry,
    Hit,
    Item,
    Miss,
    Present,
    Refused,
    Store,
    Stored,
    Unavailable,
    Usage,
)
from kvcache.stores.outcomes import Buffer

from .store_subject import Change, StoreSubject, expect_value, item_of, key_of, opened, value_of

StoreCheck: TypeAlias = Callable[[StoreSubject], None]
"""Raises, whatever it may be, unless the store keeps a rule."""
STORE_CHECKS: list[StoreCheck] = []
"""All rules, each with its name and its text as the name and docstring of the function."""
_SIZES = (0, 1, 63, 4096, 300_001)
_MANY = 40


def _check(function: StoreCheck) -> StoreCheck:
    STORE_CHECKS.append(function)
    return function


@_check
def values_come_back(subject: StoreSubject) -> None:
    """A read gives the concatenation of the buffers that were put, of any size, and the label."""
    items = [item_of(number, nbytes) for number, nbytes in enumerate(_SIZES)]
    with opened(subject) as store:
        assert store.put(items) == [Stored()] * len(items)
        outcomes = store.get([item.key for item in items])
        for number, (item, nbytes, outcome) in enumerate(zip(items, _SIZES, outcomes, strict=True)):
            expect_value(outcome, number, nbytes)
            assert isinstance(outcome, Hit)
            assert outcome.label == item.label, "the label is another one"


@_check
def values_are_read_only_bytes(subject: StoreSubject) -> None:
    """A value is a flat, read-only memoryview of bytes that later calls do not change."""
    with opened(subject) as store:
        store.put([item_of(1)])
        [outcome] = store.get([key_of(1)])
        assert isinstance(outcome, Hit)
        value = outcome.value
        assert value.readonly, "a value is read-only"
        assert value.format == "B", "a value is bytes"
        assert value.contiguous, "a value is contiguous"
        store.delete([key_of(1)])
        store.put([item_of(2), item_of(1)])
        assert bytes(value) == value_of(1), "a later call changed a value that was read"


@_check
def buffers_are_free_after_put(subject: StoreSubject) -> None:
    """A store holds no buffer of its caller: what happens to it later changes no value."""
    buffer = bytearray(value_of(1))
    with opened(subject) as store:
        store.put([Item(key_of(1), [buffer])])
        buffer[:] = bytes(len(buffer))
        [outcome] = store.get([key_of(1)])
        expect_value(outcome, 1)


@_check
def buffers_of_any_format(subject: StoreSubject) -> None:
    """Buffers of numbers are stored as their bytes."""
    value = value_of(1, 4096)
    view = memoryview(value)
    buffers: list[Buffer] = [
        view[:1024].cast("f"),
        view[1024:2048].cast("B", (32, 32)),
        bytearray(view[2048:]),
    ]
    with opened(subject) as store:
        assert store.put([Item(key_of(1), buffers)]) == [Stored()]
        [outcome] = store.get([key_of(1)])
        expect_value(outcome, 1, 4096)


@_check
def outcomes_in_order(subject: StoreSubject) -> None:
    """Each key of a call has an outcome, in their order, also one that comes twice."""
    with opened(subject) as store:
        assert store.get([]) == store.put([]) == store.contains([]) == store.delete([]) == []
        store.put([item_of(1), item_of(3)])
        keys = [key_of(number) for number in (3, 2, 1, 3)]
        outcomes = store.get(keys)
        for number, outcome in zip((3, None, 1, 3), outcomes, strict=True):
            if number is None:
                assert outcome == Miss()
            else:
                expect_value(outcome, number)
        assert store.contains(keys) == [Present(), Miss(), Present(), Present()]
        assert store.delete(keys[:2]) == [Deleted(), Miss()]
        assert store.contains(keys) == [Miss(), Miss(), Present(), Miss()]


@_check
def deleted_is_gone(subject: StoreSubject) -> None:
    """A deleted value is missed, and can be put again."""
    with opened(subject) as store:
        store.put([item_of(1)])
        assert store.delete([key_of(1)]) == [Deleted()]
        assert store.delete([key_of(1)]) == [Miss()]
        assert store.get([key_of(1)]) == [Miss()]
        assert store.put([item_of(1)]) == [Stored()]
        expect_value(store.get([key_of(1)])[0], 1)


@_check
def put_again_is_stored(subject: StoreSubject) -> None:
    """A key that is there may be put again; there is one entry."""
    with opened(subject) as store:
        assert store.put([item_of(1)]) == [Stored()]
        assert store.put([item_of(1)]) == [Stored()]
        expect_value(store.get([key_of(1)])[0], 1)
        assert len(list(store.entries())) == 1


@_check
def entries_are_listed(subject: StoreSubject) -> None:
    """`entries` gives the key, size and label of everything that is there, and nothing else."""
    with opened(subject) as store:
        assert list(store.entries()) == []
        store.put([item_of(number, 100 + number) for number in range(_MANY)])
        store.delete([key_of(0)])
        listed = {entry.key: entry for entry in store.entries()}
        assert set(listed) == {key_of(number) for number in range(1, _MANY)}
        for number in range(1, _MANY):
            _expect_entry(listed[key_of(number)], number)
        usage = store.usage()
        assert isinstance(usage, Usage)
        assert usage.entries == _MANY - 1


def _expect_entry(entry: Entry, number: int) -> None:
    assert entry.nbytes == 100 + number, f"the value has {100 + number} bytes; got {entry.nbytes}"
    assert entry.label == item_of(number).label, "the label is another one"


@_check
def wrong_arguments_are_refused(subject: StoreSubject) -> None:
    """Keys that are no digests raise TypeError or ValueError, and are no outcomes."""
    with opened(subject) as store:
        calls: list[Callable[[list[bytes]], object]] = [
            store.get,
            store.contains,
            store.delete,
            lambda keys: store.put([Item(key, []) for key in keys]),
        ]
        for call in calls:
            _expect_error(ValueError, lambda call=call: call([b"short"]))  # type: ignore[misc]
            _expect_error(TypeError, lambda call=call: call(["0" * 32]))  # type: ignore[misc]
        assert list(store.entries()) == []


def _expect_error(kind: type[Exception], call: Callable[[], object]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


@_check
def passed_deadlines_change_nothing(subject: StoreSubject) -> None:
    """After its deadline a call finds the store unavailable, has changed nothing, and counts it."""
    with opened(subject) as store:
        store.put([item_of(1)])
        late = Deadline.after(-1)
        for outcome in (
            *store.get([key_of(1)], deadline=late),
            *store.contains([key_of(1)], deadline=late),
            *store.delete([key_of(1)], deadline=late),
            *store.put([item_of(2)], deadline=late),
            store.usage(deadline=late),
        ):
            assert isinstance(outcome, Unavailable), f"no time was left; got {outcome}"
        assert store.contains([key_of(1), key_of(2)]) == [Present(), Miss()]
        assert store.stats.unavailable == 4


@_check
def closed_stores_are_unavailable(subject: StoreSubject) -> None:
    """A closed store raises nothing, and closing twice is fine."""
    with opened(subject) as store:
        store.put([item_of(1)])
        store.close()
        assert isinstance(store.get([key_of(1)])[0], Unavailable)
        assert isinstance(store.put([item_of(1)])[0], Unavailable)
        assert isinstance(store.contains([key_of(1)])[0], Unavailable)
        assert isinstance(store.delete([key_of(1)])[0], Unavailable)
        assert isinstance(store.usage(), Unavailable)


@_check
def outcomes_are_counted(subject: StoreSubject) -> None:
    """`stats` counts keys by outcome, and the bytes of values."""
    with opened(subject) as store:
        store.put([item_of(1), item_of(2)])
        store.get([key_of(1), key_of(2), key_of(3)])
        stats = store.stats
        assert (stats.stored, stats.hits, stats.misses) == (2, 2, 1)
        assert stats.bytes_written == stats.bytes_read == 2000
        store.get([key_of(1)])
        assert stats.hits == 2, "stats are of the moment when they were asked for"


@_check
def budget_is_held(subject: StoreSubject) -> None:
    """A store never holds more than its budget, and refuses what is larger, by name."""
    if not subject.has_budget:
        return
    budget = 50_000
    with opened(subject, budget) as store:
        assert isinstance(store.put([item_of(0, budget + 1)])[0], Refused)
        for number in range(_MANY):
            assert store.put([item_of(number, 3000)]) == [Stored()]
            usage = store.usage()
            assert isinstance(usage, Usage)
            assert usage.nbytes <= budget, f"{usage.nbytes} of {budget} bytes are held"
            assert usage.budget == budget
        held = sum(entry.nbytes for entry in store.entries())
        assert budget // 2 < held <= budget, f"{held} of {budget} bytes are held"
        assert store.stats.evicted > 0


@_check
def used_entries_stay(subject: StoreSubject) -> None:
    """Of entries that must go, those that were read lately stay longer."""
    if not subject.has_budget:
        return
    with opened(subject, 50_000) as store:
        for number in range(_MANY):
            store.put([item_of(number, 3000)])
            store.get([key_of(0)])
        expect_value(store.get([key_of(0)])[0], 0, 3000)
        assert store.contains([key_of(1)]) == [Miss()]


@_check
def threads_read_whole_values(subject: StoreSubject) -> None:
    """Threads that put, get and delete the same keys read whole values or none."""
    troubles: list[object] = []
    budget = 100_000 if subject.has_budget else None
    with opened(subject, budget) as store:

        def work(seed: int) -> None:
            try:
                _work(store, random.Random(seed), troubles)  # noqa: S311 - repeatable
            except Exception as error:  # noqa: BLE001 - reported by the main thread
                troubles.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        usage = store.usage()
        assert isinstance(usage, Usage)
        assert budget is None or usage.nbytes <= budget
    assert not troubles, troubles[:3]


def _work(store: Store, choices: random.Random, troubles: list[object]) -> None:
    for _ in range(40):
        number = choices.randrange(8)
        call = choices.randrange(4)
        if call == 0:
            store.put([item_of(number, 20_000)])
        elif call == 1:
            store.delete([key_of(number)])
        else:
            [outcome] = store.get([key_of(number)])
            if isinstance(outcome, Hit):
                if bytes(outcome.value) != value_of(number, 20_000):
                    troubles.append(f"the value of {number} is wrong")
            elif outcome != Miss():
                troubles.append(outcome)


@_check
def values_survive_reopening(subject: StoreSubject) -> None:
    """A value that one store object has put is found by the next one of the same place."""
    if not subject.persistent:
        return
    with opened(subject) as store:
        store.put([item_of(1), item_of(2)])
        store.delete([key_of(2)])
    with opened(subject) as store:
        expect_value(store.get([key_of(1)])[0], 1)
        assert store.get([key_of(2)]) == [Miss()]
        assert [entry.key for entry in store.entries()] == [key_of(1)]


@_check
def two_stores_share_a_place(subject: StoreSubject) -> None:
    """Two store objects of one place see what the other puts and deletes, at once."""
    if not subject.persistent:
        return
    with opened(subject) as one, opened(subject) as two:
        one.put([item_of(1)])
        expect_value(two.get([key_of(1)])[0], 1)
        two.delete([key_of(1)])
        assert one.get([key_of(1)]) == [Miss()]


def _flipped(position: float) -> Change:
    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[int(position * (len(data) - 1))] ^= 0x10
        return bytes(changed)

    return change


_DAMAGES: dict[str, Change] = {
    **{f"bit flipped at {place}": _flipped(place) for place in (0.0, 0.003, 0.3, 0.7, 1.0)},
    "truncated": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda _: b"",
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "a hole": lambda data: data[:4096] + bytes(4096) + data[8192:],
    "foreign": lambda _: b"something else",
}


@_check
def damage_is_never_read(subject: StoreSubject) -> None:
    """A damaged value is an outcome :class:`Corrupt`, once; it is removed and can be put again."""
    if subject.damage is None:
        return
    with opened(subject) as store:
        for count, (name, change) in enumerate(_DAMAGES.items(), start=1):
            store.put([item_of(1, 50_000)])
            subject.damage(store, key_of(1), change)
            [outcome] = store.get([key_of(1)])
            assert isinstance(outcome, Corrupt), f"{name}: got {outcome}"
            assert store.stats.corrupt == count
            assert store.get([key_of(1)]) == [Miss()], f"{name}: what is damaged is removed"
        store.put([item_of(1, 50_000)])
        expect_value(store.get([key_of(1)])[0], 1, 50_000)


@_check
def swapped_values_are_never_read(subject: StoreSubject) -> None:
    """A whole value that lies under the key of another one is :class:`Corrupt`."""
    if subject.damage is None:
        return
    with opened(subject) as store:
        store.put([item_of(1), item_of(2)])
        taken: list[bytes] = []

        def take(data: bytes) -> bytes:
            taken.append(data)
            return data

        subject.damage(store, key_of(1), take)
        subject.damage(store, key_of(2), lambda _: taken[0])
        [outcome] = store.get([key_of(2)])
        assert isinstance(outcome, Corrupt), f"the value of another key was read: {outcome}"
