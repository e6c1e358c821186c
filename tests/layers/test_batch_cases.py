"""Rows of a batch selected, split, joined and padded in all layers: chosen cases, and refusals."""

from __future__ import annotations

import numpy as np
import pytest

from kvcache import (
    ExportedError,
    KVCache,
    LayerCaches,
    RotatingKVCache,
    ShapeError,
    Snapshot,
    SnapshotMismatchError,
    StateCache,
)

from .rows import arrays, content, host
from .stacks import check_state, filled, held_by, stack_of, state_of, update_all


@pytest.mark.parametrize("rows", [[2, 0, 1], [1], [0, 0, 2, 1], (np.int64(1), 0), np.array([2, 2])])
def test_rows_that_are_selected_go_on_as_such(backend, rows):
    caches, twin = filled(backend), filled(backend)
    caches.select(rows)
    assert held_by(caches) == [[[8, 16, 24][row] for row in rows]] * 3
    assert all(cache.rewound.refilled for cache in caches)
    numbers = 100 + np.arange(6).reshape(3, 2)
    update_all(caches, numbers[list(rows)])
    update_all(twin, numbers)
    for cache, other in zip(caches[:2], twin[:2], strict=True):
        got = host(cache, cache.state[0])
        np.testing.assert_array_equal(got, host(other, other.state[0])[list(rows)])


def test_rows_in_their_order_are_left_alone(backend):
    caches = filled(backend)
    snapshot = caches.snapshot()
    for cache in caches:
        cache.rewound = None
    before = snapshot.nbytes
    caches.select(range(3))
    assert snapshot.nbytes == before
    assert [cache.rewound for cache in caches] == [None] * len(caches)


def test_an_iterator_serves_all_layers(backend):
    caches = stack_of(backend)
    caches.pad(iter([0, 2, 1]))
    assert [cache.padding.tolist() for cache in caches] == [[0, 2, 1]] * 4
    update_all(caches, np.arange(9).reshape(3, 3))
    caches.select(iter([2, 1]))
    assert [cache.padding.tolist() for cache in caches] == [[1, 2]] * 4
    caches.select([1, 1])
    assert [cache.rows for cache in caches] == [2] * 4
    other = filled(backend, rows=2)
    other.select([0])
    assert other[0].padding is None


REFUSED = {
    "none there": ([3], ValueError, r"rows are 0 to 2, one or more of them; got \[3\]\."),
    "negative": ([0, -1], ValueError, r"rows are 0 to 2, one or more of them; got \[0, -1\]\."),
    "none": ([], ValueError, r"rows are 0 to 2, one or more of them; got \[\]\."),
    "bools": ([True, False], TypeError, r"rows must be a list of integers; got bools"),
    "mask": (np.array([True, False]), TypeError, r"rows must be a list of integers; got bools"),
    "number": (1, TypeError, r"rows must be a list of integers; got 1\."),
    "fractions": ([0.5], TypeError, r"each of rows must be an integer; got 0\.5\."),
}


@pytest.mark.parametrize(("rows", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_rows_that_cannot_be_selected(backend, rows, error, message):
    caches = filled(backend)
    before = held_by(caches)
    for one in (caches, *caches):
        with pytest.raises(error, match=message):
            one.select(rows)
    assert held_by(caches) == before


def test_a_layer_that_refuses_rows_keeps_all_from_changing(backend):
    caches = LayerCaches([KVCache(backend), KVCache(backend)])
    for cache, rows in zip(caches, (3, 2), strict=True):
        cache.update(*arrays(cache, np.arange(rows * 2).reshape(rows, 2)))
    with pytest.raises(ValueError, match=r"rows are 0 to 1, one or more of them; got \[2\]"):
        caches.select([2])
    assert [cache.rows for cache in caches] == [3, 2]
    with pytest.raises(ValueError, match=r"split together have the same rows; got \[2, 3\]"):
        caches.split()


def test_caches_that_cannot_be_joined(backend):
    several, [one, two] = filled(backend), filled(backend, rows=2).split()
    empty = stack_of(backend)
    with pytest.raises(ValueError, match=r"concat joins one cache or more; got none\."):
        KVCache.concat([])
    with pytest.raises(ValueError, match=r"stacks of as many layers each, one or more; got \[\]"):
        LayerCaches.concat([])
    with pytest.raises(ValueError, match=r"stacks of as many layers each.*; got \[4, 3\]"):
        LayerCaches.concat([one, two[:3]])
    for cache, none in zip(several, empty, strict=True):
        with pytest.raises(ValueError, match=r"caches with tokens; 1 of 2 have none\. Leave them"):
            type(cache).concat([cache, none])
    with pytest.raises(ValueError, match=r"with the same options; got .*'step': 4.*64"):
        KVCache.concat([one[0], KVCache(backend, step=64)])
    with pytest.raises(ValueError, match=r"concat joins caches of that kind; got <Rot"):
        KVCache.concat([one[0], one[1]])
    with pytest.raises(ValueError, match=r"with the same options; got .*'keep': 2.*: 0"):
        RotatingKVCache.concat([one[1], RotatingKVCache(6, backend=backend, step=4)])
    assert LayerCaches.concat([empty, stack_of(backend)]).offset == 0
    padded = stack_of(backend)
    padded.pad([0, 1])
    for cache, other in zip(padded, empty, strict=True):
        with pytest.raises(ValueError, match=r"concat joins tokens; got padding without any\. Dec"):
            type(cache).concat([cache, other])


def ones(backend, *shape):
    return backend.from_host(np.ones(shape, np.float32))


def test_caches_of_other_sizes_cannot_be_joined(backend):
    one, other = KVCache(backend), KVCache(backend)
    for cache, size in ((one, 4), (other, 2)):
        cache.update(ones(backend, 1, 2, 3, 4), ones(backend, 1, 2, 3, size))
    with pytest.raises(ShapeError, match="alike in kv_heads, head_dims and dtypes; got"):
        KVCache.concat([one, other])
    states = StateCache(backend), StateCache(backend)
    for cache, size in zip(states, (2, 3), strict=True):
        cache.advance(1, ones(backend, 1, size))
    with pytest.raises(ShapeError, match="concat joins states of one backend, alike but for their"):
        StateCache.concat(states)


def test_caches_of_two_backends_cannot_be_joined(backend):
    if backend.name == "numpy":
        pytest.skip("the other one")
    for cache, other in zip(filled(backend), filled("numpy"), strict=True):
        with pytest.raises(ShapeError, match=r"joins (caches|states) of one backend, alike"):
            type(cache).concat([cache, other])


def test_padding_that_cannot_be_declared(backend):
    caches, late = stack_of(backend), filled(backend)
    for cache in (caches, *caches):
        with pytest.raises(ValueError, match=r"padding is 0 tokens or more in each row; got \[1"):
            cache.pad([1, -1])
        with pytest.raises(TypeError, match="padding must be a list of integers; got bools"):
            cache.pad([True, False])
        with pytest.raises(TypeError, match="padding must be a list of integers; got None"):
            cache.pad(None)
    assert [cache.padding for cache in caches] == [None] * 4
    for cache in (late, *late):
        with pytest.raises(ValueError, match=r"declared before the first token; 8 came\. Use a ne"):
            cache.pad([1, 0, 0])


def test_padding_of_other_rows(backend):
    caches, message = stack_of(backend), "padding has one number for each row of the batch, 3; got"
    caches.pad([0, 1])
    numbers = np.arange(12).reshape(3, 4)
    for cache in caches[:2]:
        with pytest.raises(ShapeError, match=message):
            cache.update(*arrays(cache, numbers))
        assert (cache.offset, cache.rows) == (0, 2)
    caches.schedule([2])
    assert caches[2].cuts(4) == [2]
    with pytest.raises(ShapeError, match=message):
        caches[2].record(2, *state_of(backend, numbers[:, 1]))
    with pytest.raises(ShapeError, match=message):
        caches[2].advance(4, *state_of(backend, numbers[:, 3]))
    caches.pad([0, 1, 2])
    update_all(caches, numbers, recording=True)
    caches.trim(2)
    assert [cache.padding.tolist() for cache in caches] == [[0, 1, 2]] * 4


def test_padding_declared_anew_once_all_tokens_were_taken_back(backend):
    """Buffers, snapshots and the sinks of a ring are those of the padding declared last."""
    caches, fresh = stack_of(backend), stack_of(backend)
    caches.pad([3, 0])
    update_all(caches, 500 + np.arange(14).reshape(2, 7))
    assert caches.can_trim(7)
    caches.trim(7)
    with pytest.raises(ShapeError, match="padding has one number for each row of the batch, 2"):
        caches.pad([1, 0, 0])
    for stack in (caches, fresh):
        stack.pad([0, 1])
        for start in (0, 9):
            update_all(stack, start + np.arange(18).reshape(2, 9))
    for cache, other in zip(caches[:2], fresh[:2], strict=True):
        np.testing.assert_array_equal(cache.positions, other.positions)
        np.testing.assert_array_equal(host(cache, cache.state[0]), host(other, other.state[0]))
    assert content(caches.snapshot()) == content(fresh.snapshot())


@pytest.mark.parametrize("way", ["snapshot", "file", "copy", "to_backend"])
def test_padding_goes_with_the_tokens(backend, tmp_path, way):
    caches = filled(backend, padding=[0, 3, 1])
    if way == "snapshot":
        others = stack_of(backend)
        others.pad([0, 3, 1])
        others.restore(caches.snapshot())
    elif way == "file":
        caches.save(tmp_path / "caches")
        others = LayerCaches.load(tmp_path / "caches", backend)
    else:
        others = caches.copy() if way == "copy" else caches.to_backend(backend)
    assert [cache.padding.tolist() for cache in others] == [[0, 3, 1]] * 4
    assert [single.offset for single in others.split()] == [8, 5, 7]
    assert held_by(others) == held_by(caches)


@pytest.mark.parametrize("layer", [0, 2], ids=["growing", "recurrent"])
@pytest.mark.parametrize("move", [lambda s: s, Snapshot.detach, Snapshot.to_host])
def test_a_snapshot_tells_the_padding_or_is_refused(backend, layer, move):
    caches = filled(backend, padding=[0, 3, 1])
    with move(caches[layer].snapshot()) as snapshot:
        told, other = stack_of(backend)[layer], stack_of(backend)[layer]
        told.restore(snapshot)
        assert told.padding.tolist() == [0, 3, 1]
        other.pad([0, 1, 1])
        with pytest.raises(SnapshotMismatchError, match=r"restored with one padding, \[0, 1, 1\]"):
            other.restore(snapshot)
        assert (other.offset, other.padding.tolist()) == (0, [0, 1, 1])
        if layer == 0:
            for own, restored in zip(caches[layer].state, told.state, strict=True):
                np.testing.assert_array_equal(host(told, restored), host(caches[layer], own))
            assert told.positions.tolist() == caches[layer].positions.tolist()


@pytest.mark.parametrize("copy", [lambda c: c.copy(), lambda c: c.to_backend(c[0].backend)])
def test_a_copy_without_tokens_has_the_padding(backend, copy):
    caches = stack_of(backend)
    caches.pad([2, 0])
    others = copy(caches)
    for stack in (caches, others):
        update_all(stack, np.arange(16).reshape(2, 8))
    for cache, other in zip(caches[:2], others[:2], strict=True):
        np.testing.assert_array_equal(cache.positions, other.positions)
    assert others[2].padding.tolist() == [2, 0]


def test_layers_that_share_a_cache_in_some_stacks_only(backend):
    shared, own = KVCache(backend), [KVCache(backend), KVCache(backend)]
    for number, cache in enumerate([shared, *own]):
        cache.update(*arrays(cache, [[10 * number + 1]]))
    joined = LayerCaches.concat([LayerCaches([shared, shared]), LayerCaches(own)])
    assert [host(c, c.state[0]).tolist() for c in joined] == [[[1], [11]], [[1], [21]]]


def test_a_cache_whose_tokens_a_program_has(backend):
    caches = filled(backend)
    others = filled(backend)
    for cache in caches[:3]:
        cache.export_state(1)
    for call in (
        lambda cache: cache.select([0]),
        lambda cache: cache.split(),
        lambda cache: cache.pad([0]),
    ):
        for cache in (caches, *caches):
            with pytest.raises(ExportedError):
                call(cache)
    for cache, other in zip(caches, others, strict=True):
        with pytest.raises(ExportedError):
            type(cache).concat([other, cache])
    with pytest.raises(ExportedError):
        caches[0].reserve(1)


def test_states_recorded_for_a_coming_update_are_selected(backend):
    cache = StateCache(backend)
    cache.schedule([1, 2])
    cache.cuts(4)
    cache.record(1, *state_of(backend, [10, 20, 30]))
    cache.select([2, 1])
    cache.record(2, *state_of(backend, [31, 21]))
    cache.select([1, 0, 0])
    cache.advance(4, *state_of(backend, [23, 33, 33]))
    for position, numbers in ((4, [23, 33, 33]), (2, [21, 31, 31]), (1, [20, 30, 30])):
        cache.trim(cache.offset - position)
        check_state(cache, numbers)


def test_a_draft_goes_on_with_the_rows_selected(backend):
    cache = StateCache(backend)
    cache.advance(3, *state_of(backend, [1, 2, 3]))
    cache.checkpoint()
    cache.cuts(3)
    cache.record(4, *state_of(backend, [11, 12, 13]))
    cache.advance(3, *state_of(backend, [21, 22, 23]))
    cache.select([2, 0])
    twin = cache.split()[1]
    cache.rollback(1)
    check_state(cache, [13, 11])
    assert twin.kept == (6,), "a copy has no checkpoint"
    check_state(twin, [21])


def test_joined_states_resume_where_all_rows_have_one(backend):
    """Positions are moved by what a row is shorter; others than common ones are dropped."""
    one, other = StateCache(backend), StateCache(backend)
    for cache, points, tokens in ((one, [1, 3, 4], 5), (other, [1, 2], 3)):
        cache.schedule(points)
        cache.cuts(tokens)
        for point in points:
            cache.record(point, *state_of(backend, [10 * tokens + point]))
        cache.advance(tokens, *state_of(backend, [10 * tokens + tokens]))
    joined = StateCache.concat([one, other])
    assert joined.padding.tolist() == [0, 2]
    assert joined.kept == (3, 4, 5)
    for position in (5, 4, 3):
        joined.trim(joined.offset - position)
        check_state(joined, [50 + position, 30 + position - 2])


def test_a_state_all_of_whose_tokens_were_taken_back(backend):
    """Its form is fixed, and that form has other rows then."""
    cache = StateCache(backend)
    cache.advance(2, *state_of(backend, [1, 2]))
    cache.trim(2)
    cache.select([1])
    assert cache.rows == 1
    with pytest.raises(ShapeError, match="a state is one array or more; got none"):
        cache.advance(1)
    with pytest.raises(ShapeError, match="every state of a cache has the form of the first"):
        cache.advance(1, *state_of(backend, [1, 2]))
    cache.advance(1, *state_of(backend, [7]))
    np.testing.assert_array_equal(backend.to_host(cache.state[0]), [[7, 14]])


def test_snapshots_taken_before_stay_resumable(backend):
    """Also at resume points that the ring passed, whose rows it retained."""
    caches = stack_of(backend)
    caches.schedule([5, 9])
    for start in range(0, 15, 3):
        numbers = 1 + start + np.arange(3) + np.array([[0], [100], [200]])
        update_all(caches, numbers, recording=True)
    snapshot, before = caches.snapshot(), content(caches.snapshot())
    caches.select([2, 1])
    later = caches.snapshot()
    update_all(caches, np.full((2, 20), 7))
    assert content(snapshot) == before
    for stop in (5, 9, 15):
        for taken, rows in ((snapshot, [0, 100, 200]), (later, [200, 100])):
            resumed = stack_of(backend)
            resumed.restore(taken, stop=stop)
            assert held_by(resumed) == [[stop + row for row in rows]] * 3


@pytest.mark.parametrize(("rows", "message"), [([1, 1], "same sizes"), ([1, 0, 2], "is shared")])
def test_snapshots_of_other_rows_are_not_merged(backend, rows, message):
    """Two spans of one batch are of the same rows, with the same padding."""
    for layer in (0, 2):
        caches = stack_of(backend)
        caches.pad([0, 2, 0])
        update_all(caches, np.arange(9).reshape(3, 3))
        cache = caches[layer]
        lower = cache.snapshot()
        caches.select(rows)
        update_all(caches, np.ones((len(rows), 2), int))
        upper = cache.snapshot(3)
        before = content(lower), content(upper)
        with pytest.raises(ValueError, match=message):
            lower.merge(upper)
        assert (content(lower), content(upper)) == before


def test_rows_without_a_token_are_joined(backend):
    caches, none = filled(backend, rows=2), filled(backend, rows=2, tokens=2, padding=[2, 2])
    joined = LayerCaches.concat([caches, none])
    assert [cache.padding.tolist() for cache in joined] == [[0, 0, 8, 8]] * 4
    first = LayerCaches.concat([none, filled(backend, rows=1, tokens=2, padding=[2])])
    assert [cache.padding.tolist() for cache in first] == [[1, 1, 1]] * 4
    numbers = np.array([[30], [31], [32], [33]])
    update_all(joined, numbers)
    assert held_by(joined) == [[30, 31, 32, 33]] * 3
    assert [row.offset for row in joined.split()] == [9, 9, 1, 1]


def test_joined_rows_have_the_least_padding(backend):
    caches = filled(backend, padding=[1, 4, 3])
    caches.select([1, 2])
    assert caches[0].padding.tolist() == [4, 3]
    joined = LayerCaches.concat([caches])
    assert (joined.offset, joined[0].padding.tolist()) == (5, [1, 0])
    assert held_by(joined) == held_by(caches)


def test_some_rows_are_split(backend):
    caches = filled(backend, padding=[0, 3, 1])
    two = caches.split([2, 0])
    assert [row.offset for row in two] == [7, 8]
    assert [held_by(row) for row in two] == [[[24]] * 3, [[8]] * 3]
    for one in (caches, *caches):
        with pytest.raises(ValueError, match=r"rows are 0 to 2, one or more of them; got \[3\]\."):
            one.split([3])
