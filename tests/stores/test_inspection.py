"""A store as a whole: trees by parents, damage that reading finds, and what is chosen to go."""

import random

import pytest

from kvcache.stores import (
    Corrupt,
    Entry,
    FileStore,
    Hit,
    Item,
    Label,
    MemoryStore,
    Miss,
    Present,
    Seal,
    Unavailable,
    open_store,
)
from kvcache.stores.inspection import beyond, forest, older_than, remove, verify

from .values import LABEL, item_of, key_of, page_item

NOBODY = bytes(32)


def entry(number, parent=None, start=0, stop=0, used=1.0, nbytes=10):
    parent = NOBODY if parent is None else key_of(parent)
    return Entry(key_of(number), nbytes, Label(NOBODY, parent, start, stop), used)


def named(runs):
    """Return runs as lists of numbers with what branches off."""
    numbers = {key_of(number): number for number in range(100)}
    return [
        ([numbers[entry.key] for entry in run.entries], named(run.branches))
        if run.branches
        else [numbers[entry.key] for entry in run.entries]
        for run in runs
    ]


def test_entries_one_behind_the_other_are_one_run():
    entries = [entry(0, None, 0, 4), entry(1, 0, 4, 8), entry(2, 1, 8, 12)]
    random.Random(0).shuffle(entries)
    [run] = forest(entries)
    assert named([run]) == [[0, 1, 2]]
    assert (run.start, run.stop, run.is_cut_off) == (0, 12, False)


def test_a_prefix_branches_where_sequences_part():
    entries = [entry(0), entry(1, 0), entry(2, 1, used=3), entry(3, 2), entry(4, 1, used=2)]
    assert named(forest(entries)) == [([0, 1], [[2, 3], [4]])]


def test_prefixes_used_last_come_first():
    entries = [entry(0, used=1), entry(1, used=2), entry(2, used=0), entry(3, 2, used=5)]
    assert named(forest(entries)) == [[2, 3], [1], [0]]


def test_a_prefix_whose_beginning_is_gone_is_cut_off():
    [run] = forest([entry(1, 0, 4, 8)])
    assert run.is_cut_off


def test_parents_in_a_circle_are_entries_all_the_same():
    entries = [entry(0, 2), entry(1, 0), entry(2, 1), entry(3, 3), entry(4)]
    runs = forest(entries)
    assert sorted(e.key for run in runs for e in run.all_entries()) == sorted(map(key_of, range(5)))


def test_a_long_chain_and_many_branches_need_no_recursion():
    # Behind each even one the next even one, and an odd one as a branch of its own.
    parents = [None, *((number - 1) // 2 * 2 for number in range(1, 6001))]
    [root] = forest([entry(number, parent) for number, parent in enumerate(parents)])
    assert len(root.all_entries()) == 6001
    assert sum(not run.branches for run in root.runs()) == 3001


@pytest.mark.parametrize("seed", range(20))
def test_every_entry_is_in_the_forest_once_behind_its_parent(seed):
    choose = random.Random(seed)
    entries = [
        entry(number, choose.choice([None, *range(number)]) if number else None, used=number)
        for number in range(30)
    ]
    choose.shuffle(entries)
    behind = {}
    for root in forest(entries):
        for run in root.runs():
            for one, following in zip(run.entries, run.entries[1:], strict=False):
                behind[following.key] = one.key
            for branch in run.branches:
                behind[branch.entries[0].key] = run.entries[-1].key
        behind[root.entries[0].key] = NOBODY
    assert behind == {one.key: one.label.parent for one in entries}


# Values.


def findings_of(store, seal=None):
    read = []
    found = list(verify(store, list(store.entries()), 60.0, read.append, seal))
    assert sum(read) == sum(finding.entry.nbytes for finding in found)
    return {finding.entry.key: (finding.state, finding.reason) for finding in found}


def test_values_are_whole_whether_they_are_pages_or_not():
    store = MemoryStore()
    store.put([item_of(0), page_item(1), Item(key_of(2), [])])
    assert findings_of(store) == {key_of(number): ("whole", "") for number in range(3)}


def test_a_flipped_bit_is_damage_which_the_read_removes(tmp_path):
    with FileStore(tmp_path) as store:
        store.put([item_of(0), item_of(1)])
        [path] = tmp_path.glob(f"objects/*/{key_of(1).hex()}")
        data = bytearray(path.read_bytes())
        data[200] ^= 1
        path.write_bytes(data)
        found = findings_of(store)
        assert found[key_of(0)] == ("whole", "")
        state, reason = found[key_of(1)]
        assert (state, "does not match its checksum" in reason) == ("damaged", True)
        assert store.contains([key_of(0), key_of(1)]) == [Present(), Miss()]


def test_a_page_that_does_not_fit_its_label_is_damaged_and_stays():
    item = page_item(0)
    store = MemoryStore()
    store.put([item._replace(label=item.label._replace(start=0, stop=2))])
    [(state, reason)] = findings_of(store).values()
    assert state == "damaged"
    assert "positions of a page ascend within [0, 2)" in reason
    assert store.contains([item.key]) == [Present()]


def test_a_seal_opens_the_pages_of_its_tenant_only():
    pytest.importorskip("cryptography", reason="needs pip install 'kvcache[seal]'")
    own, other = Seal(bytes(32)), Seal(bytes([1]) * 32)
    forged = page_item(2, seal=own)
    forged.buffers[-2] = bytes(len(forged.buffers[-2]))
    store = MemoryStore()
    store.put([page_item(0, seal=own), page_item(1, seal=other), forged, page_item(3), item_of(4)])
    assert {state for state, _ in findings_of(store).values()} == {"whole"}
    found = findings_of(store, own)
    states = [found[key_of(number)][0] for number in range(5)]
    assert states == ["whole", "foreign", "foreign", "whole", "whole"]
    assert "sealed with another secret, or changed since" in found[key_of(1)][1]


class Answering(MemoryStore):
    """A store that answers every read alike."""

    def __init__(self, outcome):
        super().__init__()
        self.outcome = outcome
        self.asked = []

    def _get(self, keys, deadline):
        self.asked.append(len(keys))
        return [self.outcome] * len(keys)

    def _delete(self, keys, deadline):
        if isinstance(self.outcome, Unavailable):
            return [self.outcome] * len(keys)
        return super()._delete(keys, deadline)


@pytest.mark.parametrize(
    ("outcome", "state", "reason"),
    [
        (Miss(), "gone", "removed since, or it lost a part"),
        (Unavailable("away"), "unread", "away"),
        (Corrupt("bad"), "damaged", "bad"),
        (Hit(memoryview(b"it")), "whole", ""),
    ],
)
def test_each_outcome_is_told_apart(outcome, state, reason):
    store = Answering(outcome)
    store.put([item_of(0)])
    assert findings_of(store) == {key_of(0): (state, reason)}


def test_reads_are_bounded_by_keys_and_by_bytes():
    store = Answering(Miss())
    small = [entry(number) for number in range(250)]
    assert len(list(verify(store, small, 60.0, lambda _: None))) == 250
    large = [entry(number, nbytes=40 << 20) for number in range(3)]
    list(verify(store, [*large, entry(4, nbytes=24 << 20)], 60.0, lambda _: None))
    assert store.asked == [100, 100, 50, 1, 1, 2]


# What goes.


def test_entries_of_an_unknown_time_are_not_old():
    entries = [entry(0, used=0.0), entry(1, used=5.0), entry(2, used=6.0)]
    assert older_than(entries, 6.0) == [entries[1]]


@pytest.mark.parametrize(
    ("nbytes", "numbers"), [(40, []), (39, [3]), (30, [3]), (29, [3, 1]), (0, [3, 1, 0, 2])]
)
def test_the_least_recently_used_go_first_and_ends_before_beginnings(nbytes, numbers):
    entries = [
        entry(0, None, 0, 4, used=2.0),
        entry(1, 0, 4, 8, used=2.0),
        entry(2, None, 0, 4, used=3.0),
        entry(3, None, 0, 2, used=1.0),
    ]
    assert [e.key for e in beyond(entries, nbytes)] == [key_of(number) for number in numbers]


def test_removals_are_counted_by_outcome():
    store, done = MemoryStore(), []
    store.put([item_of(number) for number in range(150)])
    entries = [entry(number) for number in range(160)]
    assert remove(store, entries, 60.0, done.append) == (150, 10, 0)
    assert done == [100, 60]
    assert list(store.entries()) == []
    away = Answering(Unavailable("away"))
    assert remove(away, entries[:2], 60.0, done.append) == (0, 0, 2)


def test_what_servers_lost_and_damaged(redis_server):
    """A chunk of one value is gone, that of another one has a flipped bit, the third is whole."""
    redis_server.clear()
    names = {}
    with open_store(redis_server.url, chunk_nbytes=1 << 16) as store:
        for number in range(3):
            before = {*redis_server.names()}
            store.put([item_of(number, 300_000)])
            names[number] = sorted({*redis_server.names()} - before, key=len)
        redis_server.ask("DEL", names[0][-1])
        damaged = bytearray(redis_server.read(names[1][-1]))
        damaged[5] ^= 1
        redis_server.write(names[1][-1], bytes(damaged))
        [*entries] = store.entries()
        assert [run.entries[0].label for run in forest(entries)] == [LABEL] * 3
        states = {key: state for key, (state, _) in findings_of(store).items()}
        assert states == {key_of(0): "gone", key_of(1): "damaged", key_of(2): "whole"}
