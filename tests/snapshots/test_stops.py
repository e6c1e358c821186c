"""Restores that stop inside a snapshot, snapshots of several, and the rows needed later."""

import numpy as np
import pytest

import kvcache
from kvcache import (
    Batch,
    CausalCache,
    EncoderCache,
    KVCache,
    KVCacheError,
    LayerCaches,
    RotatingKVCache,
    Snapshot,
    WrapperCache,
)

NUMPY = kvcache.get_backend("numpy")
KINDS = {
    "kv": KVCache,
    "rotating": lambda: RotatingKVCache(6),
    "sinks": lambda: RotatingKVCache(8, keep=2),
}


def feed(cache, backend, start, stop):
    """Keys are their positions, values the negatives of these."""
    keys = backend.from_host(np.arange(start, stop, dtype=np.float32)[None, None, :, None])
    cache.update(
        keys, backend.from_host(-np.arange(start, stop, dtype=np.float32)[None, None, :, None])
    )


def held(cache):
    return [array.data.ravel().tolist() for array in cache.to_layer()], cache.offset


@pytest.mark.parametrize("kind", KINDS)
def test_a_restore_that_stops_is_that_of_the_first_part(backend, kind):
    cache = KINDS[kind]()
    cache = LayerCaches([cache]).to_backend(backend)[0]
    cache.schedule([7])
    for start in range(0, 20, 4):
        feed(cache, backend, start, start + 4)
    whole = cache.snapshot()
    stopped, split = (LayerCaches([KINDS[kind]()]) for _ in range(2))
    stopped.restore(whole, stop=np.int64(7), backend=backend)
    assert (whole.start, whole.stop) == (0, 20)
    first, rest = whole.split(7)
    split.restore(first, backend=backend)
    assert held(stopped[0]) == held(split[0])
    again = KINDS[kind]()
    again.restore(first, rest, stop=20, backend=backend)
    assert held(again) == held(cache)


def pool(*caches):
    cache = WrapperCache(*caches) if len(caches) > 1 else caches[0]
    cache.init("numpy", max_sequences=3, capacity=32, max_batch=32)
    return cache


def store(cache, start, stop, sequence=0):
    cache.start_forward(Batch(range(start, stop), [sequence] * (stop - start)))
    cache.set_layer(0)
    cache.put(np.arange(start, stop, dtype=np.float32)[None, :, None])


def keys_of(cache, sequence):
    layers = cache.snapshot(sequence).parts[0].rows.content()
    return layers[0][0].data.ravel().tolist() if layers else []


@pytest.mark.parametrize("form", [lambda snapshot: snapshot, Snapshot.to_host])
def test_a_pool_restores_up_to_a_stop_and_shares_no_cell_behind_it(form):
    cache = pool(CausalCache())
    store(cache, 0, 10)
    with form(cache.snapshot(0)) as whole:
        cache.restore(1, whole, stop=4)
        assert cache.next_position(1) == 4
        assert keys_of(cache, 1) == [0, 1, 2, 3]
    store(cache, 4, 6, sequence=1)
    assert keys_of(cache, 0) == [*range(10)]


def test_an_encoder_has_the_output_of_the_last_run_before_the_stop():
    cache = EncoderCache()
    cache.init("numpy", max_sequences=3, max_batch=8)
    for position in (2, 6):
        cache.start_forward(Batch([position], [0], [0]))
        cache.set_layer(0)
        output = np.full((1, 3, 2), position, np.float32)
        cache.put(output, output)
        if position == 2:
            first = cache.snapshot(0, 0, 5)
    whole = first.merge(cache.snapshot(0, 5, 9))
    for sequence, stop, image in ((1, 5, 2), (2, 7, 6)):
        cache.restore(sequence, whole, stop=stop)
        cache.start_forward(Batch([stop], [sequence]))
        cache.set_layer(0)
        assert set(np.asarray(cache.get()[0]).ravel().tolist()) == {image}


def test_what_a_restore_cannot_stop_at():
    cache = pool(CausalCache(window=4))
    cache.schedule(0, [5])
    store(cache, 0, 8)
    store(cache, 8, 12)
    store(cache, 12, 16)
    one, two = cache.snapshot(0, 0, 12).split(8)
    for stop in (0, 8, 13, -1):
        says = rf"stops inside the last snapshot, \[8, 12\); got {stop}"
        with pytest.raises(ValueError, match=says):
            cache.restore(1, one, two, stop=stop)
    with pytest.raises(TypeError, match="stop"):
        cache.restore(1, one, two, stop=9.5)
    says = "before position 7 .* the last place to go on is 5. Stop"
    with pytest.raises(KVCacheError, match=says):
        cache.restore(1, one, stop=7)
    assert cache.next_position(1) == 0
    cache.restore(1, one, stop=5)
    assert cache.next_position(1) == 5


@pytest.mark.parametrize("form", [lambda snapshot: snapshot, Snapshot.to_host])
def test_several_merge_at_once(form):
    cache = pool(CausalCache())
    store(cache, 0, 12)
    parts = [form(cache.snapshot(0, start, start + 3)) for start in (0, 3, 6, 9)]
    with pytest.raises(ValueError, match=r"merge meet; got \[3, 6\) and \[9, 12\)"):
        parts[0].merge(parts[1], parts[3])
    resident = parts[0].resident
    with parts[0].merge(*parts[1:]) as whole:
        assert (whole.start, whole.stop, whole.resident) == (0, 12, resident)
        assert all(part.nbytes == 0 for part in parts)
        cache.restore(1, whole)
        assert keys_of(cache, 1) == [*range(12)]
    cache.remove(0, 0), cache.remove(1, 0)
    assert cache.snapshot(0).nbytes == 0


def test_what_resuming_later_needs_of_a_snapshot():
    cache = pool(CausalCache(window=5), CausalCache())
    cache.start_forward(Batch(range(12), [0] * 12))
    for kind in (0, 1):
        cache.set_layer_type(kind)
        cache.set_layer(0)
        cache.put(np.arange(12, dtype=np.float32)[None, :, None])
    first = cache.snapshot(0, 0, 9)
    held = first.parts[0].rows.positions.tolist()
    for position in (9, 11, 30):
        with first.needed_at(position) as needed:
            window, full = (part.rows.positions.tolist() for part in needed.parts)
            assert (needed.start, needed.stop) == (0, 9)
            assert window == [at for at in held if at >= position - 4]
            assert full == [*range(9)]
    assert first.parts[0].rows.positions.tolist() == held
    with pytest.raises(ValueError, match=r"rows of \[0, 9\) are needed at 9 or behind it; got 8"):
        first.needed_at(8)


def test_a_file_is_bound_to_ids_that_are_ids(tmp_path):
    cache = KVCache("numpy")
    feed(cache, NUMPY, 0, 4)
    snapshot, path = cache.snapshot(), tmp_path / "first.safetensors"
    for ids, says in (
        ([1, 2, 3, -4], "token ids are >= 0; got -4"),
        ([1, 2], "before its stop, 4; got 2"),
    ):
        with pytest.raises(ValueError, match=says):
            snapshot.save(path, tokens=ids)
    assert not path.exists()
    snapshot.save(path, tokens=[1, 2, 3, 4])
    with pytest.raises(ValueError, match="token ids are >= 0; got -1"):
        Snapshot.load(path, tokens=[-1])
    assert Snapshot.load(path, tokens=np.array([1, 2, 3, 4])).stop == 4


def test_an_empty_snapshot_of_the_same_caches():
    stack = LayerCaches([KVCache("numpy"), RotatingKVCache(6, backend="numpy")])
    for cache in stack:
        feed(cache, NUMPY, 0, 9)
    with stack.snapshot() as snapshot:
        empty = snapshot.empty_like(9, 12)
        assert (empty.start, empty.stop, empty.nbytes) == (9, 12, 0)
        assert empty.specs == snapshot.specs
        assert [part.rows.positions.tolist() for part in empty.parts] == [[], []]
        assert snapshot.nbytes, "it stays as it is"
        assert repr(empty) == "<Snapshot [9, 12) of kv, rotating, 0 bytes, host>"
        nbytes = snapshot.nbytes
        assert repr(snapshot) == f"<Snapshot [0, 9) of kv, rotating, {nbytes} bytes, resident>"


def test_snapshots_behind_the_stop_are_left_out():
    cache = KVCache("numpy")
    feed(cache, NUMPY, 0, 8)
    first, second = cache.snapshot().split(4)
    fresh = KVCache("numpy")
    with pytest.raises(ValueError, match=r"\[4, 8\); got 4\. Leave out snapshots behind it\.$"):
        fresh.restore(first, second, stop=4)


@pytest.mark.parametrize("closing", [False, True])
def test_a_union_has_the_rows_of_both_within_its_span(closing):
    def ring(stop):
        cache = RotatingKVCache(6, backend="numpy")
        feed(cache, NUMPY, 0, stop)
        return cache.snapshot()

    def positions(snapshot):
        return snapshot.parts[0].rows.positions.tolist()

    late, other = ring(11), ring(8)
    first, rest = late.split(3)
    second, third = rest.split(7)
    assert [positions(part) for part in (first, second, third)] == [[], [5, 6], [7, 8, 9, 10]]
    both = second.union(other) if closing else second.united(other)
    assert (both.start, both.stop, positions(both)) == (3, 7, [3, 4, 5, 6])
    left = [positions(second), positions(other)]
    assert left == ([[], []] if closing else [[5, 6], [2, 3, 4, 5, 6, 7]])
    [keys, _] = both.parts[0].rows.host_copies()[0]
    assert keys.data.ravel().tolist() == [3, 4, 5, 6]
