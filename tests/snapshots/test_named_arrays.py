"""A layer is a tuple of named arrays: any number of them, each with a token axis or none."""

import threading

import numpy as np
import pytest

from kvcache import SnapshotMismatchError
from kvcache.pool.buffers import PoolBuffers
from kvcache.pool.cells import CellTable
from kvcache.pool.layouts import ArrayLayout
from kvcache.pool.plan import Pass
from kvcache.snapshots.rows import TokenRows
from kvcache.snapshots.schedule import ResumePoints
from kvcache.snapshots.snapshot import CacheSpec, Part, Snapshot
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.arrays import NamedArray, concat_layers

CODEBOOK = np.arange(6, dtype=np.int8)


def layer(positions, sign=1):
    """Four arrays: tokens on the second axis, on the first, on the last, and on none."""
    codes = sign * np.asarray(positions, np.float32)
    return (
        NamedArray("keys", codes[None, :, None] + np.zeros((2, 1, 3), np.float32)),
        NamedArray("states", np.tile(codes[:, None, None], (1, 2, 2)).astype(np.float16), 0),
        NamedArray("scales", codes[None, :].astype(np.float32), -1),
        NamedArray("codebook", CODEBOOK, None),
    )


def check(arrays, positions, sign=1):
    assert [array.name for array in arrays] == ["keys", "states", "scales", "codebook"]
    for array, expected in zip(arrays, layer(positions, sign), strict=True):
        assert array.token_axis == expected.token_axis
        assert array.data.dtype == expected.data.dtype
        np.testing.assert_array_equal(array.data, expected.data)


def rows(start, stop):
    positions = np.arange(start, stop, dtype=np.int32)
    return TokenRows(positions, {0: layer(positions), 3: layer(positions, -1)})


def test_take_copies_tokens_and_shares_the_rest():
    arrays = layer(range(5))
    taken = tuple(array.take(np.array([3, 1])) for array in arrays)
    check(taken, [3, 1])
    assert not np.shares_memory(taken[0].data, arrays[0].data)
    assert taken[3].data is CODEBOOK


def test_zeros_pad_and_put():
    for array in layer([1, 2])[:3]:
        assert not array.zeros(4).data.any()
        assert array.zeros(4).data.shape[array.token_axis] == 4
        padded = array.pad(4)
        np.testing.assert_array_equal(padded.data, array.take(np.array([0, 1, 1, 1])).data)
        whole = array.zeros(3)
        whole.put(np.array([2]), array, np.array([1]))
        np.testing.assert_array_equal(whole.take(np.array([2])).data, array.take([1]).data)
    codebook = layer([1])[3]
    assert codebook.zeros(9) is codebook.pad(9) is codebook


def test_concat_refuses_other_arrays():
    with pytest.raises(ValueError, match="the same arrays in all rows"):
        concat_layers([layer([1]), layer([2])[:2]])


def test_rows_split_join_and_read():
    one, two = rows(0, 7).split(3)
    assert (one.positions.tolist(), two.positions.tolist()) == ([0, 1, 2], [3, 4, 5, 6])
    joined = two.join(one)
    assert joined.positions.tolist() == list(range(7))
    check(joined.to_host()[0], range(7))
    check(joined.read(np.array([6, 2]))[3], [6, 2], -1)
    sizes = {array.name: array.data.nbytes for array in layer(range(7))}
    assert joined.nbytes == joined.host_nbytes == 2 * sum(sizes.values())


def test_snapshots_and_files(tmp_path):
    spec = CacheSpec("other", Visibility(window=2), "float32")
    one = Snapshot(0, 4, [Part(spec, rows(0, 4))])
    two = Snapshot(4, 7, [Part(spec, rows(4, 7))])
    merged = one.merge(two)
    merged.save(tmp_path / "file")
    loaded = Snapshot.load(tmp_path / "file")
    assert loaded.specs == [spec]
    assert sorted(loaded.parts[0].rows.to_host()) == [0, 3]
    check(loaded.parts[0].rows.to_host()[0], range(7))
    check(loaded.parts[0].rows.to_host()[3], range(7), -1)
    lower, upper = loaded.split(5)
    check(upper.union(Snapshot(5, 7, [Part(spec, rows(5, 7))])).parts[0].rows.to_host()[0], [5, 6])
    check(lower.parts[0].rows.to_host()[0], range(5))


def test_resume_points_join_what_they_retain():
    points = ResumePoints([3, 9])
    assert points.due(5) == [3]
    points.retain(3, rows(1, 3))
    points.retain(9, rows(2, 5))
    assert points.scheduled == set()
    positions = points.add_to(rows(4, 6), 2, 9)
    assert positions.positions.tolist() == [2, 3, 4, 5]
    check(positions.to_host()[0], [2, 3, 4, 5])
    points.forget(2)
    assert points.retained.positions.tolist() == [1]
    points.forget(0)
    assert points.retained is None


class Pool:
    """Buffers with three arrays per layer, in layouts of their own."""

    LAYOUTS = (
        ArrayLayout("keys", "thd"),
        ArrayLayout("values", "hdt"),
        ArrayLayout("scales", "htd"),
    )

    def __init__(self, backend, cells=8):
        self.backend = backend
        self.buffers = PoolBuffers(backend, self.LAYOUTS, "float32", cells)
        self.table = CellTable(cells, 2)

    def put(self, layer, positions, count=3):
        """Store `positions` in the cells of that number: keys p, values p + 100, scales p + 200."""
        cells = np.array(positions, np.int32)
        forward_pass = Pass(self.table, cells, 0, 8, cells, cells * 0, Visibility())
        dims = (3, 2, 1)[:count]
        arrays = []
        for i, (layout, dim) in enumerate(zip(self.LAYOUTS, dims, strict=False)):
            host = np.zeros((2, cells.size, dim), np.float32)
            host += (cells + 100 * i)[None, :, None]
            order = ["htd".index(axis) for axis in layout.axes]
            arrays.append(self.backend.from_host(host.transpose(order)))
        self.buffers.put(layer, tuple(arrays), forward_pass)

    def check(self, layer, cells, count=3):
        arrays = self.buffers.read(np.array(cells))[layer]
        assert [array.name for array in arrays] == ["keys", "values", "scales"][:count]
        for i, array in enumerate(arrays):
            assert array.data.shape == (2, len(cells), (3, 2, 1)[i])
            assert array.data[0, :, 0].tolist() == [cell + 100 * i for cell in cells]


def test_a_pool_of_three_arrays(backend):
    pool = Pool(backend)
    pool.put(0, [1, 2, 3])
    pool.put(5, [2], count=1)
    pool.check(0, [3, 1, 2])
    pool.check(5, [2], count=1)
    assert pool.buffers.token_bytes == 4 * (2 * 3 + 2 * 2 + 2 * 1 + 2 * 3)
    state = pool.buffers.export_state()
    assert [len(arrays) for arrays in state.values()] == [3, 1]
    pool.buffers.prepare_import(state)()
    copied = pool.buffers.to_backend(backend, Pool.LAYOUTS[::-1], 10)
    assert copied.cells == 10
    arrays = pool.buffers.get(0, Pass(pool.table, np.array([1]), 1, 4, None, None, Visibility()))
    assert [tuple(array.shape) for array in arrays] == [(3, 2, 3), (2, 2, 3), (2, 3, 1)]


def test_rows_of_three_arrays_arrive_from_another_thread(backend):
    source, target = Pool(backend), Pool(backend)
    source.put(0, [4, 5])
    arriving = source.buffers.read(np.array([4, 5]))
    thread = threading.Thread(target=target.buffers.enqueue_rows, args=(np.array([4, 5]), arriving))
    thread.start()
    thread.join()
    target.check(0, [5, 4])  # pending, laid over what is read
    target.put(0, [1])
    target.check(0, [1, 4, 5])
    with pytest.raises(SnapshotMismatchError, match="the same heads and head_dim"):
        target.buffers.check_rows({0: arriving[0][:2]})
