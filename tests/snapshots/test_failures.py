"""Snapshots split, merge, move and close whole, or stay as they are; nothing stays pinned."""

from contextlib import nullcontext

import numpy as np
import pytest

from kvcache.snapshots.rows import RowOwner, TokenRows
from kvcache.snapshots.schedule import ResumePoints
from kvcache.snapshots.snapshot import CacheSpec, Part, Snapshot
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.arrays import NamedArray

SPEC = CacheSpec("kv", Visibility(), "float32")


class Owner(RowOwner):
    """A cache whose slot s holds the row s; one call that reads or pins rows raises."""

    token_bytes = 4

    def __init__(self):
        self.lock, self.pinned = nullcontext(), {}
        self.calls, self.at = 0, None

    def _work(self, work):
        self.calls += 1
        if self.calls == self.at:
            raise MemoryError
        return work()

    def read(self, slots):
        return self._work(lambda: content(slots))

    def pin(self, rows):
        self._work(lambda: self.pinned.setdefault(rows))

    def unpin(self, rows):
        self.pinned.pop(rows, None)


def content(slots):
    return {0: (NamedArray("keys", np.asarray(slots, np.float32)[:, None]),)}


def resident(owner, start, stop):
    return TokenRows.resident(np.arange(start, stop, dtype=np.int32), owner, np.arange(start, stop))


def snapshot(owners, start, stop):
    """A snapshot with a part for each owner; for None the rows are on the host."""
    rows = [
        TokenRows(np.arange(start, stop, dtype=np.int32), content(np.arange(start, stop)))
        if owner is None
        else resident(owner, start, stop)
        for owner in owners
    ]
    return Snapshot(start, stop, [Part(SPEC, part) for part in rows])


def seen(rows):
    layers = rows.content()
    values = layers[0][0].data[:, 0].tolist() if layers else []
    return rows.positions.tolist(), values, rows.owner is None, rows.host_nbytes


def failures(build, change):
    """Let `change` fail at every call of an owner; yield each world.

    build: makes owner, and what `change` takes.
    """
    at, failed = 1, True
    while failed:
        owner, *arguments = build()
        before = len(owner.pinned)
        owner.calls, owner.at = 0, at
        try:
            change(*arguments)
            failed = False
        except MemoryError:
            owner.at = None
            assert len(owner.pinned) == before, f"call {at} leaves rows pinned, or unpinned"
            yield at, arguments
        at += 1
    assert at > 1, "nothing can fail here"


def two():
    """A snapshot in slots and on the host, and the next one in slots."""
    owner = Owner()
    return owner, snapshot([owner, None, owner], 0, 5), snapshot([owner, owner, owner], 5, 8)


@pytest.mark.parametrize(
    "change",
    [
        lambda one, two: one.split(2),
        lambda one, two: one.merge(two),
        lambda one, two: one.union(two),
        lambda one, two: one.to_host(),
    ],
    ids=["split", "merge", "union", "to_host"],
)
def test_snapshot(change):
    expected = [[seen(part.rows) for part in taken.parts] for taken in two()[1:]]
    for at, snapshots in failures(two, change):
        found = [[seen(part.rows) for part in taken.parts] for taken in snapshots]
        assert found == expected, f"call {at}"
        joined = snapshots[0].merge(snapshots[1])
        assert [seen(part.rows)[:2] for part in joined.parts] == [
            (list(range(8)), [float(p) for p in range(8)])
        ] * 3


def test_what_could_be_joined_is_closed_and_unpinned():
    owner, one, other = two()
    joined = one.merge(other)
    assert len(owner.pinned) == 2, "the part with rows on the host is on the host"
    joined.close()
    assert not owner.pinned
    assert [part.rows.positions.size for part in (*one.parts, *other.parts)] == [0] * 6


def retained():
    owner = Owner()
    points = ResumePoints([4, 9])
    points.retain(4, resident(owner, 1, 4))
    return owner, points


def state(points):
    return points.scheduled, seen(points.retained)


def test_retain():
    """Rows that cannot be retained are given back; they come again."""
    expected = state(retained()[1])

    def build():
        owner, points = retained()
        return owner, points, owner

    def retain(points, owner):
        points.retain(9, resident(owner, 2, 9))

    for at, (points, owner) in failures(build, retain):
        assert state(points) == expected, f"call {at}"
        retain(points, owner)
        assert points.retained.positions.tolist() == list(range(1, 9))
        assert not points.scheduled
        assert len(owner.pinned) == 1


def test_forget():
    expected = state(retained()[1])
    for at, (points,) in failures(retained, lambda points: points.forget(2)):
        assert state(points) == expected, f"call {at}"


def test_nothing_is_pinned_by_what_is_forgotten():
    owner, points = retained()
    points.forget(0)
    assert points.retained is None
    points.retain(9, resident(owner, 0, 0))  # of a point that needs no row
    points.forget(9)
    assert points.retained is None
    assert not owner.pinned


def test_adding_retained_rows_to_others():
    """The rows given are closed in any case: they are no one's otherwise."""
    expected = state(retained()[1])

    def build():
        owner, points = retained()
        return owner, points, owner

    def add(points, owner):
        return points.add_to(resident(owner, 4, 6), 0, 6)

    for at, (points, owner) in failures(build, add):
        assert state(points) == expected, f"call {at}"
        assert add(points, owner).positions.tolist() == [1, 2, 3, 4, 5]


class Locked(Owner):
    """A cache that other threads use, too: it is looked at under its lock alone."""

    def __init__(self):
        super().__init__()
        self.lock, self.held, self.taken = self, 0, 0

    def __enter__(self):
        self.taken += not self.held
        self.held += 1

    def __exit__(self, *error):
        self.held -= 1

    def _work(self, work):
        assert self.held, "used without its lock"
        return super()._work(work)

    def unpin(self, rows):
        assert self.held, "used without its lock"
        super().unpin(rows)

    def detached(self, slots):
        copies = Owner()
        copies.own_arrays = 1
        return self._work(lambda: (copies, slots))


def guarded(start, stop):
    """Rows of two caches, and of the host between them."""
    owners = [Locked(), None, Locked()]
    for owner in filter(None, owners):
        owner.held += 1
    taken = snapshot(owners, start, stop)
    for owner in filter(None, owners):
        owner.held = owner.taken = 0
    return taken


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.detach(),
        lambda one: one.to_host(),
        lambda one: one.split(2),
        lambda one: one.copy(),
        lambda one: one.merge(guarded(5, 8)),
        lambda one: guarded(0, 5).union(one),
        lambda one: one.needed_at(5),
        lambda one: one.needed_by(np.array([3, 5])),
        lambda one: one.close(),
    ],
    ids=["detach", "to_host", "split", "copy", "merge", "union", "at", "by", "close"],
)
def test_rows_change_under_the_locks_of_their_caches(change):
    """Taken once, for all of a change: another thread may spill rows at any other time."""
    one = guarded(0, 5)
    owners = [part.rows.owner for part in one.parts]
    change(one)
    assert [(owner.held, owner.taken) for owner in owners if owner] == [(0, 1)] * 2


def test_frames_of_one_position_stay_in_their_order():
    """Rows of an encoder's output have one position, and are joined with those around them."""
    frames = np.arange(100, 400)
    media = TokenRows(np.full(frames.size, 3, np.int32), content(frames))
    around = TokenRows(np.array([1, 2, 4, 5], np.int32), content(np.array([1, 2, 4, 5])))
    joined = around.joined(media)
    assert seen(joined)[:2] == (
        [1, 2, *[3] * frames.size, 4, 5],
        [1, 2, *frames.astype(float), 4, 5],
    )
