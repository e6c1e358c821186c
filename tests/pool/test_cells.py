"""The table of cells by itself: which cell a token gets, and what that costs."""

from __future__ import annotations

import numpy as np
import pytest

from kvcache import CacheFullError
from kvcache.pool.cells import CellTable
from kvcache.pool.changes import Eviction
from kvcache.pool.single import commit_single, plan_single

from .. import peek
from .oracle import check_table


def int32s(*numbers):
    return np.array(numbers, np.int32)


def insert(table, positions, sequences):
    cells = table.insert(table.group(int32s(*positions), int32s(*sequences)))
    check_table(table)
    return cells.tolist()


def share(table, source, target, length):
    table.set_row(target, table.cells_of(source)[:length].copy())


def evict(table, eviction):
    table.evict(eviction, table.to_drop(eviction))


def test_a_table_is_made_of_integers():
    table = CellTable(20, 2)
    state = [*vars(table).values(), *vars(table.allocator).values()]
    arrays = [each for each in state if isinstance(each, np.ndarray)]
    assert {each.dtype.name for each in arrays} == {"int32", "int64", "bool"}


def test_a_sequence_takes_the_cell_after_its_last_one():
    table = CellTable(20, 2)
    assert insert(table, [0, 1, 2], [0, 0, 0]) == [0, 1, 2]
    assert insert(table, [3], [0]) == [3]
    assert insert(table, [4, 5, 6], [0, 0, 0]) == [4, 5, 6]


def test_an_empty_sequence_begins_in_a_part_of_the_pool_of_its_own():
    table = CellTable(30, 3)
    assert insert(table, [0, 0, 0], [0, 1, 2]) == [0, 10, 20]
    assert insert(table, [1, 1, 1], [2, 0, 1]) == [21, 1, 11]
    table.truncate(1, 0)
    assert insert(table, [7, 8], [1, 1]) == [10, 11]


def test_a_batch_in_any_order_is_stored_in_the_order_of_positions():
    table = CellTable(12, 2)
    assert insert(table, [2, 1, 0, 1, 0], [1, 0, 1, 1, 0]) == [8, 1, 6, 7, 0]
    assert table.positions[table.cells_of(1)].tolist() == [0, 1, 2]
    assert insert(table, [5, 3, 4], [0, 0, 0]) == [4, 2, 3]
    assert table.positions[table.cells_of(0)].tolist() == [0, 1, 3, 4, 5]


def test_positions_may_come_late():
    table = CellTable(16, 1)
    insert(table, [0, 9], [0, 0])
    insert(table, [4, 6], [0, 0])
    insert(table, [5, 12], [0, 0])
    assert table.positions[table.cells_of(0)].tolist() == [0, 4, 5, 6, 9, 12]
    assert table.next_position(0) == 13
    assert [table.find(0, p) for p in (0, 1, 4, 5, 6, 7, 12, 13, 99)] == [0, 1, 1, 2, 3, 4, 5, 6, 6]


def test_only_rows_that_a_token_is_late_for_are_sorted():
    table = CellTable(16, 2)
    assert not table.group(int32s(0), int32s(1)).inserts
    insert(table, [0, 9], [0, 0])
    assert not table.group(int32s(0, 10), int32s(1, 0)).inserts
    assert table.group(int32s(0, 8), int32s(1, 0)).inserts


def test_a_taken_cell_is_passed_over():
    table = CellTable(8, 2)  # homes 0 and 4
    insert(table, [0, 1, 2, 3], [0] * 4)
    insert(table, [0], [1])
    assert insert(table, [4], [0])[0] not in range(5)
    check_table(table)


def test_neighbours_run_into_each_other():
    table = CellTable(8, 2)
    insert(table, [0, 1, 2], [0] * 3)
    insert(table, [0], [1])
    got = insert(table, [3, 4, 1, 2], [0, 0, 1, 1])
    assert got[0] == 3
    assert sorted(got) == [3, 5, 6, 7]
    assert table.free == 0


def test_the_last_cell_of_the_pool_is_usable():
    table = CellTable(5, 1)
    assert sorted(insert(table, range(5), [0] * 5)) == [0, 1, 2, 3, 4]
    assert table.free == 0
    with pytest.raises(CacheFullError, match=r"1 needed, 0 of 5\s+free"):
        table.check_room(1, None)
    table.truncate(0, 3)
    table.check_room(2, None)
    assert sorted(insert(table, [3, 4], [0, 0])) == [3, 4]


def test_a_run_that_reaches_the_end_goes_on_where_there_is_room():
    table = CellTable(6, 1)
    insert(table, range(6), [0] * 6)
    evict(table, Eviction(int32s(0), np.array([3])))
    assert sorted(insert(table, [6, 7, 8], [0] * 3)) == [0, 1, 2]
    assert table.cells_of(0)[:3].tolist() == [3, 4, 5]
    assert table.span(int32s(0)) == (0, 6)


@pytest.mark.parametrize("seed", range(20))
def test_never_full_while_cells_are_free(seed):
    """However fragmented: every free cell can be had, in a batch of any size."""
    random = np.random.default_rng(seed)
    size, sequences = int(random.integers(5, 700)), int(random.integers(1, 6))
    table = CellTable(size, sequences)
    for _ in range(60):
        sequence = int(random.integers(sequences))
        if random.random() < 0.4 or table.free == 0:
            held = table.cells_of(sequence).size
            length = int(random.integers(held + 1))
            if random.random() < 0.5:
                table.truncate(sequence, length)
            else:
                evict(table, Eviction(int32s(sequence), np.array([length])[: held or 1]))
        else:
            count = int(random.integers(1, table.free + 1))
            ids = np.sort(random.integers(sequences, size=count)).astype(np.int32)
            starts = {s: table.next_position(s) for s in range(sequences)}
            rank = np.arange(count) - np.searchsorted(ids, ids)
            positions = (rank + [starts[s] for s in ids.tolist()]).astype(np.int32)
            table.check_room(count, None)
            cells = table.insert(table.group(positions, ids))
            assert len(set(cells.tolist())) == count
        check_table(table)
    count = table.free
    if count:
        start = table.next_position(0)
        table.insert(
            table.group(np.arange(start, start + count, dtype=np.int32), int32s(*[0] * count))
        )
    assert table.free == 0
    check_table(table)


def test_freed_cells_come_back_as_neighbours():
    table = CellTable(40, 2)
    insert(table, range(30), [0] * 30)
    insert(table, range(10), [1] * 10)  # its part is taken: it has to look for cells
    assert peek.free_stack(table).size == 0
    table.truncate(0, 10)
    assert table.allocator.pop(5).tolist() == [10, 11, 12, 13, 14]


def test_sharing_takes_no_cell_and_the_last_holder_frees():
    table = CellTable(30, 3)
    insert(table, range(6), [0] * 6)
    share(table, 0, 1, 4)
    share(table, 1, 2, 2)
    check_table(table)
    assert table.free == 24
    assert table.is_shared(int32s(3))
    assert not table.is_shared(int32s(4, 5))
    table.truncate(0, 0)
    check_table(table)
    assert table.free == 26
    table.truncate(1, 0)
    assert table.free == 28
    assert table.cells_of(2).tolist() == [0, 1]
    table.truncate(2, 0)
    assert table.free == 30


def test_sharing_with_a_target_that_holds_the_same_cells():
    table = CellTable(30, 2)
    insert(table, range(6), [0] * 6)
    share(table, 0, 1, 6)
    insert(table, [6, 7], [1, 1])
    share(table, 0, 1, 3)
    check_table(table)
    assert table.free == 24
    assert table.cells_of(1).tolist() == table.cells_of(0)[:3].tolist()


def test_eviction_of_shared_cells_frees_them_once_all_let_go():
    table = CellTable(30, 2)
    insert(table, range(6), [0] * 6)
    share(table, 0, 1, 6)
    both = table.expired(int32s(0, 1), np.array([2, 4]))
    assert both.counts.tolist() == [2, 4]
    with pytest.raises(CacheFullError, match="27 needed, 26 of 30"):
        table.check_room(27, both)
    table.check_room(26, both)
    evict(table, both)
    check_table(table)
    assert table.free == 26


def test_expired_counts_what_lies_before_a_position():
    table = CellTable(30, 3)
    insert(table, [3, 4, 5], [0] * 3)
    insert(table, [0, 2, 7, 9], [1] * 4)
    found = table.expired(int32s(0, 1, 2), np.array([5, 7, 3]))
    assert found.ids.tolist() == [0, 1]
    assert found.counts.tolist() == [2, 2]
    assert table.expired(int32s(0, 1), np.array([-5, 0])).ids.size == 0
    assert table.expired(int32s(0), np.array([99])).counts.tolist() == [3]


def test_cutting_moves_the_rest_and_measures_again():
    table = CellTable(12, 1)
    insert(table, range(8), [0] * 8)
    rest = table.remove_middle(0, 2, 5, -3)
    check_table(table)
    assert rest.tolist() == [5, 6, 7]
    assert table.positions[table.cells_of(0)].tolist() == [0, 1, 2, 3, 4]
    table.remove_middle(0, 0, 2, -2)
    check_table(table)
    assert table.span(int32s(0)) == (5, 8)


def test_the_range_follows_evictions():
    table = CellTable(10, 1)
    insert(table, range(6), [0] * 6)
    for gone in (1, 2, 1):
        evict(table, Eviction(int32s(0), np.array([gone])))
        check_table(table)
    assert table.span(int32s(0)) == (4, 6)
    insert(table, [6, 7, 8, 9, 10], [0] * 5)  # wraps
    assert table.span(int32s(0)) == (0, 10)
    for _ in range(6):
        evict(table, Eviction(int32s(0), np.array([1])))
        check_table(table)


def test_the_usual_step_of_a_window_looks_at_two_cells(monkeypatch):
    """The oldest cell is the lowest, and the next one follows it: no row is read whole."""
    table = CellTable(20, 3)
    insert(table, [3, 4, 5], [0] * 3)
    insert(table, [0, 1, 2], [1] * 3)
    for name in ("_recompute_range", "find"):
        monkeypatch.setattr(table, name, lambda *args, name=name: pytest.fail(name))
    eviction = table.expired(int32s(0, 1, 2), np.array([4, 1, 9]))
    assert eviction.counts.tolist() == [1, 1]
    evict(table, eviction)
    monkeypatch.undo()
    check_table(table)


def test_the_range_of_several_sequences_covers_them_all():
    table = CellTable(30, 3)
    insert(table, [0, 1], [0, 0])
    insert(table, [0, 1], [2, 2])
    insert(table, [0], [1])
    assert table.span(int32s(0, 1)) == (0, 11)
    assert table.span(int32s(1, 2)) == (10, 22)
    assert table.span(int32s(2)) == (20, 22)


def test_a_row_that_has_room_stays_as_it_is():
    table = CellTable(200, 2)
    insert(table, range(64), [0] * 64)
    share(table, 0, 1, 60)
    insert(table, range(60, 64), [1] * 4)
    assert table.rows.shape == (2, 64)
    insert(table, [64], [1])
    assert table.rows.shape == (2, 130)


def test_rows_grow_and_start_anew():
    table = CellTable(1000, 2)
    for position in range(300):
        insert(table, [position], [0])
        if position >= 50:
            evict(table, Eviction(int32s(0), np.array([1])))
    assert table.cells_of(0).size == 50
    assert table.rows.shape[1] <= 256  # as wide as what is held, not as what ever was
    insert(table, range(500), [1] * 500)
    assert table.positions[table.cells_of(0)].tolist() == list(range(250, 300))
    assert table.positions[table.cells_of(1)].tolist() == list(range(500))


@pytest.mark.parametrize(
    ("positions", "sequences", "message"),
    [
        ([0], [2], r"sequence ids must lie in \[0, 2\), as many as max_sequences; got 2 to 2"),
        ([0, 0], [0, -1], r"got -1 to 0"),
        ([-1], [0], r"positions must be >= 0; got -1"),
        ([5, 6, 5], [1, 1, 1], "position 5 of sequence 1 occurs twice"),
        ([7, 6, 7], [1, 1, 1], "position 7 of sequence 1 occurs twice"),
        ([2], [0], "sequence 0 holds position 2 already. Remove it first"),
        ([9, 0], [0, 0], "sequence 0 holds position 0 already"),
        ([4, 3, 7], [0, 1, 0], "sequence 0 holds position 4 already"),
    ],
)
def test_a_batch_is_refused(positions, sequences, message):
    table = CellTable(20, 2)
    insert(table, [0, 1, 2, 4], [0] * 4)
    with pytest.raises(ValueError, match=message):
        table.group(int32s(*positions), int32s(*sequences))
    insert(table, [3, 5, 0], [0, 0, 1])


# The short way for one token.


def test_foresee_says_what_take_does():
    table = CellTable(20, 2)
    insert(table, [0, 1, 2], [0] * 3)
    step = plan_single(table, 0, 3, 0)
    assert step[:6] == (0, 3, 3, None, 0, 3)
    before = table.free
    commit_single(table, step)
    check_table(table)
    assert table.free == before - 1
    step = plan_single(table, 0, 4, 1)
    assert step[:6] == (0, 4, 4, 0, 1, 4)
    commit_single(table, step)
    check_table(table)
    assert table.free == before - 1
    assert table.positions[table.cells_of(0)].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("sequence", "position", "oldest"),
    [
        (-1, 3, 0),
        (2, 3, 0),
        (1, 0, 0),  # holds nothing
        (0, 2, 0),  # stored
        (0, 1, 0),  # before the last
        (0, -1, 0),
        (0, 9, 2),  # lets two go
        (0, 9, 3),
    ],
)
def test_foresee_leaves_the_rest_to_the_long_way(sequence, position, oldest):
    table = CellTable(20, 2)
    insert(table, [0, 1, 2], [0] * 3)
    assert plan_single(table, sequence, position, oldest) is None


def test_foresee_turns_like_a_ring():
    """Where the pool ends, the token takes the cell that it drops, wherever that lies."""
    table = CellTable(6, 1)
    insert(table, range(6), [0] * 6)
    for position, cell in ((6, 0), (7, 1)):
        step = plan_single(table, 0, position, position - 5)
        assert step[:6] == (0, position, cell, cell, 0, 5)
        commit_single(table, step)
        check_table(table)
    evict(table, Eviction(int32s(0), np.array([1])))
    assert plan_single(table, 0, 8, 4)[:6] == (
        0,
        8,
        2,
        3,
        0,
        5,
    )  # the free cell 2, cell 3 in the middle
    assert plan_single(table, 0, 8, 5) is None


def test_foresee_needs_two_cells():
    table = CellTable(20, 1)
    insert(table, range(4), [0] * 4)
    evict(table, Eviction(int32s(0), np.array([3])))
    assert plan_single(table, 0, 4, 0) is None
    insert(table, [4], [0])
    assert plan_single(table, 0, 5, 0)[:6] == (0, 5, 5, None, 3, 5)


def test_foresee_takes_no_cell_of_others():
    table = CellTable(8, 2)
    insert(table, range(4), [0] * 4)
    insert(table, [0, 1, 2, 3], [1] * 4)
    assert plan_single(table, 0, 4, 0) is None  # the next cell is the first of the other
    assert plan_single(table, 1, 4, 0) is None  # the pool ends


def test_foresee_leaves_shared_cells_alone():
    table = CellTable(20, 2)
    insert(table, range(4), [0] * 4)
    share(table, 0, 1, 2)
    assert plan_single(table, 0, 4, 1) is None
    assert plan_single(table, 0, 4, 0) is not None
    assert plan_single(table, 1, 2, 0) is None  # what follows belongs to the source
