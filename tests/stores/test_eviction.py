"""Stores within a budget, by the policies of prefix caches."""

import pytest

from kvcache.prefix.policies import LRU, POLICIES, Cost, EvictionPolicy
from kvcache.stores import FileStore, Item, Label, MemoryStore, Present, Stored, Unavailable

from .values import item_of, key_of, value_of

SIZE = 1000
STORES = {
    "memory": lambda place, values, policy: MemoryStore(values * SIZE, policy),
    "files": lambda place, values, policy: FileStore(place, values * (SIZE + 144), policy),
}


@pytest.fixture(params=STORES)
def make(request, tmp_path):
    """Make a store for so many values of SIZE bytes."""
    return lambda values, policy=None: STORES[request.param](tmp_path, values, policy)


def put(store, number, start=0, stop=1):
    item = Item(key_of(number), [value_of(number, SIZE)], Label(start=start, stop=stop))
    assert store.put([item]) == [Stored()]


def held(store, numbers):
    return [number for number in numbers if store.contains([key_of(number)]) == [Present()]]


@pytest.mark.parametrize("policy", [None, *POLICIES])
def test_the_budget_is_held_by_every_policy(make, policy):
    with make(5, None if policy is None else POLICIES[policy]()) as store:
        for number in range(30):
            put(store, number, number, number + 1)
            store.get([key_of(number // 2)])
            if number % 7 == 0:
                store.delete([key_of(number - 1)])
            assert store.usage().nbytes <= store.usage().budget
        assert len(held(store, range(30))) == 5
        assert store.stats.evicted >= 20


@pytest.mark.parametrize("policy", [None, LRU])
def test_the_least_recently_used_goes(make, policy):
    with make(3, policy and policy()) as store:
        for number in range(3):
            put(store, number)
        store.get([key_of(0)])
        put(store, 3)
        assert held(store, range(4)) == [0, 2, 3]


def test_what_costs_least_to_compute_goes(make):
    with make(3, Cost()) as store:
        put(store, 0, 0, 10_000)
        put(store, 1, 0, 10)
        put(store, 2, 0, 5000)
        put(store, 3, 0, 20)
        assert held(store, range(4)) == [0, 2, 3]


def test_uses_of_other_processes_count(tmp_path):
    budget = 3 * (SIZE + 144)
    with FileStore(tmp_path, budget, LRU()) as one, FileStore(tmp_path, budget) as two:
        for number in range(3):
            put(one, number)
        put(one, 3)
        two.get([key_of(1)])
        two.put([item_of(1, SIZE)])  # notes its uses
        two.delete([key_of(2)])
        put(one, 4)
        put(one, 5)
        assert held(one, range(6)) == [1, 4, 5]


def test_a_policy_that_chooses_anything_makes_no_error(make):
    class Strange(LRU):
        def victim(self, now):
            return "the first"

    with make(1, Strange()) as store:
        put(store, 0)
        [outcome] = store.put([item_of(1, SIZE)])
        assert outcome == Unavailable(
            "TypeError: a policy chooses among the candidates; got 'the first'"
        )
        assert held(store, range(2)) == [0]


def test_a_policy_without_a_choice_is_helped(make):
    class Idle(EvictionPolicy):
        def offer(self, span):
            pass

        def withdraw(self, span):
            pass

        def victim(self, now):
            return None

    with make(2, Idle()) as store:
        for number in range(4):
            put(store, number)
        assert held(store, range(4)) == [2, 3]
