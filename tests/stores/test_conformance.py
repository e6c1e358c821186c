"""Every store against the public suite, and broken stores, which it must find out."""

import numpy as np
import pytest

from kvcache.stores import (
    NEVER,
    Corrupt,
    Deleted,
    FileStore,
    Hit,
    MemoryStore,
    Miss,
    ObjectStore,
    Present,
    Stored,
    Unavailable,
)
from kvcache.testing import StoreSuite
from kvcache.testing.store_checks import STORE_CHECKS
from kvcache.testing.store_subject import StoreSubject


def damage_file(store, key, change):
    [path] = store.directory.glob(f"objects/*/{key.hex()}")
    path.write_bytes(change(path.read_bytes()))


class TestMemoryStore(StoreSuite):
    persistent = False

    def open_store(self, place, budget):
        return MemoryStore(budget)


class TestFileStore(StoreSuite):
    def open_store(self, place, budget):
        return FileStore(place / "made when needed" / "cache", budget)

    def damage(self, store, key, change):
        damage_file(store, key, change)


class TestObjectStoreInMemory(StoreSuite):
    has_budget = False

    def open_store(self, place, budget):
        return ObjectStore(f"memory:/{place}")

    def damage(self, store, key, change):
        path = store._path(key)
        data = store._system.cat_file(path)
        store._system.pipe_file(path, change(data))


class TestObjectStoreOfFiles(TestObjectStoreInMemory):
    def open_store(self, place, budget):
        return ObjectStore(f"file://{place}")


class KeepsBuffers(MemoryStore):
    """Holds the buffers of its callers instead of copies."""

    def _put(self, items, deadline):
        outcomes = super()._put(items, deadline)
        for item in items:
            if len(item.buffers) == 1:
                self._held[item.key] = self._held[item.key]._replace(value=item.buffers[0])
        return outcomes


class Writable(MemoryStore):
    def _get(self, keys, deadline):
        return [
            Hit(memoryview(bytearray(outcome.value)), outcome.label)
            if isinstance(outcome, Hit)
            else outcome
            for outcome in super()._get(keys, deadline)
        ]


class EmptyForMissing(MemoryStore):
    def _get(self, keys, deadline):
        return [
            Hit(memoryview(b"")) if isinstance(outcome, Miss) else outcome
            for outcome in super()._get(keys, deadline)
        ]


class Unordered(MemoryStore):
    def _get(self, keys, deadline):
        return sorted(super()._get(keys, deadline), key=lambda outcome: isinstance(outcome, Miss))


class ForgetsLabels(MemoryStore):
    def _put(self, items, deadline):
        return super()._put(
            [item._replace(label=item.label._replace(start=0)) for item in items], deadline
        )


class FirstBufferOnly(MemoryStore):
    def _put(self, items, deadline):
        return super()._put([item._replace(buffers=item.buffers[:1]) for item in items], deadline)


class DeletesNothing(MemoryStore):
    def _delete(self, keys, deadline):
        return [Deleted() if key in self._held else Miss() for key in keys]


class OverBudget(MemoryStore):
    def _evict(self, incoming):
        pass


class TakesAnything(MemoryStore):
    def _put_one(self, item):
        super()._put_one(item)
        return Stored()


class FirstInFirstOut(MemoryStore):
    def _get_one(self, key):
        held = self._held.get(key)
        return Miss() if held is None else Hit(held.value, held.label)


class AlwaysPresent(MemoryStore):
    def _contains(self, keys, deadline):
        return [Present()] * len(keys)


class ListsNothing(MemoryStore):
    def _entries(self, deadline):
        return iter(())


class IgnoresDeadlines(MemoryStore):
    def _answers(self, asked, ask, deadline):
        return list(ask())


class Raises(MemoryStore):
    def get(self, keys, *, deadline=None):
        if self._closed:
            raise OSError("closed")
        return super().get(keys)


class Unchecked(FileStore):
    """Believes its files."""

    def _read(self, key, deadline):
        [path] = [*self.directory.glob(f"objects/*/{key.hex()}")] or [None]
        return Miss() if path is None else Hit(memoryview(path.read_bytes())[128:-16])


class KeepsDamage(FileStore):
    def _discarded(self, key, status, reason):
        return Corrupt(reason)


class Forgets(FileStore):
    def _close(self):
        for entry in list(self._entries(NEVER)):
            self._directory.path_of(entry.key).unlink()
        super()._close()


class SharesTornValues(MemoryStore):
    """Gives a value while it is being written."""

    def _put_one(self, item):
        outcome = super()._put_one(item)
        held = self._held.get(item.key)
        if held is not None and item.nbytes == 20_000:
            torn = np.zeros(20_000, np.uint8)
            self._held[item.key] = held._replace(value=torn.data.toreadonly())
        return outcome


BROKEN = {
    KeepsBuffers: "buffers_are_free_after_put",
    Writable: "values_are_read_only_bytes",
    EmptyForMissing: "outcomes_in_order",
    Unordered: "outcomes_in_order",
    ForgetsLabels: "values_come_back",
    FirstBufferOnly: "values_come_back",
    DeletesNothing: "deleted_is_gone",
    OverBudget: "budget_is_held",
    TakesAnything: "budget_is_held",
    FirstInFirstOut: "used_entries_stay",
    AlwaysPresent: "outcomes_in_order",
    ListsNothing: "entries_are_listed",
    IgnoresDeadlines: "passed_deadlines_change_nothing",
    Raises: "closed_stores_are_unavailable",
    Unchecked: "damage_is_never_read",
    KeepsDamage: "damage_is_never_read",
    Forgets: "values_survive_reopening",
    SharesTornValues: "threads_read_whole_values",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_the_suite_finds_out(broken, tmp_path):
    of_files = issubclass(broken, FileStore)
    subject = StoreSubject(
        (lambda budget: broken(tmp_path, budget)) if of_files else broken,
        of_files,
        damage=damage_file,
    )
    [check] = [check for check in STORE_CHECKS if check.__name__ == BROKEN[broken]]
    with pytest.raises((AssertionError, OSError)):
        check(subject)


def test_swapped_values_are_found_out(tmp_path):
    class Swaps(FileStore):
        def _read(self, key, deadline):
            outcome = super()._read(key, deadline)
            return Hit(memoryview(b"")) if isinstance(outcome, Corrupt) else outcome

    subject = StoreSubject(lambda budget: Swaps(tmp_path, budget), damage=damage_file)
    [check] = [check for check in STORE_CHECKS if check.__name__ == "swapped_values_are_never_read"]
    with pytest.raises(AssertionError, match="the value of another key was read"):
        check(subject)


def test_a_trouble_of_one_key_is_not_that_of_all(tmp_path):
    class OneFails(FileStore):
        def _look_up(self, key):
            if key == bytes(32):
                raise OSError("no such disk")
            return super()._look_up(key)

    with OneFails(tmp_path) as store:
        assert store.contains([bytes(32), b"k" * 32]) == [
            Unavailable("OSError: no such disk"),
            Miss(),
        ]
