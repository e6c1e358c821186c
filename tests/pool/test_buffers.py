"""A framework that fails half-way, at any of its calls, leaves a pool as it was."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest

from kvcache import (
    Batch,
    CacheFullError,
    CausalCache,
    ShapeError,
    SharedCellsError,
    WrapperCache,
    get_backend,
)

from .. import peek
from .failures import failing, failures_of
from .oracle import LAYERS, add_positions, attended, check_table, put_tokens

NUMPY = get_backend("numpy")


def make(backend, **limits):
    cache = CausalCache(shift=add_positions(backend), **limits)
    cache.init(backend, max_sequences=3, capacity=16, max_batch=16)
    return cache


def store(backend, cache, positions, sequences, names=None):
    cache.start_forward(Batch(positions, sequences))
    names = names or [100 * s + p for s, p in zip(sequences, positions, strict=True)]
    put_tokens(backend, cache, names, positions)


def filled(backend, **limits):
    """Sequence 0 with tokens 0 to 5, sequence 1 with 100 to 103."""
    cache = make(backend, **limits)
    store(backend, cache, range(6), [0] * 6)
    store(backend, cache, range(4), [1] * 4)
    return cache


def check(backend, cache, sequence, expected):
    """The next token of a sequence sees itself and `expected`: pairs of token and position."""
    position = cache.next_position(sequence)
    store(backend, cache, [position], [sequence], [999])
    for layer in range(LAYERS):
        assert attended(backend, cache, layer) == [sorted([*expected, (999, position)])]
    if not peek.pinned_rows(cache):
        check_table(peek.table(cache))
    cache.remove(sequence, position)


def run(first, start, stop):
    """Tokens at their positions, as they were stored."""
    return [(first + p, p) for p in range(start, stop)]


@pytest.mark.parametrize("sequences", [[0], [0, 1]])  # consecutive cells, and scattered ones
def test_a_put_that_fails_leaves_every_layer_usable(backend, monkeypatch, sequences):
    cache = filled(backend)
    positions = [cache.next_position(sequence) for sequence in sequences]
    hook = "write_finite_slices" if len(sequences) == 1 else "write_finite_row_sets"
    cache.start_forward(Batch(positions, sequences))
    names = [100 * s + p for s, p in zip(sequences, positions, strict=True)]
    for _ in failures_of(
        monkeypatch, backend, hook, lambda: put_tokens(backend, cache, names, positions)
    ):
        for layer in range(LAYERS):
            cache.set_layer(layer)
            [backend.to_host(array) for array in cache.get() if array is not None]
    for layer in range(LAYERS):
        seen = attended(backend, cache, layer)
        assert seen == [run(100 * s, 0, p + 1) for s, p in zip(sequences, positions, strict=True)]


@pytest.mark.parametrize(("hook", "call"), [("alloc", 1), ("alloc", 2), ("write_finite_slices", 1)])
def test_a_first_put_that_fails_allocates_nothing(backend, monkeypatch, hook, call):
    cache = make(backend)
    cache.start_forward(Batch(range(4), [0] * 4))
    with failing(monkeypatch, backend, hook, call):
        put_tokens(backend, cache, range(4), range(4))
    assert not peek.layers(cache)
    put_tokens(backend, cache, range(4), range(4))
    assert attended(backend, cache, 0)[-1] == run(0, 0, 4)


def test_layers_are_allocated_together(backend, monkeypatch):
    cache = make(backend)
    cache.allocate([1], 2, 3)
    for _ in failures_of(monkeypatch, backend, "alloc", lambda: cache.allocate([0, 1, 2], 2, 3)):
        assert list(peek.layers(cache)) == [1]
    with pytest.raises(ShapeError, match="keep their heads and head_dim"):
        cache.allocate([3, 2], 2, 4)
    assert sorted(peek.layers(cache)) == [0, 1, 2]


@pytest.mark.parametrize("hook", ["alloc", "from_host", "write_row_sets"])
@pytest.mark.parametrize("allocated", [True, False])
def test_rows_whose_write_fails_are_written_by_the_next_access(
    backend, monkeypatch, hook, allocated
):
    snapshot = filled(backend).snapshot(0).to_host()
    cache = filled(backend) if allocated else make(backend)
    cache.restore(2, snapshot)
    failed = [
        cache.snapshot(2, 0, 3).to_host().parts[0].rows.to_host()[0][0].data[0, :, 0].tolist()
        for _ in failures_of(monkeypatch, backend, hook, lambda: peek.layers(cache))
    ]
    assert failed or (hook, allocated) == ("alloc", True)
    assert failed == [[0, 1, 2]] * len(failed)  # read by others as if nothing had happened
    check(backend, cache, 2, run(0, 0, 6))
    if allocated:
        check(backend, cache, 1, run(100, 0, 4))


def wide(backend):
    """A cache of bfloat16 where there is one, which programs on JAX carry as integers."""
    cache = CausalCache()
    dtype = "bfloat16" if "bfloat16" in backend.dtypes else "float32"
    cache.init(backend, dtype, max_sequences=2, capacity=16, max_batch=16)
    cache.start_forward(Batch(range(4), [0] * 4))
    for layer in range(2):
        rows = backend.from_host(np.arange(4.0)[None, :, None] + 10 * layer, dtype)
        cache.set_layer(layer)
        cache.put(rows, rows)
    return cache


def read_all(backend, cache):
    """The first number of every token in all layers, keys and values."""
    found = []
    for layer in range(2):
        cache.set_layer(layer)
        found += [
            backend.to_host(part)[0, :4, 0].astype(float).tolist() for part in cache.get()[:2]
        ]
    return found


NUMBERS = [[0, 1, 2, 3]] * 2 + [[10, 11, 12, 13]] * 2


def test_an_export_that_fails_leaves_every_layer_usable(backend, monkeypatch):
    cache = wide(backend)
    for _ in failures_of(monkeypatch, backend, "traced_form", lambda: cache.program_state):
        assert read_all(backend, cache) == NUMBERS
    state = cache.program_state
    assert cache.program_state is state
    for call in range(1, 5):
        cache.program_state = cache.program_state
        with failing(monkeypatch, backend, "from_traced", call):
            cache.get()
        cache.program_state = cache.program_state
    assert read_all(backend, cache) == NUMBERS


@pytest.mark.parametrize("replace", ["import", "close"])
def test_writes_of_rows_keep_no_buffers_that_were_replaced(replace):
    cache = make(NUMPY)
    for position in range(2):
        store(NUMPY, cache, [position] * 2, [0, 1])
    old = [weakref.ref(buffer) for buffers in cache.program_state.values() for buffer in buffers]
    state = {
        layer: tuple(buffer.copy() for buffer in buffers)
        for layer, buffers in cache.program_state.items()
    }
    if replace == "import":
        cache.program_state = state
    else:
        cache.close()
    assert old
    assert all(buffer() is None for buffer in old)
    if replace == "import":
        store(NUMPY, cache, [2] * 2, [0, 1])
        assert attended(NUMPY, cache, 0)[0] == [(0, 0), (1, 1), (2, 2)]


def test_a_refused_import_changes_nothing(backend):
    cache = wide(backend)
    held = cache.get()[0]
    for state in ({}, {0: (held, held)}, {0: (held,), 1: (held,)}):
        with pytest.raises(ShapeError, match=r"layers \[0?(, )?1?\] differ|layers \[1\] differ"):
            cache.program_state = state
        backend.to_host(held)  # not consumed by a conversion
    assert read_all(backend, cache) == NUMBERS


def test_rows_are_read_while_a_program_holds_the_buffers(backend):
    cache = wide(backend)
    state = cache.program_state
    snapshot = cache.snapshot(0, 1, 3).to_host()
    assert snapshot.parts[0].rows.to_host()[1][1].data[0, :, 0].astype(float).tolist() == [11, 12]
    [backend.to_host(buffer) for buffers in state.values() for buffer in buffers]
    assert cache.program_state is state


# Removal from the middle.


@pytest.mark.parametrize("hook", ["alloc", "from_host", "read_rows", "write_rows", "sync"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_removal_that_fails_changes_nothing(backend, monkeypatch, hook, count):
    """The first one and a later one, in every cache of a wrapper, with a snapshot in the way."""
    caches = [filled(backend) for _ in range(count)]
    wrapper = WrapperCache(*caches)
    snapshots = [cache.snapshot(0) for cache in caches]
    for _ in failures_of(monkeypatch, backend, hook, lambda: wrapper.remove(0, 1, 3)):
        assert all(snapshot.resident for snapshot in snapshots)
        for cache in caches:
            check(backend, cache, 0, run(0, 0, 6))
    for cache in caches:  # a key that was never moved, behind those that were
        store(backend, cache, [4], [0], [50])
    for _ in failures_of(monkeypatch, backend, hook, lambda: wrapper.remove(0, 0, 2)):
        for cache in caches:
            check(backend, cache, 0, [(0, 0), (3, 1), (4, 2), (5, 3), (50, 4)])
    for cache in caches:
        check(backend, cache, 0, [(4, 0), (5, 1), (50, 2)])
        check(backend, cache, 1, run(100, 0, 4))


def test_moved_keys_whose_write_fails_are_written_by_the_next_access(backend, monkeypatch):
    cache = filled(backend)
    cache.remove(0, 1, 3)
    moved = [(0, 0), (3, 1), (4, 2), (5, 3)]
    for _ in failures_of(monkeypatch, backend, "write_rows", lambda: peek.layers(cache)):
        rows = cache.snapshot(0).to_host().parts[0].rows
        found = rows.to_host()[0][0].data[0].astype(int).tolist()
        assert [tuple(key) for key in found] == moved
    check(backend, cache, 0, moved)


def test_another_thread_reads_moved_keys_before_they_are_written():
    cache = filled(NUMPY)
    cache.remove(0, 1, 3)
    found = []
    snapshot = cache.snapshot(0)
    thread = threading.Thread(target=lambda: found.append(snapshot.to_host()))
    thread.start()
    thread.join()
    [part] = found[0].parts
    assert part.rows.to_host()[0][0].data[0].tolist() == [[0, 0], [3, 1], [4, 2], [5, 3]]
    assert part.rows.to_host()[0][1].data[0, :, 0].tolist() == [0.5, 3.5, 4.5, 5.5]


def test_cells_of_several_sequences_spill_no_snapshot():
    cache = filled(NUMPY)
    cache.copy_prefix(0, 2, 5)
    snapshot = cache.snapshot(0)
    with pytest.raises(SharedCellsError, match="some at or behind position 3"):
        cache.remove(0, 1, 3)
    assert snapshot.resident


def test_a_restore_without_room_spills_no_snapshot():
    cache = filled(NUMPY)
    pinned, spilled = cache.snapshot(1, 2), cache.snapshot(1).to_host()
    cache.remove(1, 0)
    store(NUMPY, cache, range(6, 16), [0] * 10)
    store(NUMPY, cache, range(14), [2] * 14)
    store(NUMPY, cache, range(14, 29), [2] * 15)
    full = r"^restoring needs 4 free cells; 3 of 48 are free or can be freed\. Remove sequences\.$"
    with pytest.raises(CacheFullError, match=full):
        cache.restore(1, spilled)
    assert pinned.resident
    cache.remove(2, 28)
    cache.restore(1, spilled)
    assert not pinned.resident
    cache.remove(2, 0)
    check(NUMPY, cache, 1, run(100, 0, 4))


def test_a_shared_prefix_moves_once_its_sequence_is_alone(backend):
    cache = filled(backend)
    cache.copy_prefix(0, 2, 6)
    cache.remove(0, 0)
    cache.remove(2, 0, 1)
    cache.copy_prefix(2, 0, 5)
    cache.remove(2, 0)
    cache.remove(0, 0, 2)
    check(backend, cache, 0, [(3, 0), (4, 1), (5, 2)])


# Many shifts are one.


class Coarse:
    """A shift that loses everything below 8: two of them lose what one does not."""

    def __init__(self, backend):
        self.backend = backend

    def __call__(self, layer, keys, offsets):
        rows = self.backend.to_host(keys).copy()
        rows[..., 1] += self.backend.to_host(offsets)
        rows[..., 1] = rows[..., 1] // 8 * 8
        return self.backend.from_host(rows)


def coarse(backend):
    cache = filled(backend)
    cache.shift = Coarse(backend)
    store(backend, cache, [50, 53], [0, 0], [50, 53])
    return cache


def positions_seen(backend, cache, sequence):
    """By token: the position that its key is for."""
    position = cache.next_position(sequence)
    store(backend, cache, [position], [sequence], [999])
    [seen] = attended(backend, cache, 0)
    cache.remove(sequence, position)
    return {token: place for token, place in seen if token != 999}


def test_every_shift_begins_with_the_key_as_it_was_put(backend):
    cache = coarse(backend)
    for _ in range(11):  # nothing lies there: all behind moves by one
        cache.remove(0, 20, 21)
    assert positions_seen(backend, cache, 0) | {50: 39 // 8 * 8, 53: 42 // 8 * 8} == (
        positions_seen(backend, cache, 0)
    )
    assert cache.next_position(0) == 43


def test_a_cell_forgets_the_key_of_another_token(backend):
    """A token in a cell whose last one was moved has moved nowhere, whoever brings it."""
    cache = coarse(backend)
    cache.remove(0, 20, 30)
    cache.remove(0, 0)
    for put in (
        lambda: store(backend, cache, [*range(6), 50, 53], [0] * 8),
        lambda: [store(backend, cache, [p], [0]) for p in (*range(6), 50, 53)],
    ):
        put()
        cache.remove(0, 20, 30)
        found = positions_seen(backend, cache, 0)
        assert (found[50], found[53]) == (40, 40)
        cache.remove(0, 0)
    store(backend, cache, range(20), [0] * 20)
    cache.remove(0, 0, 1)
    snapshot = cache.snapshot(0).to_host()
    cache.remove(0, 0)
    cache.restore(0, snapshot)
    cache.remove(0, 0, 1)
    assert positions_seen(backend, cache, 0)[19] == 8  # from 16, which is what the snapshot has


def test_a_copy_on_another_backend_goes_on_with_the_keys_as_they_were_put(backend):
    cache = coarse(backend)
    cache.remove(0, 20, 21)
    for target in ("numpy", backend):
        copy = cache.to_backend(target)
        other = peek.buffers(copy).backend
        copy.shift = Coarse(other)
        copy.remove(0, 20, 21)
        assert positions_seen(other, copy, 0)[50] == 48
    cache.remove(0, 20, 22)
    assert positions_seen(backend, cache, 0)[50] == 40


def test_memory_for_keys_as_they_were_put_is_taken_by_the_first_removal(backend, monkeypatch):
    sizes = []
    real = backend.alloc
    monkeypatch.setattr(backend, "alloc", lambda *shape: sizes.append(shape) or real(*shape))
    cache = filled(backend)
    before = len(sizes)
    assert before == 3  # keys and values of layer 0, keys of layer 1
    cache.remove(0, 1, 2)
    assert sizes[before:] == [(shape, dtype) for shape, dtype in (sizes[0], sizes[2])]
    cache.remove(0, 1, 2)
    cache.remove(1, 1, 2)
    assert len(sizes) == before + 2
