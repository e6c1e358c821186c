"""Pools handed out in pages: where tokens lie, when a page is copied, what kernels are told."""

import pickle

import numpy as np
import pytest

from kvcache import (
    Batch,
    CacheConfig,
    CacheFullError,
    CausalCache,
    ExportedError,
    KVCacheError,
    NotSupportedError,
    PrefixCache,
    ShapeError,
    functional,
    get_backend,
)

from .. import peek
from .oracle import add_positions, attended, check_table, fingerprint, put_tokens
from .paging import check_block_table

NUMPY = get_backend("numpy")
ROWS_FIRST = CacheConfig(key_layout="thd", value_layout="thd")


def make(page=4, backend=NUMPY, max_sequences=4, capacity=16, max_batch=16, config=None, **limits):
    cache = CausalCache(page=page, **limits)
    if config is not None:
        cache.set_config(config)
    cache.init(backend, max_sequences=max_sequences, capacity=capacity, max_batch=max_batch)
    return cache


def store(cache, *groups):
    """One pass; ``(sequence, positions)`` each. A token is called by its position."""
    pairs = [(position, sequence) for sequence, positions in groups for position in positions]
    positions, sequences = map(list, zip(*pairs, strict=True))
    cache.start_forward(Batch(positions, sequences))
    put_tokens(peek.buffers(cache).backend, cache, positions, positions)
    return positions, sequences


def go_on(cache, *sequences):
    """One more token of each sequence, which sees all of its sequence."""
    positions, ids = store(cache, *((s, [cache.next_position(s)]) for s in sequences))
    check_table(peek.table(cache)) if not peek.pinned_rows(cache) else None
    check_block_table(cache, positions, ids)
    backend = peek.buffers(cache).backend
    for layer in range(2):
        for seen, position in zip(attended(backend, cache, layer), positions, strict=True):
            low = 0 if cache.window is None else max(0, position - cache.window + 1)
            assert seen == [(p, p) for p in range(low, position + 1)]


def pages(cache, sequence):
    """The pages of a sequence, in order."""
    cells = peek.table(cache).cells_of(sequence)
    return list(dict.fromkeys((cells // cache.page).tolist()))


def free_pages(cache):
    return peek.table(cache).free // cache.page


def reads_counted(monkeypatch, backend=NUMPY):
    """Counts the rows gathered from buffers."""
    calls, read = [], type(backend).read_rows

    def counted(self, buffer, index, axis):
        calls.append(index.size)
        return read(self, buffer, index, axis)

    monkeypatch.setattr(type(backend), "read_rows", counted)
    return calls


# Sizes.


@pytest.mark.parametrize("page", [0, -4, 3, 12])
def test_a_page_is_a_power_of_two(page):
    with pytest.raises(ValueError, match=rf"page must be a power of two, in cells; got {page}\."):
        CausalCache(page=page)


@pytest.mark.parametrize("page", ["16", 4.0, None])
def test_a_page_is_an_integer(page):
    with pytest.raises(TypeError, match="page must be an integer"):
        CausalCache(page=page)


def test_a_page_is_no_larger_than_a_sequence():
    cache = CausalCache(page=32)
    with pytest.raises(ValueError, match=r"got page=32 for a capacity of 16\. Give a smaller page"):
        cache.init("numpy", capacity=16, max_batch=4)
    cache.init("numpy", capacity=32, max_batch=4)
    assert cache.cells == 32


def test_a_pool_has_whole_pages_of_every_sequence_and_of_its_padding():
    assert make(page=8, capacity=9, max_sequences=3).cells == 3 * 16
    assert make(page=8, capacity=9, config=CacheConfig(padding=6), max_sequences=3).cells == 48
    assert make(page=8, capacity=9, config=CacheConfig(padding=5), max_sequences=1).cells == 40


def test_a_window_has_room_for_every_pass_wherever_its_sequences_begin():
    cache = make(window=6, max_sequences=3, capacity=64, max_batch=7)
    nexts = [0, 0, 0]
    for step in range(60):
        counts = [(step * (s + 2)) % 3 for s in range(2)]
        groups = [
            (s, range(nexts[s], nexts[s] + n)) for s, n in enumerate([*counts, 7 - sum(counts)])
        ]
        store(cache, *groups)
        nexts = [positions.stop for _, positions in groups]
        check_table(peek.table(cache))


# Where tokens lie.


def test_sequences_that_grow_side_by_side_fill_pages_of_their_own():
    cache = make()
    for _ in range(9):
        go_on(cache, 2, 0)
    for sequence in (0, 2):
        slots = (peek.table(cache).cells_of(sequence) % 4).tolist()
        assert slots == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert not {*pages(cache, 0)} & {*pages(cache, 2)}


def test_pages_come_back_one_by_one():
    cache = make(max_sequences=1, capacity=16)
    store(cache, (0, range(16)))
    with pytest.raises(CacheFullError, match=r"1 needed, 0 of 4 free\. Remove sequences"):
        cache.start_forward(Batch([16], [0]))
    cache.remove(0, 9)
    assert free_pages(cache) == 1
    cache.remove(0, 8)
    assert free_pages(cache) == 2
    go_on(cache, 0)


def test_tokens_before_others_are_refused():
    cache = make()
    store(cache, (0, [0, 1, 5]))
    before = fingerprint(cache)
    with pytest.raises(NotSupportedError, match="page=4 tokens come after the last of their seq"):
        cache.start_forward(Batch([3], [0]))
    assert fingerprint(cache) == before


def test_a_window_gives_pages_back():
    cache = make(window=8, max_sequences=2, capacity=128, max_batch=8)
    for position in range(100):  # further than rows are wide at first
        go_on(cache, 0)
        held = peek.table(cache).cells_of(0)
        assert len(pages(cache, 0)) <= 3
        found = cache.block_table(host=True)
        assert found.first_positions[0] % 4 == 0  # slot 0 of the page of the oldest token
        assert found.lengths[0] == position + 1 - found.first_positions[0]
        assert found.first_positions[0] <= position + 1 - held.size < found.first_positions[0] + 4


# The last page of a shared prefix.


def test_the_first_sequence_to_go_on_keeps_the_page_and_the_others_copy_it(backend, monkeypatch):
    cache = make(backend=backend)
    store(cache, (0, range(6)))
    cache.copy_prefix(0, 1, 6)
    cache.copy_prefix(0, 2, 5)
    assert pages(cache, 0) == pages(cache, 1) == pages(cache, 2)
    free, last = free_pages(cache), pages(cache, 0)[1]
    go_on(cache, 1)  # no copy: cells behind the last one are free
    assert pages(cache, 1)[1] == last
    assert free_pages(cache) == free
    calls = reads_counted(monkeypatch, backend)
    go_on(cache, 0, 2)
    assert len(calls) == 3  # keys and values of a layer, keys of another
    assert free_pages(cache) == free - 2
    assert [pages(cache, s)[0] for s in range(3)] == [pages(cache, 0)[0]] * 3
    assert len({pages(cache, s)[1] for s in range(3)}) == 3
    for _ in range(6):
        go_on(cache, 0, 1, 2)
    assert len(calls) == 3


def test_whole_pages_are_never_copied(monkeypatch):
    cache = make()
    store(cache, (0, range(8)))
    cache.copy_prefix(0, 1, 8)
    cache.copy_prefix(0, 2, 4)
    calls = reads_counted(monkeypatch)
    go_on(cache, 0, 1, 2)
    assert not calls
    assert pages(cache, 0)[:2] == pages(cache, 1)[:2]


def test_a_copy_that_fails_changes_nothing(monkeypatch):
    cache = make()
    store(cache, (0, range(6)))
    cache.copy_prefix(0, 1, 5)
    before = fingerprint(cache)
    with monkeypatch.context() as patch:
        patch.setattr(type(NUMPY), "read_rows", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            cache.start_forward(Batch([5], [1]))
    assert fingerprint(cache) == before
    go_on(cache, 1, 0)


@pytest.mark.parametrize("name", ["move_tails", "insert", "span"])
@pytest.mark.parametrize("window", [None, 6])
def test_ctrl_c_while_a_page_moves(monkeypatch, name, window):
    cache = make(window=window, memory=window and 6, max_sequences=2, capacity=32, max_batch=16)
    store(cache, (0, range(10)))
    cache.copy_prefix(0, 1, 9)
    seen = [fingerprint(cache)[i] for i in (2, 5, 6)]
    table = peek.table(cache)
    plain = getattr(table, name)

    def struck(*args):
        plain(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(table, name, struck)
    with pytest.raises(KeyboardInterrupt):
        cache.start_forward(Batch([9], [1]))
    monkeypatch.undo()
    assert [fingerprint(cache)[i] for i in (2, 5, 6)] == seen
    assert not peek.buffers(cache).pending.queue
    check_table(table)
    go_on(cache, 0, 1)


def test_a_page_with_slots_that_a_snapshot_keeps_is_copied():
    cache = make()
    store(cache, (0, range(7)))
    with cache.snapshot(0, 5, 7) as kept:
        cache.remove(0, 4)
        go_on(cache, 0)
        cache.remove(0, 5)
        assert kept.resident
        store(cache, (1, range(4)), (2, range(4)), (3, range(4)))
        go_on(cache, 0)
        assert kept.resident


def test_rows_of_snapshots_leave_where_no_page_is_free_for_a_copy():
    cache = make(max_sequences=1, capacity=8)
    store(cache, (0, range(8)))
    kept = cache.snapshot(0)
    cache.remove(0, 5)
    go_on(cache, 0)  # its slot is taken, and so is every page
    assert not kept.resident
    kept.close()


def test_keys_that_were_moved_are_copied_with_their_originals():
    cache = make(shift=add_positions(NUMPY))
    store(cache, (0, range(14)))
    cache.remove(0, 4, 8)  # 8 to 13 are at 4 to 9 now
    cache.copy_prefix(0, 1, 9)
    seen = [(p, p) for p in range(4)] + [(p, p - 4) for p in range(8, 13)]
    for sequence in (0, 1):
        store(cache, (sequence, [cache.next_position(sequence)]))
        [found] = attended(NUMPY, cache, 0)
        assert set(seen) < set(found)
    table = peek.table(cache)
    for sequence in (0, 1):  # a shift goes the whole way from the original key
        assert table.moved_by(table.cells_of(sequence)[4:9]).tolist() == [-4] * 5
    cache.remove(0, 0)  # cells that move belong to one sequence
    cache.remove(1, 0, 4)
    store(cache, (1, [6]))
    [found] = attended(NUMPY, cache, 1)
    assert (12, 4) in found
    assert (8, 0) in found


def test_a_pass_that_copied_a_page_can_be_taken_back():
    cache = make(window=6, memory=6, max_sequences=2, capacity=32, max_batch=16)
    store(cache, (0, range(10)))
    cache.copy_prefix(0, 1, 9)
    before = pages(cache, 0), pages(cache, 1), free_pages(cache)
    cache.start_forward(Batch([10, 9], [0, 1]))
    assert pages(cache, 1) != before[1]
    cache.abort()
    check_table(peek.table(cache))
    assert (pages(cache, 0), pages(cache, 1), free_pages(cache)) == before
    assert not peek.buffers(cache).pending.queue
    for _ in range(9):
        go_on(cache, 0, 1)


# Removal from the middle.


def test_whole_pages_are_removed_from_the_middle():
    cache = make(shift=add_positions(NUMPY), max_sequences=2)
    store(cache, (0, range(14)))
    cache.remove(0, 4, 12)
    store(cache, (0, [6]))
    [seen] = attended(NUMPY, cache, 0)
    assert seen == [(0, 0), (1, 1), (2, 2), (3, 3), (6, 6), (12, 4), (13, 5)]
    cache.remove(0, 0, 4)
    check_table(peek.table(cache))
    assert cache.next_position(0) == 3
    assert free_pages(cache) == 7


@pytest.mark.parametrize("removed", [(3, 7), (4, 7), (3, 8), (0, 2), (5, 9)])
def test_parts_of_pages_are_not_removed_from_the_middle(removed):
    cache = make(shift=add_positions(NUMPY))
    store(cache, (0, range(14)))
    before = fingerprint(cache)
    with pytest.raises(
        NotSupportedError, match=r"pages begin at tokens 0, 4, and so on\. Remove th"
    ):
        cache.remove(0, *removed)
    assert fingerprint(cache) == before
    cache.remove(0, removed[0])  # the end may be anywhere


# Snapshots and prefix sessions.


@pytest.mark.parametrize("cut", [4, 6])
def test_a_snapshot_partly_on_the_host_shares_whole_pages_only(backend, cut):
    cache = make(backend=backend)
    store(cache, (0, range(11)))
    whole = cache.snapshot(0)
    host, resident = whole.split(cut)
    host.to_host()
    cache.restore(1, host, resident)
    shared = {*pages(cache, 0)} & {*pages(cache, 1)}
    assert len(shared) == (2 if cut == 4 else 1)
    host.close(), resident.close()
    go_on(cache, 1)
    go_on(cache, 0, 1)
    check_table(peek.table(cache))


def test_snapshots_of_two_sequences_are_joined_page_by_page():
    cache = make()
    store(cache, (0, range(6)))
    cache.copy_prefix(0, 1, 6)
    go_on(cache, 0, 1)
    store(cache, (1, range(7, 12)))
    first, second = cache.snapshot(0, 0, 6), cache.snapshot(1, 6, 12)
    cache.restore(2, first, second)
    assert pages(cache, 2)[0] == pages(cache, 0)[0]  # 6 and 7 lie behind a copy of 4 and 5
    assert pages(cache, 2)[1] not in (*pages(cache, 0), *pages(cache, 1))
    assert pages(cache, 2)[2] == pages(cache, 1)[2]
    first.close(), second.close()
    go_on(cache, 2)
    go_on(cache, 0, 1, 2)


def test_a_window_is_restored_in_the_slots_that_its_rows_have():
    cache = make(window=6, max_sequences=3, capacity=32, max_batch=16)
    store(cache, (0, range(11)))
    with cache.snapshot(0) as kept:
        cache.restore(1, kept)
        assert set(pages(cache, 1)) <= set(pages(cache, 0))
        moved = make(window=6, max_sequences=3, capacity=32, max_batch=16)
        moved.restore(0, kept.to_host())
    for _ in range(5):
        go_on(cache, 0, 1)
        go_on(moved, 0)


def test_prefix_sessions_share_pages():
    cache = make(page=4, max_sequences=3, capacity=32)
    prefix = PrefixCache(cache)
    for tokens in ([*range(9)], [*range(9), 1], [*range(7), 50, 51]):
        with prefix.session(tokens) as session:
            positions = range(session.matched, len(tokens))
            store(cache, (session.sequence, positions))
            session.commit()
            check_block_table(cache, [*positions], [session.sequence] * len(positions))
    prefix.clear()
    assert free_pages(cache) == cache.cells // 4


# Programs.


def applied(cache, plan, tokens, positions):
    keys = np.array([tokens, positions], np.float32).T
    state = cache.program_state
    for layer in range(2):
        rows = np.stack([keys, keys * np.array([-1, 1], np.float32)])
        state = functional.put(state, plan, layer, rows, rows if layer == 0 else None)
    cache.program_state = state


def test_plans_copy_pages_only_while_the_cache_has_the_buffers():
    cache = make()
    cache.allocate([0], 2, 2)
    cache.allocate([1], 2, 2, 0)
    applied(cache, cache.plan(Batch(range(6), [0] * 6)), range(6), range(6))
    cache.copy_prefix(0, 1, 5)
    plan = cache.plan(Batch([6], [0]))
    before = peek.table(cache).cells_of(1).tolist()
    with pytest.raises(ExportedError, match=r"sequences \[1\] share their last page.*Assign progr"):
        cache.plan(Batch([5], [1]))
    assert peek.table(cache).cells_of(1).tolist() == before
    applied(cache, plan, [6], [6])
    plan = cache.plan_steps(Batch([5], [1]), steps=4)
    assert plan.cells.shape == (4, 1)
    cells = peek.table(cache).cells_of(1)
    state = cache.program_state  # with the copied page: read after the plan was made
    np.testing.assert_array_equal(state[0][0][0, cells[:5], 0], range(5))
    assert pages(cache, 1)[0] == pages(cache, 0)[0]
    assert pages(cache, 1)[1] != pages(cache, 0)[1]


# Copies.


@pytest.mark.parametrize(
    "way",
    [CausalCache.copy, lambda c: pickle.loads(pickle.dumps(c)), lambda c: c.to_backend(NUMPY)],
)
def test_copies_go_on_in_their_own_pages(way):
    cache = make()
    store(cache, (0, range(6)))
    cache.copy_prefix(0, 1, 5)
    clone = way(cache)
    assert clone.page == 4
    assert pages(clone, 1) == pages(cache, 1)
    for _ in range(4):
        go_on(clone, 1, 0)
        go_on(cache, 0, 1)


# Block tables.


def test_a_block_table_of_prompts_and_decode_steps(backend):
    cache = make(backend=backend)
    store(cache, (0, range(5)), (2, range(9)))
    store(cache, (2, [9]), (1, range(3)), (0, [5, 6]))
    found = cache.block_table()
    assert all(backend.dtype_name(array) == "int32" for array in found)
    assert cache.block_table() is found  # one copy to the device in a pass
    host = cache.block_table(host=True)
    for array, copy in zip(found, host, strict=True):
        np.testing.assert_array_equal(backend.to_host(array), copy)
    assert host.lengths.tolist() == [10, 3, 7]
    assert host.query_starts.tolist() == [0, 1, 4, 6]
    assert host.sequences.tolist() == [2, 1, 0]
    assert host.first_positions.tolist() == [0, 0, 0]
    assert host.block_tables.tolist() == [
        [*pages(cache, 2), 0],
        [*pages(cache, 1), 0, 0, 0],
        [*pages(cache, 0), 0, 0],
    ]
    np.testing.assert_array_equal(host.slot_mapping, peek.forward_pass(cache).cells)


def test_pages_of_one_cell_make_a_table_of_cells():
    cache = make(page=1)
    for _ in range(5):
        go_on(cache, 1, 3)
    found = cache.block_table(host=True)
    assert found.block_tables[0, :5].tolist() == peek.table(cache).cells_of(1).tolist()


@pytest.mark.parametrize(
    "batch", [([0, 1, 0], [0, 1, 1]), ([1, 0], [0, 0]), ([0, 0, 1], [0, 1, 0])]
)
def test_a_batch_out_of_order_has_no_block_table(batch):
    cache = make()
    cache.start_forward(Batch(*batch))
    if batch == ([0, 1, 0], [0, 1, 1]):
        with pytest.raises(NotSupportedError, match="Sort the batch by sequence and position"):
            cache.block_table()
    else:
        with pytest.raises(NotSupportedError, match="the last ones of each sequence, adjacent"):
            cache.block_table()


def test_block_tables_belong_to_passes_that_store():
    cache = make()
    with pytest.raises(KVCacheError, match="Call start_forward first"):
        cache.block_table()
    cache.start_forward(Batch([0], [0]), reserve=True)
    with pytest.raises(NotSupportedError, match="a reserve pass has no block table"):
        cache.block_table()
    with pytest.raises(KVCacheError, match="Call init first"):
        CausalCache(page=4).block_table()


@pytest.mark.parametrize("limits", [{"window": 6}, {"chunk": 16}])
def test_positions_that_are_missing_inside_of_a_window_are_told(limits):
    cache = make(**limits, capacity=32)
    store(cache, (0, [0, 1, 3]))
    with pytest.raises(NotSupportedError, match="positions of sequence 0 are missing"):
        cache.block_table()
    whole = make()
    store(whole, (0, [0, 1, 3]))  # a kernel that counts slots sees the same without a window
    assert whole.block_table(host=True).lengths.tolist() == [3]


def test_a_window_that_goes_back_too_far_is_told():
    cache = make(window=6, capacity=32)
    for _ in range(16):
        go_on(cache, 0)
    cache.remove(0, 11)
    store(cache, (0, [11]))
    with pytest.raises(NotSupportedError, match=r"would see their slots\. Read with get"):
        cache.block_table()


@pytest.mark.parametrize("asked_before", [True, False])
def test_a_sequence_that_changes_during_a_pass_stays_in_its_block_table(asked_before):
    cache = make()
    cache.allocate([0, 1], 2, 2)
    cache.start_forward(Batch(range(6), [0] * 6))
    for layer in (0, 1):
        cache.set_layer(layer)
        cache.put(np.zeros((2, 6, 2), np.float32), np.zeros((2, 6, 2), np.float32))
    cache.start_forward(Batch([6, *range(9)], [0] + [1] * 9))
    before = cache.block_table(host=True) if asked_before else None
    row = peek.table(cache).cells_of(0).tolist()
    cache.remove(0, 0)
    found = cache.block_table(host=True)
    assert before is None or found is before
    cells = [found.block_tables[0, slot // 4] * 4 + slot % 4 for slot in range(7)]
    assert cells == row
    assert found.lengths.tolist() == [7, 9]
    assert found.block_tables.shape == (2, 4)


class Counted(np.ndarray):
    """An array that counts the elements read from it."""

    read = 0

    def __getitem__(self, key):
        result = super().__getitem__(key)
        Counted.read += getattr(result, "size", 1)
        return np.asarray(result) if isinstance(result, np.ndarray) else result


@pytest.mark.parametrize("capacity", [256, 4096])
def test_a_block_table_costs_what_its_batch_costs(capacity):
    """Not the tokens held, nor the pool: cells are read once a page begins, and for the ends."""
    cache = make(page=16, max_sequences=8, capacity=capacity)
    held = range(capacity - 40)
    store(cache, (0, held), (1, held), (2, held))
    cache.block_table(host=True)
    table = peek.table(cache)
    table.rows = table.rows.view(Counted)
    reads = []
    for step in range(32):
        position = held.stop + step
        store(cache, (0, [position]), (1, [position]), (2, [position]))
        Counted.read = 0
        cache.block_table(host=True)
        reads.append(Counted.read)
    assert set(reads) == {9, 12}  # three ends of each sequence, and the cell that begins a page
    assert reads.count(12) == 2


# Pages of a layer.


def numbered(backend, cache, axes):
    """Puts keys that tell head, position and dimension; returns the same ``[h, t, d]``."""
    rows = (np.arange(2)[:, None, None] * 1000 + np.arange(7)[:, None] * 10 + np.arange(3)).astype(
        np.float32
    )
    turned = np.ascontiguousarray(rows.transpose(["htd".index(axis) for axis in axes]))
    cache.start_forward(Batch(range(7), [0] * 7))
    cache.put(backend.from_host(turned), backend.from_host(-turned))
    return rows


@pytest.mark.parametrize(("layout", "axes"), [("NHD", "thd"), ("HND", "htd")])
def test_the_pages_of_a_layer(backend, layout, axes):
    cache = make(backend=backend, config=CacheConfig(key_layout=axes, value_layout=axes))
    rows = numbered(backend, cache, axes)
    pages_read = cache.block_table(host=True).block_tables[0]
    if backend.slices_are_views:
        keys, values = cache.buffers(0, layout)
    else:
        with pytest.raises(NotSupportedError, match=r"Take kvcache\.functional\.pages"):
            cache.buffers(0, layout)
        plan = cache.plan()
        keys, values = functional.pages(cache.program_state, plan, 0, 4)
    keys, values = backend.to_host(keys), backend.to_host(values)
    assert keys.shape == ((16, 4, 2, 3) if layout == "NHD" else (16, 2, 4, 3))
    np.testing.assert_array_equal(values, -keys)
    found = keys[pages_read] if layout == "NHD" else keys[pages_read].transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(found.reshape(-1, 2, 3)[:7].transpose(1, 0, 2), rows)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize(("layout", "axes"), [("NHD", "thd"), ("HND", "htd")])
def test_pages_are_views_of_memory(framework, layout, axes):
    backend = get_backend(framework)
    cache = make(backend=backend, config=CacheConfig(key_layout=axes, value_layout=axes))
    numbered(backend, cache, axes)
    keys, _ = cache.buffers(0, layout)
    whole = np.asarray(peek.layers(cache)[0][0])
    assert np.shares_memory(np.asarray(keys), whole)
    cache.start_forward(Batch([7], [0]))
    shape = (2, 1, 3) if axes == "htd" else (1, 2, 3)
    cache.put(*[backend.from_host(np.full(shape, 77, np.float32))] * 2)
    assert (np.asarray(keys) == 77).sum() == 6  # a view shows what is put later


def test_pages_keep_the_dtype_of_a_state_that_carries_bits():
    jax = pytest.importorskip("jax")
    backend = get_backend("jax")
    cache = CausalCache(page=4)
    cache.set_config(ROWS_FIRST)
    cache.init(backend, "bfloat16", capacity=64, max_batch=4)
    cache.allocate([0], 2, 3)
    plan = cache.plan(Batch([0], [0]))
    read = jax.jit(lambda state, plan: functional.pages(state, plan, 0, 4))
    keys, values = read(cache.program_state, plan)
    assert keys.shape == values.shape == (16, 4, 2, 3)
    assert backend.dtype_name(keys) == "bfloat16"
    with pytest.raises(ShapeError, match="a page divides the pool; got 24 for 64 cells"):
        functional.pages(cache.program_state, plan, 0, 24)


def test_pages_that_would_be_copies_are_refused():
    cache = make()
    with pytest.raises(KVCacheError, match="layer 0 was never put"):
        cache.buffers(0)
    numbered(NUMPY, cache, "htd")
    with pytest.raises(
        NotSupportedError, match=r"keys are in 'htd'\. Call set_config\(CacheConfig"
    ):
        cache.buffers(0)
    with pytest.raises(ValueError, match="'NHD' or 'HND'; got 'DHN'"):
        cache.buffers(0, "DHN")
    other = make(config=CacheConfig(key_layout="thd", value_layout="hdt"))
    other.allocate([0], 2, 3)
    with pytest.raises(NotSupportedError, match="values are in 'hdt'"):
        other.buffers(0, "NHD")
    plan = other.plan(Batch([0], [0]))
    with pytest.raises(NotSupportedError, match="this one has its tokens last"):
        functional.pages(other.program_state, plan, 0, 4)


def test_a_layer_of_keys_only_has_pages_of_keys():
    cache = make(config=ROWS_FIRST)
    cache.allocate([0], 1, 3, 0)
    keys, values = cache.buffers(0)
    assert keys.shape == (16, 4, 1, 3)
    assert values is None
