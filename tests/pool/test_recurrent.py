"""The recurrent pool: what the model is given, what is refused, what gives way, and hybrids."""

import threading

import numpy as np
import pytest

from kvcache import (
    Batch,
    CacheConfig,
    CacheFullError,
    CausalCache,
    DTypeError,
    EncoderCache,
    KVCacheError,
    LayerCaches,
    NotSupportedError,
    PrefixCache,
    RecurrentCache,
    ShapeError,
    Snapshot,
    SnapshotMismatchError,
    StateCache,
    StateError,
    TrimError,
    UnknownBackendError,
    WrapperCache,
    get_backend,
)
from kvcache.snapshots.rows import TokenRows
from kvcache.snapshots.snapshot import Part
from kvcache.storage.arrays import NamedArray

from .. import peek
from .state_oracle import (
    LAYERS,
    check_rows,
    check_states,
    host_state,
    state_bytes,
    states,
)

NUMPY = get_backend("numpy")


def make(backend=NUMPY, resume_points=8, max_sequences=3, max_batch=8):
    cache = RecurrentCache(resume_points)
    cache.init(backend, max_sequences=max_sequences, max_batch=max_batch)
    return cache


def code(sequence, position):
    """The stamp of the state behind a position."""
    return 100 * (sequence + 1) + position


def begin(cache, tokens):
    pairs = [
        (sequence, position)
        for sequence, count in tokens.items()
        for position in range(cache.next_position(sequence), cache.next_position(sequence) + count)
    ]
    cache.start_forward(Batch([p for _, p in pairs], [s for s, _ in pairs]))


def put(backend, cache, layer):
    """See that a layer is given the states of its runs, and put new ones, also at all cuts."""
    cache.set_layer(layer)
    before = [run.position and code(run.sequence, run.position) for run in cache.runs]
    check_states(backend, cache.get_states(), layer, before)
    kept = {
        (run.sequence, position): states(backend, layer, [code(run.sequence, position)])
        for run in cache.runs
        for position in run.cuts
    }
    ends = [code(run.sequence, run.end) for run in cache.runs]
    cache.put_states(*states(backend, layer, ends), kept=kept)


def run(cache, tokens):
    """Make a pass. tokens: their number by sequence."""
    begin(cache, tokens)
    for layer in range(LAYERS):
        put(cache.backend, cache, layer)


def resumable(cache, sequence):
    return [position for position in range(30) if cache.can_resume(sequence, position)]


# What the model is given.


def test_runs_are_in_the_order_of_the_batch(backend):
    cache = make(backend)
    cache.schedule(1, [2, 4])
    begin(cache, {1: 4, 0: 1})
    first, second = cache.runs
    assert first == (1, 0, 4, 0, (2,))  # 4 is the end: no cut, and kept all the same
    assert second == (0, 4, 5, 0, ())
    assert (first.end, second.end) == (4, 1)
    run(cache, {1: 4, 0: 1})
    run(cache, {0: 1, 2: 1, 1: 3})
    assert resumable(cache, 1) == [0, 2, 4, 7]
    assert resumable(cache, 0) == [0, 2]


def test_arrays_stay_the_callers(backend):
    """A model may use its arrays again, and change those that it was given."""
    cache = make(backend)
    host = host_state(backend, 1, 5)[0]
    array = backend.from_host(host)
    begin(cache, {0: 1})
    cache.set_layer(1)
    cache.put_states(array)
    if backend.name in ("numpy", "torch"):
        array[:] = 0
    begin(cache, {0: 1})
    [got] = cache.get_states()
    if backend.name in ("numpy", "torch"):
        got[:] = 0
    [again] = cache.get_states()
    np.testing.assert_array_equal(backend.to_host(again).view(np.uint8), host.view(np.uint8))


def test_memory_is_that_of_all_slots(backend):
    cache = make(backend, resume_points=3, max_sequences=4, max_batch=2)
    assert cache.nbytes == 0
    run(cache, {0: 1})
    # A state for each sequence, each run and each resume point, and the zeros of fresh ones.
    assert cache.nbytes == (4 + 2 + 3 + 1) * state_bytes(backend)


def test_a_reserve_pass_allocates_and_stores_nothing(backend):
    cache = make(backend)
    cache.start_forward(Batch([7, 8, 3], [0, 0, 1]), reserve=True)
    for layer in range(LAYERS):
        cache.set_layer(layer)
        assert cache.get_states() is None
        cache.put_states(*states(backend, layer, [1, 2]))
    assert cache.nbytes
    assert resumable(cache, 0) == [0]
    run(cache, {0: 3})
    cache.start_forward(Batch([7, 8, 3], [0, 0, 1]), reserve=True)
    assert all((backend.to_host(array) == 0).all() for array in cache.get_states())
    assert resumable(cache, 0) == [0, 3]


def test_no_sequence_reads_what_another_left(backend):
    """Slots are used again; a sequence that begins is given zeros, or nothing."""
    cache = make(backend, resume_points=0, max_sequences=2, max_batch=2)
    for _ in range(4):
        run(cache, {0: 3})
        run(cache, {0: 1, 1: 2})
        cache.remove(0, 0)
        run(cache, {1: 1, 0: 1})
        cache.remove(1, 0)
        cache.remove(0, 0)


def test_a_copy_shares_states_until_one_goes_on(backend):
    cache = make(backend)
    cache.schedule(0, [2])
    run(cache, {0: 5})
    free = peek.free_slots(cache)
    cache.copy_prefix(0, 1, 5)
    cache.copy_prefix(0, 2, 2)
    assert peek.free_slots(cache) == free
    assert (resumable(cache, 1), resumable(cache, 2)) == ([0, 2, 5], [0, 2])
    with cache.snapshot(1) as snapshot, cache.snapshot(2) as other:
        check_rows(backend, snapshot, {2: code(0, 2), 5: code(0, 5)})
        check_rows(backend, other, {2: code(0, 2)})


def test_a_copy_that_goes_on_keeps_the_state_it_began_with(backend):
    """It was kept in the source, which has forgotten that it was scheduled."""
    cache = make(backend)
    cache.schedule(0, [2])
    run(cache, {0: 5})
    cache.schedule(0, [9])
    cache.copy_prefix(0, 1, 2)
    begin(cache, {1: 1})
    for layer in range(LAYERS):
        cache.set_layer(layer)
        cache.put_states(*states(backend, layer, [code(1, 3)]))
    assert resumable(cache, 1) == [0, 2, 3]


@pytest.mark.parametrize("inside", [False, True])
def test_a_resume_point_outlives_one_that_is_scheduled_later(inside):
    """The last pass began at it, or went past it, and is not over before the next one begins."""
    cache = make()
    cache.schedule(0, [2])
    for tokens in [3] if inside else [2, 1]:
        run(cache, {0: tokens})
    cache.schedule(0, [5])
    assert resumable(cache, 0) == [0, 2, 3]
    for _ in range(3):
        run(cache, {0: 1})
    assert resumable(cache, 0) == [0, 2, 5, 6]


# What is refused.


@pytest.mark.parametrize(
    ("positions", "sequences", "message"),
    [
        ([0, 0, 1], [0, 1, 0], r"adjacent, and positions go up by one; got positions \[0, 0, 1\]"),
        ([0, 2], [0, 0], "adjacent, and positions go up by one"),
        ([1, 0], [0, 0], "adjacent, and positions go up by one"),
        ([2**31 - 1, -(2**31)], [0, 0], "adjacent, and positions go up by one"),
        ([1], [0], "the next token of sequence 0 is 0; got 1"),
        ([-1], [0], "the next token of sequence 0 is 0; got -1"),
        ([0], [3], r"sequence ids must lie in \[0, 3\)"),
    ],
)
def test_batches_that_are_no_runs(positions, sequences, message):
    cache = make()
    with pytest.raises(ValueError, match=message):
        cache.start_forward(Batch(positions, sequences))
    run(cache, {0: 2})


def test_states_of_another_form(backend):
    cache = make(backend)
    run(cache, {0: 1, 1: 2})
    cache.schedule(0, [2])
    begin(cache, {0: 2, 1: 1})
    cache.set_layer(0)
    matrix, last = states(backend, 0, [1, 2])
    for arrays, error, message in [
        ((), ShapeError, "a state is one array or more; got none"),
        ((matrix,), ShapeError, r"layer 0 has float32\[3, 4\], .*\[5\]; got float32\[3, 4\]\."),
        ((matrix, last, last), ShapeError, "keep the number, shapes and dtypes of the first"),
        ((matrix[:1, ...], last), ShapeError, r"one row for each, 2, on the first axis.*\(1, 3, 4"),
        ((matrix[:, :2, ...], last), ShapeError, r"got float32\[2, 4\]"),
        ((matrix[:, :0, ...], last), ShapeError, "no empty axis"),
        ((matrix, backend.from_host(np.ones((2, 5)), "uint8")), DTypeError, r"got .*uint8\[5"),
        (([[1.0]], last), UnknownBackendError, "list"),
    ]:
        with pytest.raises(error, match=message):
            cache.put_states(*arrays)
    one = states(backend, 0, [3])
    with pytest.raises(ShapeError, match="one row for each, 1"):
        cache.put_states(matrix, last, kept={(0, 2): (matrix, last)})
    with pytest.raises(ShapeError, match="has float32"):
        cache.put_states(matrix, last, kept={(0, 2): one[:1]})
    for cut in [(0, 1), (0, 3), (1, 2)]:
        with pytest.raises(StateError, match=r"cuts of the pass, \[\(0, 2\)\] .*; got \(\d, \d\)"):
            cache.put_states(matrix, last, kept={cut: one})
    put(backend, cache, 0)
    put(backend, cache, 1)
    assert resumable(cache, 0) == [0, 2, 3]


def test_kept_of_another_kind(backend):
    cache = make(backend)
    cache.schedule(0, [1])
    begin(cache, {0: 2})
    cache.set_layer(1)
    [one] = states(backend, 1, [1])
    stacked = backend.from_host(np.ones((1, 1, 2)), "int32")  # would pass for a tuple
    rule = r"\{\(sequence, position\): \(array, \.\.\.\)\}; got "
    for kept, message in [
        ([1], rule + r"a list\."),
        ([], rule + r"a list\."),
        (one, rule + f"a {type(one).__name__}"),
        ({1: (one,)}, rule + r"the key 1\."),
        ({(0, 1, 2): (one,)}, rule + r"the key \(0, 1, 2\)\."),
        ({(0, 1): one}, rule + rf"a {type(one).__name__} behind \(0, 1\)\."),
        ({(0, 1): stacked}, rule + rf"a {type(one).__name__} behind \(0, 1\)\."),
        ({(0, 1): None}, rule + r"a NoneType behind \(0, 1\)\."),
        ({(0, 1.5): (one,)}, "position must be an integer"),
    ]:
        with pytest.raises(TypeError, match=message):
            cache.put_states(one, kept=kept)
    with pytest.raises(UnknownBackendError, match=r"values and states must be .* builtins\.t"):
        cache.put_states(one, kept={(0, 1): ((one,),)})
    assert (cache.nbytes, resumable(cache, 0)) == (0, [0])
    cache.put_states(one, kept={(0, 1): [one]})
    assert resumable(cache, 0) == [0, 1, 2]


@pytest.mark.one_backend(name="torch")
def test_arrays_of_another_framework():
    torch = pytest.importorskip("torch")
    cache = make(NUMPY)
    begin(cache, {0: 1})
    with pytest.raises(DTypeError, match=r"array 0 of a state must be an array of numpy:cpu"):
        cache.put_states(torch.ones(1, 2))
    cache = make("torch")
    begin(cache, {0: 1})
    with pytest.raises(NotSupportedError, match="gradients do not flow through a pool"):
        cache.put_states(torch.ones(1, 2, requires_grad=True))
    assert cache.nbytes == 0


def test_calls_outside_of_a_pass():
    with pytest.raises(KVCacheError, match="Call init first"):
        RecurrentCache().next_position(0)
    cache = make()
    for call in (cache.get_states, cache.put_states, lambda: cache.runs):
        with pytest.raises(KVCacheError, match=r"belong to a pass\. Call start_forward"):
            call()
    with pytest.raises(NotSupportedError, match="holds states, no keys and values"):
        cache.get()
    with pytest.raises(NotSupportedError, match="holds states, no keys and values"):
        cache.put(np.ones((1, 1, 1)))
    for other in (CausalCache(), EncoderCache()):
        with pytest.raises(NotSupportedError, match="states are held by a RecurrentCache"):
            other.get_states()
        with pytest.raises(NotSupportedError, match="states are held by a RecurrentCache"):
            other.put_states(np.ones(1))
        with pytest.raises(NotSupportedError, match="states are held by a RecurrentCache"):
            other.runs  # noqa: B018
    with pytest.raises(ValueError, match="resume_points must be 0 to"):
        RecurrentCache(-1)


def test_a_layer_that_was_left_out():
    cache = make()
    begin(cache, {0: 1})
    put(NUMPY, cache, 0)  # the first pass, so nobody knows of another layer
    begin(cache, {0: 1})
    cache.set_layer(1)
    with pytest.raises(KVCacheError, match="layer 1 was never put, and sequences of the pass have"):
        cache.get_states()


def test_the_states_of_a_complete_pass_are_history():
    """A layer is put again, after an interrupt say, until somebody else has its states."""
    cache = make()
    run(cache, {0: 2})
    put(NUMPY, cache, 1)
    with cache.snapshot(0) as snapshot:
        with pytest.raises(KVCacheError, match="once a snapshot or another sequence has them"):
            put_again(cache, 1)
        check_rows(NUMPY, snapshot, {2: code(0, 2)})
    put(NUMPY, cache, 1)
    cache.copy_prefix(0, 1, 2)
    with pytest.raises(KVCacheError, match=r"layer 0 was put\. Call start_forward"):
        put_again(cache, 0)
    begin(cache, {0: 1})
    put(NUMPY, cache, 0)
    cache.remove(0, 0)
    put(NUMPY, cache, 1)
    with pytest.raises(KVCacheError, match="are history once"):
        put_again(cache, 1)


def put_again(cache, layer):
    cache.set_layer(layer)
    cache.put_states(*states(NUMPY, layer, [1]))


def test_a_state_is_not_cut_back():
    cache = make()
    cache.schedule(0, [2, 6])
    run(cache, {0: 5})
    for call in (lambda: cache.remove(0, 3), lambda: cache.copy_prefix(0, 1, 3)):
        with pytest.raises(TrimError, match=r"positions with a state, \[0, 2, 5\]; got 3\. sched"):
            call()
    for start, stop in [(0, 2), (2, 4), (0, 4)]:
        with pytest.raises(NotSupportedError, match=rf"got \[{start}, {stop}\) of 5 tokens"):
            cache.remove(0, start, stop)
    cache.remove(0, 3, 3)
    cache.remove(0, 7)
    with pytest.raises(ValueError, match="a prefix has a length >= 0; got -1"):
        cache.copy_prefix(0, 1, -1)
    with pytest.raises(ValueError, match="needs a source that holds tokens; 1 is empty"):
        cache.copy_prefix(1, 0, 2)
    assert resumable(cache, 0) == [0, 2, 5]
    cache.remove(0, 2, 5)
    run(cache, {0: 5})  # position 6 was behind the end, and is forgotten
    assert resumable(cache, 0) == [0, 2, 7]


# Drafts.


def test_a_draft_can_be_taken_back_to_any_token(backend):
    for accepted in range(5):
        cache = make(backend)
        run(cache, {0: 2, 1: 3})
        cache.checkpoint(0)
        begin(cache, {1: 3, 0: 4})
        assert [run.cuts for run in cache.runs] == [(), (3, 4, 5)]
        run(cache, {1: 3, 0: 4})
        assert (resumable(cache, 0), resumable(cache, 1)) == ([0, 2, 3, 4, 5, 6], [0, 6])
        cache.remove(0, 2 + accepted)
        run(cache, {0: 3})  # looks at the state there
        assert resumable(cache, 0) == [0, 5 + accepted]


def test_resume_points_outlive_any_number_of_drafts(backend):
    cache, end = make(backend, resume_points=7, max_sequences=2, max_batch=2), 5
    cache.schedule(0, [2, 4])
    run(cache, {0: end})
    for accepted in [0, 1, 2, 3, 4, 5, 5, 2]:
        cache.checkpoint(0)
        if accepted == 3:
            cache.schedule(0, [end + 2])  # a position of a draft that is a resume point, too
        run(cache, {0: 5, 1: 1})
        end += accepted
        cache.remove(0, end)
        run(cache, {1: 1})
    assert resumable(cache, 0) == [0, 2, 4, 10, end]
    with cache.snapshot(0) as snapshot:
        check_rows(backend, snapshot, {p: code(0, p) for p in (2, 4, 10, end)})


@pytest.mark.parametrize("close", ["remove", "go on", "another", "copy"])
def test_states_of_a_draft_go_with_it(close):
    cache = make()
    cache.schedule(0, [4])
    run(cache, {0: 3})
    cache.checkpoint(0)
    run(cache, {0: 3})
    run(cache, {1: 1})
    cache.schedule(0, [6, 9])  # points before its end are not forgotten
    if close == "remove":
        cache.remove(0, 6)  # all of it is accepted
    elif close == "go on":
        begin(cache, {0: 1})
        cache.abort()
        assert resumable(cache, 0) == [0, 3, 4, 5, 6]
        run(cache, {0: 1})
    elif close == "another":
        cache.checkpoint(0)
    else:
        cache = cache.copy()
    assert resumable(cache, 0) == [0, 4, 6, *([7] if close == "go on" else [])]
    with cache.snapshot(0) as snapshot:
        check_rows(NUMPY, snapshot, {p: code(0, p) for p in resumable(cache, 0)[1:]})


def test_no_snapshot_has_states_of_a_draft_nor_has_a_copy():
    cache = make()
    run(cache, {0: 3})
    cache.checkpoint(0)
    run(cache, {0: 4})
    cache.copy_prefix(0, 1, 5)
    cache.copy_prefix(0, 2, 9)
    assert (resumable(cache, 1), resumable(cache, 2)) == ([0, 5], [0, 7])
    for stop, held in [(7, [7]), (5, [5]), (9, [7])]:
        with cache.snapshot(0, 0, stop) as snapshot:
            check_rows(NUMPY, snapshot, {p: code(0, p) for p in held})
    begin(cache, {1: 1})
    for layer in range(LAYERS):
        cache.set_layer(layer)
        cache.put_states(*states(NUMPY, layer, [code(1, 6)]))
    assert resumable(cache, 1) == [0, 6]


def test_a_draft_of_a_fresh_sequence():
    cache = make()
    cache.checkpoint(1)
    run(cache, {1: 3, 0: 2})
    assert (resumable(cache, 0), resumable(cache, 1)) == ([0, 2], [0, 1, 2, 3])


def test_a_draft_that_is_aborted_is_made_again():
    cache = make()
    run(cache, {0: 2})
    cache.checkpoint(0)
    begin(cache, {0: 3})
    put(NUMPY, cache, 0)
    cache.abort()
    run(cache, {0: 3})
    assert resumable(cache, 0) == [0, 2, 3, 4, 5]


def test_drafts_give_way_before_resume_points():
    cache = make(resume_points=4, max_sequences=2, max_batch=2)
    cache.schedule(1, [1, 2])
    run(cache, {1: 3})
    run(cache, {0: 1})
    cache.checkpoint(0)
    run(cache, {0: 4})
    run(cache, {0: 1, 1: 1})
    cache.schedule(1, [5, 6])
    cache.checkpoint(0)
    run(cache, {0: 3})
    run(cache, {1: 3})
    assert resumable(cache, 1) == [0, 1, 2, 5, 6, 7]


def test_caches_of_keys_need_nothing_for_a_draft():
    wrapper = WrapperCache(CausalCache(), make(), EncoderCache())
    wrapper.init("numpy", max_sequences=2, capacity=8, max_batch=8)
    for cache in (wrapper, *wrapper.caches):
        cache.checkpoint(1)
        with pytest.raises(ValueError, match="sequence ids must lie in"):
            cache.checkpoint(2)
        with pytest.raises(TypeError):
            cache.checkpoint("0")


# Unfinished passes.


@pytest.mark.parametrize("aborted", [True, False])
def test_a_pass_is_history_when_every_layer_is_put(backend, aborted):
    cache = make(backend)
    run(cache, {0: 3})
    cache.schedule(0, [4])
    begin(cache, {0: 3, 1: 1})
    put(backend, cache, 0)
    assert (cache.next_position(0), cache.next_position(1)) == (3, 0)
    with cache.snapshot(0) as snapshot:
        check_rows(backend, snapshot, {3: code(0, 3)})
    if aborted:
        cache.abort()
    run(cache, {0: 3})
    assert resumable(cache, 0) == [0, 4, 6]


def test_a_pass_without_any_put_is_none():
    cache = make()
    begin(cache, {0: 3})
    assert cache.next_position(0) == 0
    run(cache, {0: 2})


def test_a_cut_counts_if_every_layer_gave_its_state():
    cache = make()
    cache.schedule(0, [1, 2])
    begin(cache, {0: 3})
    for layer, cuts in enumerate([(1, 2), (2,)]):
        cache.set_layer(layer)
        kept = {(0, position): states(NUMPY, layer, [code(0, position)]) for position in cuts}
        cache.put_states(*states(NUMPY, layer, [code(0, 3)]), kept=kept)
    assert resumable(cache, 0) == [0, 2, 3]


def test_a_sequence_that_changes_leaves_the_pass(backend):
    cache = make(backend)
    run(cache, {0: 3, 1: 1})
    begin(cache, {0: 2, 1: 2})
    put(backend, cache, 0)
    cache.copy_prefix(0, 1, 3)
    put(backend, cache, 1)
    assert (resumable(cache, 0), resumable(cache, 1)) == ([0, 5], [0, 3])
    with cache.snapshot(1) as snapshot:
        check_rows(backend, snapshot, {3: code(0, 3)})


# Room.


def test_snapshots_go_to_the_host_before_kept_states_are_dropped(backend):
    cache = make(backend, resume_points=2, max_sequences=2, max_batch=2)
    cache.schedule(0, [1, 2])
    run(cache, {0: 3})
    held = {p: code(0, p) for p in (1, 2, 3)}
    snapshot = cache.snapshot(0)
    cache.remove(0, 0)
    cache.schedule(1, [1, 2, 3])
    run(cache, {1: 2})
    assert snapshot.resident
    run(cache, {1: 2})
    assert not snapshot.resident
    check_rows(backend, snapshot, held)
    assert resumable(cache, 1) == [0, 1, 2, 3, 4]
    cache.schedule(0, [2, 3, 4])
    run(cache, {0: 5})  # the kept states of the sequence that is idle longer
    assert resumable(cache, 0) == [0, 2, 3, 4, 5]
    assert resumable(cache, 1) == [0, 3, 4]


def test_more_runs_than_there_is_room_for():
    cache = make(resume_points=0, max_sequences=4, max_batch=1)
    run(cache, {0: 1, 1: 1, 2: 1})
    with pytest.raises(CacheFullError, match=r"3 needed, 2 of 5 free\. Remove sequences, or init"):
        begin(cache, {0: 1, 1: 1, 2: 1})
    assert [cache.next_position(sequence) for sequence in range(4)] == [1, 1, 1, 0]
    for sequence in (0, 1, 2, 3):
        run(cache, {sequence: 1})


def test_every_pass_has_room_whatever_is_kept():
    cache = make(resume_points=1, max_sequences=2, max_batch=2)
    snapshots = []
    for step in range(6):
        for sequence in (0, 1):
            end = cache.next_position(sequence)
            cache.schedule(sequence, [end + 1, end + 2])
        run(cache, {0: 2, 1: 2})
        snapshots.append(cache.snapshot(step % 2))
    assert [cache.next_position(sequence) for sequence in (0, 1)] == [12, 12]


# Snapshots.


@pytest.mark.cross_backend
def test_a_snapshot_goes_to_every_backend(backend, tmp_path):
    cache = make("torch")
    if "bfloat16" not in backend.dtypes:
        pytest.skip("the states of torch have a dtype that this backend lacks")
    cache.schedule(0, [2])
    run(cache, {0: 5})
    path = tmp_path / "snapshot"
    cache.snapshot(0).save(path, tokens=range(5))
    snapshot = Snapshot.load(path, tokens=range(5))
    target = make(backend)
    target.restore(1, snapshot, stop=2)
    target.restore(0, snapshot)
    with target.snapshot(1) as one, target.snapshot(0) as two:
        check_rows(backend, one, {2: code(0, 2)})
        check_rows(backend, two, {5: code(0, 5)})
    run(target, {0: 1})


def test_a_resident_snapshot_shares_its_slots(backend):
    cache = make(backend)
    run(cache, {0: 3})
    snapshot, free = cache.snapshot(0), peek.free_slots(cache)
    cache.restore(1, snapshot)
    assert peek.free_slots(cache) == free
    cache.close()
    check_rows(backend, snapshot, {3: code(0, 3)})


def test_rows_are_those_of_a_cache_per_layer(backend):
    cache = make(backend)
    run(cache, {0: 3})
    layers = LayerCaches([StateCache(backend), StateCache(backend)])
    for layer, own in enumerate(layers):
        own.advance(3, *states(backend, layer, [code(0, 3)]))
    pooled, single = cache.snapshot(0), layers.snapshot()
    for layer, part in enumerate(single.parts):
        arrays = pooled.parts[0].rows.content()[layer]
        for one, two in zip(arrays, part.rows.content()[0], strict=True):
            assert (one.name, one.token_axis) == (two.name, two.token_axis)
            np.testing.assert_array_equal(one.data.view(np.uint8), two.data.view(np.uint8))


def of_arrays(layer, *arrays):
    """A snapshot of one state, of a layer."""
    named = tuple(NamedArray(f"state{n}", data, 0) for n, data in enumerate(arrays))
    spec = make().specs[0]
    return Snapshot(0, 1, [Part(spec, TokenRows(np.array([0], np.int32), {layer: named}))])


def test_rows_of_another_form_are_not_restored():
    cache = make()
    run(cache, {0: 1})
    matrix, last = host_state(NUMPY, 0, 1)
    for arrays, message in [
        ((matrix[None],), r"layer 0 has float32\[3, 4\], .* of one sequence, got float32\[3, 4\]"),
        ((np.stack([matrix, matrix], 1), np.stack([last, last], 1)), "of 2"),
        ((matrix[None, :, :2], last[None]), r"got float32\[2, 4\]"),
    ]:
        with pytest.raises(SnapshotMismatchError, match=message):
            cache.restore(1, of_arrays(0, *arrays))
    unnamed = NamedArray("keys", matrix[None], 0)
    snapshot = of_arrays(0, matrix[None], last[None])
    snapshot.parts[0].rows.to_host()[0] = (unnamed,)
    with pytest.raises(SnapshotMismatchError, match="rows of a recurrent layer are arrays state0"):
        cache.restore(1, snapshot)
    assert cache.next_position(1) == 0


def of_layers(backend, layers):
    """A snapshot on the host of three tokens, from a pool of so many layers."""
    source = make(backend)
    begin(source, {0: 3})
    for layer in range(layers):
        put(backend, source, layer)
    return source.snapshot(0).to_host()


def test_a_snapshot_without_a_layer_of_the_pool_is_not_restored(backend):
    """The slots still hold what removed sequences left in that layer."""
    cache = make(backend)
    run(cache, {0: 3, 1: 2, 2: 1})
    for sequence in range(3):
        cache.remove(sequence, 0)
    snapshot = of_layers(backend, 1)
    with pytest.raises(SnapshotMismatchError, match=r"states of layers \[0, 1\], got \[0\]\. Rest"):
        cache.restore(1, snapshot)
    assert resumable(cache, 1) == [0]
    run(cache, {0: 1, 1: 2})
    cache.restore(2, of_layers(backend, 2))
    begin(cache, {2: 1})
    for layer in range(LAYERS):
        cache.set_layer(layer)
        check_states(backend, cache.get_states(), layer, [code(0, 3)])


def test_a_snapshot_with_a_layer_that_sequences_lack_is_not_restored(backend):
    """No pass would ever put it, and so none would be complete."""
    cache, snapshot = make(backend), of_layers(backend, 2)
    for _ in range(2):
        begin(cache, {0: 1})
        put(backend, cache, 0)
    with pytest.raises(SnapshotMismatchError, match=r"states of layers \[0\], got \[0, 1\]\. Rest"):
        cache.restore(1, snapshot)
    assert resumable(cache, 1) == [0]
    begin(cache, {0: 1, 1: 1})
    put(backend, cache, 0)
    assert [cache.next_position(sequence) for sequence in (0, 1)] == [3, 1]


@pytest.mark.parametrize("layers", [0, 1])
def test_a_pool_before_or_within_its_first_pass_takes_layers_of_a_snapshot(backend, layers):
    cache, snapshot = make(backend), of_layers(backend, 2)
    begin(cache, {1: 2})
    for layer in range(layers):
        put(backend, cache, layer)
    cache.restore(0, snapshot)
    for layer in range(layers, LAYERS):
        put(backend, cache, layer)
    run(cache, {1: 1, 0: 2})
    run(cache, {0: 1, 1: 1})


@pytest.mark.one_backend(name="mlx")
def test_a_dtype_that_the_backend_lacks_is_not_restored():
    pytest.importorskip("mlx")
    source = make("numpy")
    begin(source, {0: 1})
    source.put_states(NUMPY.from_host(np.ones((1, 2)), "float8_e5m2"))
    target = make("mlx")
    with pytest.raises(DTypeError, match="mlx has no dtype 'float8_e5m2'"):
        target.restore(0, source.snapshot(0))
    with pytest.raises(DTypeError, match="mlx has no dtype 'float8_e5m2'"):
        source.to_backend("mlx")
    assert target.nbytes == 0


def test_another_thread_restores_while_a_pass_runs(backend):
    cache = make(backend)
    run(cache, {0: 3})
    snapshot = cache.snapshot(0).to_host()
    begin(cache, {0: 1})
    put(backend, cache, 0)
    thread = threading.Thread(target=cache.restore, args=(1, snapshot))
    thread.start()
    thread.join()
    put(backend, cache, 1)
    with cache.snapshot(1) as other:
        check_rows(backend, other, {3: code(0, 3)})
    assert resumable(cache, 0) == [0, 4]


# In a wrapper.


class Hybrid:
    """A model of two recurrent layers, a windowed and a full one, and cross-attention.

    A state and a key are the hash of all tokens so far, or of one.
    """

    def __init__(self, backend, cache=None):
        self.backend = backend
        self.cache = cache or WrapperCache(
            RecurrentCache(), CausalCache(window=3), CausalCache(), EncoderCache()
        )
        if cache is None:
            self.cache.init(backend, max_sequences=3, capacity=32, max_batch=16)
        self.computed = 0

    def run(self, sequence, tokens, start):
        """Compute `tokens` from position `start` on; return what the last one makes of all."""
        positions = range(start, start + len(tokens))
        image = [0] if start == 0 else []
        self.cache.start_forward(Batch(positions, [sequence] * len(tokens), image))
        self.computed += len(tokens)
        outputs = [self.recurrent(layer, tokens) for layer in range(2)]
        for kind in (1, 2):
            self.cache.set_layer_type(kind)
            self.cache.set_layer(0)
            keys = self.backend.from_host(np.array(tokens, np.float32)[None, :, None])
            self.cache.put(keys, keys)
            K, _, mask = map(self.backend.to_host, self.cache.get())
            outputs.append(sorted(K[0, mask[-1], 0].tolist()))
        self.cache.set_layer_type(3)
        frames = self.backend.from_host(np.full((1, 2, 1), tokens[0], np.float32))
        if image:
            self.cache.put(frames, frames)
        outputs.append(self.backend.to_host(self.cache.get()[0]).tolist())
        return outputs

    def recurrent(self, layer, tokens):
        self.cache.set_layer_type(0)
        self.cache.set_layer(layer)
        states, [run] = self.cache.get_states(), self.cache.runs
        state = 0 if states is None else int(self.backend.to_host(states[0])[0, 0])
        kept = {}
        for position, token in enumerate(tokens, run.position + 1):
            state = (state * 31 + token * (layer + 1)) % 1_000_003
            if position in run.cuts:
                kept[run.sequence, position] = [self.array(state)]
        self.cache.put_states(self.array(state), kept=kept)
        return state

    def array(self, state):
        return self.backend.from_host(np.array([[state, 0]], np.int32))


def test_a_hybrid_changes_in_all_parts_or_in_none(backend):
    model = Hybrid(backend)
    model.cache.schedule(0, [4])
    model.run(0, [3, 1, 4, 1, 5, 9], 0)
    with pytest.raises(TrimError, match=r"positions with a state, \[0, 4, 6\]; got 5"):
        model.cache.remove(0, 5)
    with pytest.raises(TrimError, match="got 3"):
        model.cache.copy_prefix(0, 1, 3)
    assert [cache.next_position(0) for cache in model.cache.caches] == [6, 6, 6, 1]
    assert not model.cache.can_resume(0, 5)
    after = model.run(0, [2], 6)
    fresh = Hybrid(backend)
    fresh.run(0, [3, 1, 4, 1, 5, 9], 0)
    assert after == fresh.run(0, [2], 6)
    twin = Hybrid(backend, model.cache.to_backend("numpy").to_backend(backend))
    assert twin.run(0, [6, 5], 7) == model.run(0, [6, 5], 7)


def test_a_pass_is_finished_in_all_parts_at_once(backend):
    model = Hybrid(backend)
    model.run(0, [3, 1, 4], 0)
    model.cache.start_forward(Batch([3], [0]))
    for layer in range(2):
        model.recurrent(layer, [1])
    assert model.cache.caches[0].pass_complete()
    assert [cache.next_position(0) for cache in model.cache.caches] == [3, 3, 3, 1]
    model.cache.abort()
    whole = model.run(0, [1], 3)
    fresh = Hybrid(backend)
    fresh.run(0, [3, 1, 4], 0)
    assert whole == fresh.run(0, [1], 3)


def test_a_hybrid_is_restored(backend):
    model = Hybrid(backend)
    model.cache.schedule(0, [4])
    model.run(0, [3, 1, 4, 1, 5, 9], 0)
    snapshot = model.cache.snapshot(0)
    with pytest.raises(KVCacheError, match="last place to go on"):
        model.cache.restore(1, snapshot, stop=5)
    model.cache.restore(1, snapshot, stop=4)
    fresh = Hybrid(backend)
    fresh.run(0, [3, 1, 4, 1], 0)
    assert model.run(1, [7], 4) == fresh.run(0, [7], 4)


def test_sessions_over_a_hybrid_pool(backend):
    """A hit ends where a state was kept, and is what a cold run computes."""
    model = Hybrid(backend)
    prefix = PrefixCache(model.cache)
    first = [1, 2, 3, 4, 5, 6, 7, 8]

    def ask(ids, **options):
        with prefix.session(ids, **options) as session:
            warm = model.run(session.sequence, session.remaining, session.matched)
            matched = session.matched
        cold = Hybrid(backend)
        if matched:
            cold.run(0, ids[:matched], 0)
        assert warm == cold.run(0, ids[matched:], matched)
        return matched

    assert ask(first, resume_points=[3]) == 0
    assert ask(first) == 7
    assert ask([*first, 9, 10]) == 8
    assert ask([1, 2, 3, 40, 41]) == 3
    assert ask([1, 2, 50]) == 0


def test_config_reaches_the_others():
    wrapper = WrapperCache(RecurrentCache(), CausalCache())
    wrapper.set_config(CacheConfig(padding=4))
    wrapper.init("numpy", capacity=10, max_batch=3)
    assert wrapper.caches[1].cells == 12
