"""The cache of a recurrent layer: whose arrays are whose, what is refused, and hybrids."""

import copy
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import numpy as np
import pytest

from kvcache import (
    DTypeError,
    KVCache,
    KVCacheError,
    LayerCaches,
    RotatingKVCache,
    ShapeError,
    Snapshot,
    SnapshotMismatchError,
    StateCache,
    StateError,
    TracedArrayError,
    TrimError,
    UnknownBackendError,
    backend_of,
    get_backend,
)
from kvcache.backends import HOST_DTYPES
from kvcache.snapshots.rows import TokenRows
from kvcache.snapshots.snapshot import Part
from kvcache.storage.arrays import NamedArray
from kvcache.testing.coded import same

from .oracle import SHAPE
from .state_oracle import check_arrays, dtypes_of, host_state, state, state_bytes

NUMPY = get_backend("numpy")
BOTH = ("float32", "bfloat16")


def filled(backend, *stamps, points=()):
    """A cache that took one token for each of `stamps`."""
    cache = StateCache(backend)
    cache.schedule(points)
    for stamp in stamps:
        cache.advance(1, *state(backend, stamp, dtypes_of(backend)))
    return cache


def check(cache, offset, stamp):
    assert cache.offset == offset
    check_arrays(cache.backend, cache.state, stamp, dtypes_of(cache.backend))


# Ownership.


def test_what_came_in_stays_the_callers(backend):
    """A model may use its arrays again, for the next layer or the next token."""
    cache, dtypes = StateCache(backend), dtypes_of(backend)
    cache.schedule([1, 2])
    arrays = [
        backend.alloc(array.shape, dtype)
        for array, dtype in zip(host_state(0, dtypes), dtypes, strict=True)
    ]
    for stamp in (1, 2, 3):
        for number, new in enumerate(state(backend, stamp, dtypes)):
            arrays[number] = backend.slice_update(arrays[number], new, 0, 0)
        if stamp == 2:
            cache.cuts(2)
            cache.record(2, *arrays)
        else:
            cache.advance(stamp - cache.offset, *arrays)
        if backend.name == "jax":  # whose writes consume the buffer, and so would the cache's
            arrays = [backend.alloc(array.shape, backend.dtype_name(array)) for array in arrays]
    check(cache, 3, 3)
    for position in (2, 1):
        cache.trim(1)
        check(cache, position, position)


def test_a_returned_state_outlives_changes(backend):
    cache = filled(backend, 1)
    arrays = cache.state
    cache.checkpoint()
    cache.advance(3, *state(backend, 2, dtypes_of(backend)))
    cache.rollback()
    cache.reset()
    check_arrays(backend, arrays, 1, dtypes_of(backend))


def test_copies_share_until_they_differ(backend):
    cache = filled(backend, 1, 2, points=[1])
    for twin in (cache.copy(), copy.copy(cache), copy.deepcopy(cache)):
        assert twin.kept == (1, 2)
        assert twin.nbytes == cache.nbytes
        twin.trim(1)
        twin.advance(4, *state(backend, 9, dtypes_of(backend)))
        check(twin, 5, 9)
    check(cache, 2, 2)
    cache.reset()
    assert cache.nbytes == 0


def test_memory_is_what_is_kept_to_the_byte(backend):
    one = state_bytes(dtypes_of(backend))
    cache = filled(backend, 1, 2, 3, points=[2])
    assert cache.nbytes == 2 * one
    cache.checkpoint()
    assert cache.nbytes == 2 * one
    for position in cache.cuts(3):
        cache.record(position, *state(backend, position, dtypes_of(backend)))
    assert cache.nbytes == 4 * one
    snapshot = cache.snapshot()
    cache.advance(3, *state(backend, 6, dtypes_of(backend)))
    assert cache.nbytes == 5 * one
    cache.rollback(2)
    assert cache.nbytes == 3 * one  # the one at 3 is that of the snapshot
    assert snapshot.nbytes == 2 * one
    assert snapshot.host_nbytes == 0
    snapshot.close()
    assert cache.nbytes == 2 * one
    lasting = cache.snapshot()
    cache.reset()
    assert (cache.nbytes, lasting.resident, lasting.host_nbytes) == (0, False, 2 * one)
    restored = StateCache(backend)
    restored.restore(lasting)
    check(restored, 5, 5)


@pytest.mark.parametrize("rows", [[0], [1, 0, 1, 1, 0]])
def test_memory_counts_a_snapshot_of_other_rows_to_the_byte(backend, rows):
    two, one = state_bytes(dtypes_of(backend)), state_bytes(dtypes_of(backend)) // 2
    cache = filled(backend, 1, 2, points=[1])
    snapshot = cache.snapshot()
    cache.select(rows)
    now = len(rows) * one
    assert cache.nbytes == 2 * now + 2 * two
    assert snapshot.resident
    wide = state(backend, 4, dtypes_of(backend))
    cache.advance(1, *[backend.gather(array, np.array(rows), 0) for array in wide])
    assert cache.nbytes == 2 * now + 2 * two  # 2 was no resume point
    cache.export_state()
    assert cache.nbytes == 2 * now + 2 * two
    snapshot.close()
    assert cache.nbytes == 2 * now


# What is refused.


def wrong_states(backend, dtypes):
    """What is wrong with a state behind others, the error and what it says."""
    matrix, last = state(backend, 1, dtypes)
    integers = backend.from_host(np.ones((2, 5)), "int32")
    half = [backend.slice(array, 0, 1, 0) for array in (matrix, last)]
    empty = backend.slice(last, 0, 0, 1)
    scalar = backend.from_host(np.float32(1))
    again = r"reset\(\) starts anew"
    return {
        "none": ((), ShapeError, "one array or more; got none"),
        "one": ((matrix,), ShapeError, "as many arrays as the first, 2; got 1"),
        "three": ((matrix, last, last), ShapeError, "as the first, 2; got 3"),
        "swapped": ((last, matrix), ShapeError, rf"array 0 is \w+\[2, 5\], not .*{again}"),
        "dtype": ((matrix, integers), DTypeError, rf"array 1 is int32\[2, 5\], not \w+.*{again}"),
        "batch": (half, ShapeError, rf"array 0 is float32\[1, 3, 4\], not .*{again}"),
        "batches": ((half[0], last), ShapeError, r"batch axis, .*got \(1, 3, 4\), \(2, 5\)"),
        "empty": ((matrix, empty), ShapeError, r"no empty axis; got \(2, 3, 4\), \(2, 0\)"),
        "scalar": ((matrix, scalar), ShapeError, r"batch axis, .*got \(2, 3, 4\), \(\)"),
        "list": ((matrix, [1.0]), UnknownBackendError, "got builtins.list"),
        "tuple": (((matrix, last),), UnknownBackendError, "and states must .*got builtins.tuple"),
        "nothing": ((matrix, None), UnknownBackendError, "got builtins.NoneType"),
    }


WRONG = list(wrong_states(NUMPY, BOTH))


def seen(cache):
    arrays = [cache.backend.to_host(array).tobytes() for array in cache.state] if cache.kept else []
    return cache.offset, cache.kept, cache.nbytes, cache.dtype, cache.backend, arrays


@pytest.mark.parametrize("name", WRONG)
def test_wrong_states(backend, name):
    arrays, error, match = wrong_states(backend, dtypes_of(backend))[name]
    cache = filled(backend, 1, 2)
    cache.schedule([4])
    cache.cuts(4)
    before = seen(cache)
    for call in (lambda: cache.advance(1, *arrays), lambda: cache.record(4, *arrays)):
        with pytest.raises(error, match=match):
            call()
        assert seen(cache) == before
    fresh = StateCache(backend)
    if name in ("none", "batches", "empty", "scalar", "list", "tuple", "nothing"):
        with pytest.raises(error, match=match):
            fresh.advance(1, *arrays)
        assert seen(fresh) == seen(StateCache(backend))


@pytest.mark.cross_backend
def test_a_state_stays_on_its_backend():
    pytest.importorskip("torch")
    cache = filled(NUMPY, 1)
    with pytest.raises(DTypeError, match="array 0 of a state must be an array of numpy:cpu"):
        cache.advance(1, *state(get_backend("torch"), 2))
    with pytest.raises(DTypeError, match=r"must be an array of torch:cpu, where this cache lives"):
        StateCache("torch").advance(1, *state(NUMPY, 2))


@pytest.mark.parametrize("tokens", [0, -1, 2**31 - 1, 10**30])
def test_wrong_numbers_of_tokens(tokens):
    cache = filled(NUMPY, 1)
    match = f"an update has 1 to {2**31 - 2} tokens, positions being int32; got {tokens}"
    for call in (lambda: cache.advance(tokens, *state(NUMPY, 2)), lambda: cache.cuts(tokens)):
        with pytest.raises(ValueError, match=match):
            call()
    check(cache, 1, 1)


@pytest.mark.parametrize("odd", [1.0, "1", None, Decimal(1), [1]])
def test_integers_only(odd):
    cache = filled(NUMPY, 1)
    for call in (
        lambda: cache.advance(odd, *state(NUMPY, 2)),
        lambda: cache.cuts(odd),
        lambda: cache.record(odd, *state(NUMPY, 2)),
        lambda: cache.trim(odd),
        lambda: cache.can_trim(odd),
        lambda: cache.schedule([odd]),
        lambda: cache.export_state(odd),
    ):
        with pytest.raises(TypeError, match="must be an integer; got"):
            call()
    cache.checkpoint()
    with pytest.raises(TypeError, match="accepted must be an integer; got"):
        cache.rollback(odd)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.asarray])
def test_integers_of_every_kind(kind):
    cache = StateCache(NUMPY)
    cache.schedule([kind(2)])
    assert cache.cuts(kind(3)) == [2]
    cache.record(kind(2), *state(NUMPY, 2))
    cache.advance(kind(3), *state(NUMPY, 3))
    cache.checkpoint()
    cache.advance(kind(1), *state(NUMPY, 4))
    cache.rollback(kind(0))
    cache.trim(kind(1))
    check(cache, 2, 2)
    assert type(cache.offset) is int
    assert [type(position) for position in cache.kept] == [int]


def test_a_state_is_recorded_behind_a_cut_only():
    cache, arrays = filled(NUMPY, 1, points=[4, 6, 40]), state(NUMPY, 9)
    rule = r"^record takes the state behind one of the cuts of the coming update, {}; got position"
    with pytest.raises(StateError, match=rule.format(r"\[\]") + r" 4\. Call cuts\(tokens\) first"):
        cache.record(4, *arrays)
    assert cache.cuts(9) == [4, 6]
    for position in (-1, 0, 1, 3, 5, 10, 40):
        with pytest.raises(StateError, match=rule.format(r"\[4, 6\]") + f" {position}"):
            cache.record(position, *arrays)
    cache.record(6, *arrays)
    cache.record(4, *state(NUMPY, 4))
    cache.advance(9, *state(NUMPY, 10))
    assert cache.kept == (4, 6, 10)
    with pytest.raises(StateError, match=r"update, \[\]; got position 6"):
        cache.record(6, *arrays)


def test_a_recorded_state_is_history_with_its_update_only():
    """A pass that raised, another one in its place: of the first nothing stays."""
    cache = filled(NUMPY, 1, points=[3])
    for give_up in (
        lambda: cache.cuts(4),
        lambda: cache.advance(1, *state(NUMPY, 2)),
        lambda: cache.trim(0),
    ):
        cache.cuts(4)
        cache.record(3, *state(NUMPY, 99))
        give_up()
        cache.advance(4, *state(NUMPY, 5))
        assert 3 not in cache.kept
        cache.reset()
        cache.schedule([3])
        cache.advance(1, *state(NUMPY, 1))


def test_going_back_where_no_state_is():
    cache = filled(NUMPY, 1, 2, 3, 4, 5, points=[2])
    assert [cache.can_trim(tokens) for tokens in range(-1, 7)] == [
        *(False, True, False, False, True, False, True, False),
    ]
    where = r"goes back only to positions with a state, \[0, 2, 5\]; got 1 tokens, position 4\. sch"
    with pytest.raises(TrimError, match=where):
        cache.trim(1)
    for tokens in (-1, 6):
        with pytest.raises(TrimError, match=f"takes back 0 to 5 tokens, those seen; got {tokens}"):
            cache.trim(tokens)
    with pytest.raises(TrimError, match="open checkpoint"):
        cache.rollback()
    cache.checkpoint()
    cache.advance(4, *state(NUMPY, 9))
    which = r"state behind position 7 was not recorded; accepted can be \[0, 4\], got 2\. Record"
    with pytest.raises(TrimError, match=which):
        cache.rollback(2)
    with pytest.raises(TrimError, match="accepted must be 0 to 4 tokens, those since; got 5"):
        cache.rollback(5)
    cache.rollback()
    check(cache, 5, 5)
    cache.trim(3)
    check(cache, 2, 2)
    cache.trim(2)
    assert (cache.offset, cache.state, cache.kept) == (0, (), ())
    with pytest.raises(ShapeError, match="as many arrays as the first"):  # until reset
        cache.advance(1, np.ones((1, 1), "f4"))


@pytest.mark.parametrize("accepted", range(6))
def test_speculation(backend, accepted):
    """Wherever a draft is cut off, the next state is that without speculation."""
    cache, dtypes = filled(backend, 1, 2), dtypes_of(backend)
    cache.checkpoint()
    for tokens in (2, 3):  # two drafts in a row
        for position in cache.cuts(tokens):
            cache.record(position, *state(backend, position, dtypes))
        cache.advance(tokens, *state(backend, cache.offset + tokens, dtypes))
    cache.rollback(accepted)
    check(cache, 2 + accepted, 2 + accepted)
    assert cache.nbytes == state_bytes(dtypes)


# Frameworks.


@pytest.mark.one_backend(name="torch")
class TestTorch:
    def test_gradients_end_at_a_state(self):
        torch = pytest.importorskip("torch")
        cache, array = StateCache(), torch.ones(1, 3, requires_grad=True)
        cache.advance(1, array * 2)
        cache.advance(1, array.detach())
        assert not cache.state[0].requires_grad
        cache.advance(1, array)
        assert not cache.state[0].requires_grad

    def test_a_state_of_inference_serves_training(self):
        torch = pytest.importorskip("torch")
        cache = StateCache()
        with torch.inference_mode():
            cache.advance(1, torch.ones(1, 3) * 2)
        weight = torch.ones(3, requires_grad=True)
        (cache.state[0] * weight).sum().backward()
        assert (weight.grad == 2).all()

    def test_transforms_are_refused(self):
        torch = pytest.importorskip("torch")
        cache = StateCache()
        with pytest.raises(TracedArrayError, match=r"kvcache\.functional"):
            torch.func.vmap(lambda array: cache.advance(1, array))(torch.ones(2, 1, 3))
        assert cache.backend is None


@pytest.mark.one_backend(name="jax")
def test_jax_copies_nothing_and_refuses_transforms():
    jax = pytest.importorskip("jax")
    cache, array = StateCache(), jax.numpy.ones((1, 3))
    cache.advance(1, array)
    assert cache.state[0] is array
    with pytest.raises(TracedArrayError, match=r"kvcache\.functional"):
        jax.jit(lambda array: cache.advance(1, array))(array)
    assert cache.offset == 1


@pytest.mark.one_backend(name="mlx")
def test_mlx_states_are_evaluated_and_their_own():
    mx = pytest.importorskip("mlx.core")
    cache = StateCache()
    cache.schedule([1])
    array = mx.ones((1, 3)) * 2  # lazy: only this thread can compute it
    cache.cuts(2)
    cache.record(1, array)
    array[0] = 7
    cache.advance(1, array + 1)
    array[0] = 9
    cache.state[0][0] = 5
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(lambda: np.array(cache.state[0])).result()
    assert (read == 8).all()


# Snapshots.


def test_a_snapshot_resumes_where_a_state_was_kept(backend):
    cache = filled(backend, *range(1, 10), points=[3, 6])
    whole = cache.snapshot()
    assert whole.resident
    assert whole.parts[0].rows.positions.tolist() == [2, 5, 8]
    lower, upper = whole.split(5)
    assert not lower.resumable_anywhere
    restored = StateCache(backend)
    with pytest.raises(KVCacheError, match=r"the last place to go on is 3\. Stop there"):
        restored.restore(lower)
    assert (restored.offset, restored.dtype) == (0, None)
    again = StateCache(backend)
    again.restore(lower, upper)
    check(again, 9, 9)
    first, _ = lower.split(3)
    restored.restore(first)
    check(restored, 3, 3)
    assert restored.kept == (3,)


def test_drafts_are_in_no_snapshot():
    cache = filled(NUMPY, 1, 2, points=[2, 4])
    cache.checkpoint()
    for position in cache.cuts(3):
        cache.record(position, *state(NUMPY, position))
    cache.advance(3, *state(NUMPY, 5))
    assert cache.kept == (2, 3, 4, 5)
    assert cache.snapshot().parts[0].rows.positions.tolist() == [1, 3, 4]
    assert cache.snapshot(0, 3).parts[0].rows.positions.tolist() == [1, 2]
    assert cache.copy().kept == (2, 4, 5)


def test_a_snapshot_holds_the_states_behind_its_tokens():
    cache = filled(NUMPY, *range(1, 8), points=[3, 5])
    for start, stop, rows in ((0, 3, [2]), (2, 5, [2, 4]), (3, 5, [4]), (3, 7, [4, 6]), (0, 2, [])):
        assert cache.snapshot(start, stop).parts[0].rows.positions.tolist() == rows


def test_what_a_copy_keeps_it_goes_on_keeping():
    twin = filled(NUMPY, 1, 2, 3, points=[2]).copy().copy()
    twin.advance(1, *state(NUMPY, 4))
    twin.checkpoint()
    twin.rollback()
    assert twin.kept == (2, 4)
    twin.trim(2)
    check(twin, 2, 2)


def test_a_position_that_was_passed_is_no_resume_point():
    cache = filled(NUMPY, 1)
    cache.checkpoint()
    cache.advance(1, *state(NUMPY, 2))
    cache.advance(1, *state(NUMPY, 3))
    cache.schedule([-1, 0, 1, 2, 3])
    cache.advance(1, *state(NUMPY, 4))
    assert cache.kept == (1, 2, 3, 4)
    cache.rollback(3)
    assert cache.kept == (3, 4)


def test_rows_that_are_no_states_are_refused():
    snapshot = filled(NUMPY, 1, 2).snapshot().to_host()
    [part] = snapshot.parts
    good = part.rows.content()[0]
    for arrays in (
        (),
        good[1:],
        good[::-1],
        tuple(array._replace(token_axis=1) for array in good),
        (good[0], good[1]._replace(data=good[1].data[:, :1])),
        (good[0]._replace(data=good[0].data[:, 0, 0, 0]), good[1]),
        (good[0]._replace(data=good[0].data.astype(np.float64)), good[1]),
    ):
        rows = TokenRows(part.rows.positions, {0: arrays})
        cache = StateCache(NUMPY)
        with pytest.raises(SnapshotMismatchError, match=r"are arrays state0, state1, \.\.\., with"):
            cache.restore(Snapshot(0, 2, [Part(part.spec, rows)]))
        assert cache.offset == 0


def test_snapshots_of_other_dtypes_do_not_mix():
    one, two = filled(NUMPY, 1).snapshot(), StateCache(NUMPY)
    two.advance(1, *state(NUMPY, 1, ("float32", "float32")))
    with pytest.raises(SnapshotMismatchError, match="same kinds, windows and dtype"):
        one.union(two.snapshot())


def test_files_of_states_are_checked(tmp_path):
    """Whatever stands in a file, a cache holds states behind their positions, or there is none."""
    cache = filled(NUMPY, 1, 2, 3, points=[2])
    positions, *states = cache.to_layer()
    assert positions.data.tolist() == [2, 3]
    StateCache(NUMPY).from_layer((positions, *states), 3)
    forged = {
        "no positions": tuple(states),
        "positions only": (positions,),
        "nothing": (),
        "long": (positions._replace(data=positions.data.astype(np.int64)), *states),
        "descending": (positions._replace(data=positions.data[::-1].copy()), *states),
        "of another end": (positions._replace(data=positions.data - 1), *states),
        "not after 0": (positions._replace(data=np.array([0, 3], np.int32)), *states),
        "too few": (positions._replace(data=positions.data[1:]), *states),
        "ragged": (positions, states[0], states[1]._replace(data=states[1].data[1:])),
        "another name": (positions, NamedArray("state7", states[0].data, 0)),
    }
    for name, arrays in forged.items():
        target = StateCache(NUMPY)
        with pytest.raises(SnapshotMismatchError, match=r"recurrent layer|ascending positions"):
            target.from_layer(arrays, 3)
        assert target.offset == 0, name
    with pytest.raises(KVCacheError, match="names a backend; got none"):
        StateCache().from_layer((positions, *states), 3)


# Hybrids.


def hybrid(backend):
    return LayerCaches([KVCache(backend), RotatingKVCache(6, 2, backend), StateCache(backend)])


def feed(caches, tokens, recording=True):
    """The next tokens of a model whose states and keys are named after their positions."""
    start = caches[0].offset
    for cache in caches:
        backend = cache.backend
        if isinstance(cache, StateCache):
            for position in cache.cuts(tokens) if recording else ():
                cache.record(position, *state(backend, position, dtypes_of(backend)))
            cache.advance(tokens, *state(backend, start + tokens, dtypes_of(backend)))
        else:
            update = SHAPE.keys(tokens, start), SHAPE.values(tokens, start)
            cache.update(*map(backend.from_host, update))


def held(caches):
    """Everything that layers hold, on the host, however many slots a framework pads."""
    return [
        (cache.offset, [(a.name, a.data.dtype, a.data.shape, a.data.tobytes()) for a in layer])
        for cache in caches
        for layer in [cache.copy().to_layer()]
    ]


def assert_goes_on_as(caches, tokens):
    """Offset, the state, and the tokens of all other layers are those of a run of `tokens`."""
    other = hybrid(caches[0].backend)
    feed(other, tokens)
    check(caches[2], tokens, tokens)
    for cache, wanted in zip(caches[:2], other[:2], strict=True):
        assert cache.offset == wanted.offset
        assert held([cache]) == held([wanted])


@pytest.mark.parametrize("accepted", [0, 1, 3, 4])
def test_hybrid_speculation(backend, accepted):
    caches = hybrid(backend)
    feed(caches, 7)
    caches.checkpoint()
    feed(caches, 4)
    caches.rollback(accepted)
    assert caches.offset == 7 + accepted
    assert_goes_on_as(caches, 7 + accepted)


def test_all_layers_go_back_or_none(backend):
    caches = hybrid(backend)
    feed(caches, 3)
    caches.checkpoint()
    feed(caches, 4, recording=False)
    before = held(caches)
    with pytest.raises(TrimError, match="position 5 was not recorded"):
        caches.rollback(2)
    assert held(caches) == before
    caches.rollback()
    feed(caches, 2)
    before = held(caches)
    with pytest.raises(TrimError, match="only to positions with a state"):
        caches.trim(1)
    assert held(caches) == before
    assert not caches.can_trim(1)
    caches.trim(5)
    assert caches.offset == 0
    feed(caches, 4)
    assert_goes_on_as(caches, 4)


def test_hybrid_snapshots_resume_where_all_layers_can(backend):
    caches = hybrid(backend)
    caches.schedule([4, 9])
    feed(caches, 12)
    snapshot = caches.snapshot()
    assert [part.spec.kind for part in snapshot.parts] == ["kv", "rotating", "state"]
    for position in (4, 9, 12):
        piece = snapshot.copy()
        if position < 12:
            piece, _ = piece.split(position)
        for source, stop in ((piece, None), (snapshot, position)):
            again = hybrid(backend)
            again.restore(source, stop=stop)
            assert again.offset == position
            assert_goes_on_as(again, position)
    with pytest.raises(KVCacheError, match="the last place to go on is 9"):
        hybrid(backend).restore(snapshot, stop=11)
    elsewhere, _ = snapshot.split(8)
    with pytest.raises(KVCacheError, match="the last place to go on is 4"):
        hybrid(backend).restore(elsewhere)


PORTABLE = ("numpy", "torch", "jax", "mlx")


@pytest.mark.cross_backend
@pytest.mark.parametrize("target", PORTABLE)
@pytest.mark.parametrize("source", PORTABLE)
def test_a_hybrid_of_one_framework_goes_on_in_another(source, target, tmp_path):
    for name in (source, target):
        pytest.importorskip({"mlx": "mlx.core"}.get(name, name))
    caches = hybrid(get_backend(source))
    caches.schedule([4])
    feed(caches, 9)
    wanted = held(caches)
    caches.snapshot().save(tmp_path / "snapshot", tokens=range(9))
    caches.save(tmp_path / "caches")
    restored = hybrid(get_backend(target))
    restored.restore(Snapshot.load(tmp_path / "snapshot", tokens=range(9)))
    check(restored[2], 9, 9)
    for again in (
        LayerCaches.load(tmp_path / "caches", target),
        caches.to_backend(target),
    ):
        assert [backend_of(cache.state[0]).name for cache in again] == [target] * 3
        assert held(again) == wanted
        again[2].trim(5)
        check(again[2], 4, 4)
    assert held(caches) == wanted


@pytest.mark.parametrize("dtype", HOST_DTYPES)
def test_every_dtype_beside_another_one(backend, dtype, tmp_path):
    if dtype not in backend.dtypes:
        with pytest.raises(DTypeError, match=dtype):
            filled_on_numpy(dtype).to_backend(backend)
        return
    cache = filled_on_numpy(dtype).to_backend(backend)
    assert cache.dtype == ("float32", dtype)
    cache.save(tmp_path / "cache")
    cache.snapshot().save(tmp_path / "snapshot")
    restored = StateCache(backend)
    restored.restore(Snapshot.load(tmp_path / "snapshot"))
    for again in (restored, StateCache.load(tmp_path / "cache", backend), cache):
        for array, expected in zip(again.state, host_state(2, ("float32", dtype)), strict=True):
            same(backend.to_host(array), expected)


def filled_on_numpy(dtype):
    cache = StateCache(NUMPY)
    for stamp in (1, 2):
        cache.advance(1, *state(NUMPY, stamp, ("float32", dtype)))
    return cache


def test_any_number_of_arrays(backend, tmp_path):
    """One, or seven, of one axis or six."""
    for shapes in ([(3,)], [(2, *[1 + axis % 3] * axis) for axis in range(1, 6)] + [(2,)]):
        cache = StateCache(backend)
        hosts = [np.full(shape, number, np.float32) for number, shape in enumerate(shapes)]
        cache.advance(5, *map(backend.from_host, hosts))
        cache.save(tmp_path / "cache")
        restored = StateCache(backend)
        restored.restore(cache.snapshot())
        for again in (restored, StateCache.load(tmp_path / "cache", backend), cache.copy()):
            for array, expected in zip(again.state, hosts, strict=True):
                same(backend.to_host(array), expected)
