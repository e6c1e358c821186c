"""Snapshots of per-layer caches: a cache that is put back goes on as if it had never stopped."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import kvcache
from kvcache import (
    KVCache,
    KVCacheError,
    LayerCaches,
    RotatingKVCache,
    Snapshot,
    get_backend,
)
from kvcache.snapshots.resuming import last_resumable
from kvcache.testing.coded import same

from .. import peek
from .oracle import SHAPE, Oracle, Shape, fingerprint, host_rows, oracle_for, push

NUMPY = get_backend("numpy")
DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
KINDS = {
    "kv": lambda **rest: KVCache(step=8, **rest),
    "rotating": lambda **rest: RotatingKVCache(5, step=4, **rest),
    "sinks": lambda **rest: RotatingKVCache(7, 2, step=4, **rest),
    "one": lambda **rest: RotatingKVCache(1, **rest),
}
LAYERS = ("kv", "rotating", "sinks", "one")


def installed():
    found = []
    for spec in ("numpy", "torch", "jax", "mlx", "array_api:array_api_strict"):
        try:
            found.append(get_backend(spec))
        except ImportError:
            continue
    return found


@pytest.fixture(params=installed(), ids=lambda backend: backend.name)
def target(request):
    """Each backend that is installed, in turn: the other end."""
    return request.param


def make(kind, backend=NUMPY, **options):
    return KINDS[kind](backend=backend, **options)


def feed(cache, tokens, shape=SHAPE):
    """The next tokens, whose bits tell their positions."""
    backend = cache.backend
    keys, values = shape.keys(tokens, cache.offset), shape.values(tokens, cache.offset)
    return cache.update(backend.from_host(keys), backend.from_host(values))


def all_of(cache, tokens):
    """What an update returns, columns of padding aside, with positions and mask."""
    columns = host_rows(cache.backend, feed(cache, tokens))
    real = np.flatnonzero(cache.positions >= 0)
    mask, backend = cache.mask(tokens), cache.backend
    assert backend is not None
    seen = np.ones((tokens, real.size), bool) if mask is None else backend.to_host(mask)[:, real]
    return [cache.positions[real].tolist(), [columns[i] for i in real], seen.tolist()]


def going_on(kind, backend, offset, dtype="float32"):
    """A cache that never stopped."""
    cache = make(kind, backend)
    for _ in range(offset):
        feed(cache, 1, Shape(dtype=dtype))
    return cache


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_is_put_back_returns_the_same_bits(backend, kind):
    for offset in (1, 4, 5, 12):
        cache, again = going_on(kind, backend, offset), make(kind, backend)
        with cache.snapshot() as snapshot:
            again.restore(snapshot)
        for tokens in (3, 1, 1, 9, 1):
            assert all_of(again, tokens) == all_of(cache, tokens)


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [3, 30, 7], [19, 21], [6, 1, 1, 32]], ids=str)
@pytest.mark.parametrize("kind", ["rotating", "sinks", "one"])
def test_what_is_scheduled_is_kept_wherever_updates_end(kind, chunks):
    places, cache = [1, 3, 7, 8, 19, 30, 39, 40], make(kind)
    cache.schedule(places)
    for tokens in chunks:
        feed(cache, tokens)
    rest = cache.snapshot()
    for place in reversed(places):
        assert last_resumable([rest], place) == place
        if place < rest.stop:
            rest, end = rest.split(place)
            end.close()
        again = make(kind)
        again.restore(rest)
        assert all_of(again, 2) == all_of(going_on(kind, NUMPY, place), 2)


def test_what_is_scheduled_outlasts_a_rollback_and_what_is_rejected_does_not():
    cache = make("rotating")
    cache.schedule([8, 14, 20])
    feed(cache, 6)
    cache.checkpoint()
    bad = Shape(dtype="float32")
    keys, values = bad.keys(10, 900), bad.values(10, 900)
    cache.update(keys, values)
    cache.rollback(0)
    for _ in range(20):
        feed(cache, 1)
    taken = cache.snapshot()
    for place in (20, 14, 8):
        assert last_resumable([taken], place) == place
        taken = taken.split(place)[0]
        again = make("rotating")
        again.restore(taken)
        assert all_of(again, 1) == all_of(going_on("rotating", NUMPY, place), 1)


def test_a_snapshot_copies_nothing_until_its_slots_change():
    for kind in LAYERS:
        cache = make(kind)
        feed(cache, 9)
        snapshot = cache.snapshot()
        per_token = 2 * (4 + 3) * 4
        assert (snapshot.host_nbytes, snapshot.nbytes, snapshot.resident) == (
            0,
            cache.len * per_token,
            True,
        )
        feed(cache, 40)
        assert snapshot.resident is (kind == "kv")
        assert snapshot.host_nbytes == (0 if kind == "kv" else snapshot.nbytes)
    assert len(peek.layer_pins(cache)) == 0


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_snapshot_outlives_tokens_that_are_taken_back(stop):
    """It is copied as soon as its last token goes; rows wholly before that stay where they are."""
    cache = make("kv")
    feed(cache, 8)
    with cache.snapshot(0, stop) as snapshot, cache.snapshot(0, stop).to_host() as expected:
        cache.trim(1)
        assert snapshot.resident is (stop < 8)
        cache.update(SHAPE.keys(1, 100), SHAPE.values(1, 100))
        for got, held in zip(arrays_of(snapshot), arrays_of(expected), strict=True):
            same(got.data, held.data)


def arrays_of(snapshot):
    """The arrays of its only layer, on the host."""
    [part] = snapshot.parts
    return part.rows.host_copies()[0]


@pytest.mark.parametrize("layouts", [("bhtd", "bthd"), ("bthd", "bhtd"), ("bthd", "bthd")])
def test_rows_of_another_layout_are_turned(layouts):
    shape = Shape(batch=2, kv_heads=3)
    caches = [KVCache(NUMPY, layout=layout) for layout in layouts]
    keys, values = (turned(array, layouts[0]) for array in (shape.keys(5, 0), shape.values(5, 0)))
    caches[0].update(keys, values)
    caches[1].restore(caches[0].snapshot())
    for array, expected in zip(caches[1].state, (keys, values), strict=True):
        same(turned(array, layouts[1]), turned(expected, layouts[0]))


def turned(array, layout):
    """To the layout "bhtd", or from it."""
    return array if layout == "bhtd" else array.swapaxes(1, 2)


def test_a_cache_without_tokens_has_rows_of_none():
    """What a layer without an update yet brings to a snapshot of several."""
    for rows in (KVCache().capture(0, 0), RotatingKVCache(4).capture(0, 0)):
        assert (rows.positions.dtype, rows.positions.size, rows.nbytes) == (np.int32, 0, 0)


class LayersMachine(RuleBasedStateMachine):
    """Caches of some layers, an oracle for each, and snapshots of all of them."""

    backend = NUMPY

    @initialize(
        kinds=st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3),
        tokens=st.integers(1, 12),
    )
    def make(self, kinds, tokens):
        self.kinds = kinds
        self.fresh()
        self.taken = []
        self.stamp = 0
        self.push(tokens)
        self.take(0)

    def fresh(self):
        self.caches = [make(kind, self.backend) for kind in self.kinds]
        self.oracles = [oracle_for(cache) for cache in self.caches]
        self.due = set()
        self.mark = []

    @property
    def offset(self):
        return self.caches[0].offset

    @rule(tokens=st.integers(1, 17))
    def push(self, tokens):
        for cache, oracle in zip(self.caches, self.oracles, strict=True):
            push(cache, oracle, tokens, stamp=self.stamp)
        self.stamp = (self.stamp + tokens) % 300

    @rule(ahead=st.sets(st.integers(0, 20), max_size=4))
    def schedule(self, ahead):
        places = {self.offset + each for each in ahead} - {0}
        for cache in self.caches:
            cache.schedule(sorted(places))
        if not self.mark:
            self.due |= places

    @rule(tokens=st.integers(0, 4))
    def trim(self, tokens):
        if all(cache.can_trim(tokens) for cache in self.caches):
            LayerCaches(self.caches).trim(tokens)
            self.cut(self.offset)

    def cut(self, offset):
        for oracle in self.oracles:
            oracle.cut(offset)
        self.mark = []

    @rule()
    def checkpoint(self):
        for cache in self.caches:
            cache.checkpoint()
        self.mark = [oracle.copy() for oracle in self.oracles]

    @precondition(lambda self: self.mark)
    @rule(data=st.data())
    def rollback(self, data):
        accepted = data.draw(st.integers(0, self.offset - self.mark[0].offset))
        offset = self.mark[0].offset + accepted
        for cache in self.caches:
            cache.rollback(accepted)
        self.cut(offset)

    @rule()
    def reset(self):
        for cache in self.caches:
            cache.reset()
        self.cut(0)
        self.due = set()

    @rule()
    def export_and_import(self):
        if self.offset:
            for cache in self.caches:
                cache.import_state(cache.export_state(3))
            self.mark = []

    @rule(part=st.integers(0, 9))
    def take(self, part):
        if not self.offset:
            return
        snapshot = LayerCaches(self.caches).snapshot()
        for place in self.due:
            assert place > self.offset or last_resumable([snapshot], place) == place
        self.taken.append((snapshot, [oracle.copy() for oracle in self.oracles]))
        if len(self.taken) > 3:
            self.taken.pop(part % 3)[0].close()

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def restore(self, data):
        snapshot, oracles = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        limit = data.draw(st.integers(1, snapshot.stop))
        place = last_resumable([snapshot], limit)
        assert place or limit < snapshot.stop
        if place and place < snapshot.stop:
            parts = snapshot.split(place)
            snapshot = parts[0]
            parts[1].close()
        if place:
            self.put_back(snapshot, oracles, data.draw(st.booleans()))
        snapshot.close()

    def put_back(self, snapshot, oracles, halve):
        self.refused(snapshot)
        self.fresh()
        halves = snapshot.split(snapshot.stop // 2) if halve and snapshot.stop > 1 else (snapshot,)
        LayerCaches(self.caches).restore(*halves)
        for half in halves:
            half.close()
        self.oracles = [oracle.copy() for oracle in oracles]
        self.cut(snapshot.stop)
        self.push(1)

    def refused(self, snapshot):
        if self.offset:
            before = [fingerprint(cache) for cache in self.caches]
            with pytest.raises(ValueError, match="empty caches"):
                LayerCaches(self.caches).restore(snapshot)
            assert [fingerprint(cache) for cache in self.caches] == before

    @invariant()
    def lends_to_those_that_stay(self):
        for cache in getattr(self, "caches", ()):
            rows = peek.layer_pins(cache)
            assert all(peek.layer_pins_of(row.owner) is rows for row in rows)

    def teardown(self):
        for snapshot, _ in getattr(self, "taken", ()):
            snapshot.close()
        for cache in getattr(self, "caches", ()):
            assert set(peek.layer_pins(cache)) <= {peek.layer_retained(cache)}


SHARE = {"numpy": 100, "torch": 15, "array_api": 12, "mlx": 12, "jax": 2}
"""Examples out of a hundred: what a backend's speed affords."""


@pytest.mark.slow
def test_any_sequence(backend):
    machine = type("Machine", (LayersMachine,), {"backend": backend})
    count = max(1, settings().max_examples * SHARE[backend.name] // 100)
    run_state_machine_as_test(
        machine, settings=settings(max_examples=count, stateful_step_count=25)
    )


# Other backends, and files.


@pytest.mark.parametrize("kind", ["kv", "sinks"])
def test_every_bit_crosses(backend, target, kind, tmp_path):
    for dtype in DTYPES:
        if dtype not in backend.dtypes or dtype not in target.dtypes:
            continue
        cache = going_on(kind, backend, 11, dtype)
        snapshot = cache.snapshot()
        direct, loaded = make(kind, target), make(kind, target)
        direct.restore(snapshot)
        assert snapshot.resident
        snapshot.save(tmp_path / "file")
        loaded.restore(Snapshot.load(tmp_path / "file"))
        for found in (direct, loaded):
            assert (found.offset, found.dtype) == (11, dtype)
            for one, other in zip(found.state, cache.state, strict=True):
                width = cache.len
                same(target.to_host(one)[:, :, :width], backend.to_host(other)[:, :, :width])


def test_a_cache_that_names_no_backend_is_told_one():
    with going_on("kv", NUMPY, 3).snapshot() as snapshot:
        nowhere = KVCache()
        with pytest.raises(ValueError, match="on a backend that they or the call name"):
            nowhere.restore(snapshot)
        nowhere.restore(snapshot, backend="numpy")
        assert nowhere.offset == 3


# What is refused.


@pytest.mark.parametrize(
    ("make_other", "kind"),
    [
        (lambda: RotatingKVCache(6, backend="numpy"), "kinds, windows and dtype"),
        (lambda: RotatingKVCache(5, 1, backend="numpy"), "kinds, windows and dtype"),
        (lambda: KVCache("numpy"), "kinds, windows and dtype"),
        (lambda: RotatingKVCache(5, backend="numpy", dtype="float16"), "dtype"),
    ],
)
def test_other_caches_refuse(make_other, kind):
    other = make_other()
    before = fingerprint(other)
    with pytest.raises(kvcache.SnapshotMismatchError, match=kind):
        other.restore(going_on("rotating", NUMPY, 9).snapshot())
    assert fingerprint(other) == before


def test_a_restore_that_fails_half_way_leaves_all_empty():
    """float8 is nothing that the second cache's backend has."""
    strict = [each for each in installed() if "bfloat16" not in each.dtypes]
    if not strict:
        pytest.skip("every backend here has bfloat16")
    layers = [going_on("rotating", NUMPY, 9, "bfloat16") for _ in range(2)]
    caches = [make("rotating"), make("rotating", strict[0])]
    before = [fingerprint(cache) for cache in caches]
    for cache in caches:
        cache.schedule([12])
    with pytest.raises(kvcache.DTypeError):
        LayerCaches(caches).restore(LayerCaches(layers).snapshot())
    assert [fingerprint(cache) for cache in caches] == before


def test_where_it_cannot_go_on_it_says_where_it_can():
    cache = make("rotating")
    cache.schedule([7])
    feed(cache, 30)
    first, _ = cache.snapshot().split(20)
    with pytest.raises(KVCacheError, match="last place to go on is 7"):
        make("rotating").restore(first)
    gap = going_on("rotating", NUMPY, 9).snapshot(3)
    with pytest.raises(ValueError, match="follow each other from position 0"):
        make("rotating").restore(gap)


@pytest.mark.parametrize("span", [(0, 10), (3, 3), (-1, 4), (5, 3)])
def test_spans_that_are_none(span):
    with pytest.raises(ValueError, match="0 <= start < stop <= offset"):
        going_on("kv", NUMPY, 9).snapshot(*span)


def test_layers_at_different_positions_have_no_snapshot():
    with pytest.raises(ValueError, match="the same in all caches"):
        LayerCaches([going_on("kv", NUMPY, 3), going_on("kv", NUMPY, 4)]).snapshot()


def test_a_split_lies_inside_and_what_merges_meets():
    snapshot = going_on("kv", NUMPY, 9).snapshot()
    for at in (0, 9):
        with pytest.raises(ValueError, match="is split inside"):
            snapshot.split(at)
    one, two = snapshot.split(4)
    with pytest.raises(ValueError, match="merge meet"):
        two.merge(one)
    with (
        going_on("rotating", NUMPY, 4).snapshot() as other,
        pytest.raises(ValueError, match="same kinds"),
    ):
        other.merge(two)
    assert "resident" in repr(one.merge(two))


def filled(count=3, **options):
    cache = make("kv", **options)
    push(cache, Oracle(), count)
    return cache


def test_what_snapshot_refuses():
    one, two = filled(), filled(4)
    rule = r"^a snapshot is of 0 <= start < stop <= offset, the same in all caches; got "
    with pytest.raises(ValueError, match=rule + r"\[0, 4\) of 2 caches at \[3, 4\]\.$"):
        LayerCaches([one, two]).snapshot()
    with pytest.raises(ValueError, match=rule + r"\[0, 4\) of 2 caches at \[3, 4\]\.$"):
        LayerCaches([one, two]).snapshot(0, 4)
    with LayerCaches([one, two]).snapshot(0, 3) as held:  # by all of them
        assert held.stop == 3
    with pytest.raises(ValueError, match=rule + r"\[2, 2\) of 1 caches at \[3\]\.$"):
        one.snapshot(2, 2)
    with pytest.raises(ValueError, match=rule + r"\[0, None\) of 0 caches at \[\]\.$"):
        LayerCaches([]).snapshot()


def test_what_restore_refuses():
    taken = LayerCaches([filled(), filled()]).snapshot()
    rule = r"^what is restored goes to empty caches, on a backend that they or the call name; got "
    one = r"<KVCache offset=3 len=3 on numpy:cpu>"
    with pytest.raises(ValueError, match=rule + rf"{one}, {one}\. Use new ones\.$"):
        LayerCaches([filled(), filled()]).restore(taken)
    with pytest.raises(ValueError, match=rule + r"<KVCache .* on the backend of its first array>"):
        LayerCaches([KVCache()]).restore(taken)
    with pytest.raises(ValueError, match=r"follow each other from position 0; got \[\]\.$"):
        LayerCaches([make("kv")]).restore()
    with pytest.raises(kvcache.SnapshotMismatchError, match="of the same kinds"):
        LayerCaches([make("kv")]).restore(taken)
    assert [spec.dtype for spec in taken.specs] == ["float32", "float32"]
    with pytest.raises(kvcache.SnapshotMismatchError, match="float16"):
        LayerCaches([make("kv", dtype="float16"), make("kv")]).restore(taken)
