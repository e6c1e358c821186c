"""Snapshots of sequences in pools: nothing is lost, nothing leaks, nothing is mixed up."""

from __future__ import annotations

import itertools
import sys
import threading

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
    Batch,
    CacheConfig,
    CacheFullError,
    CausalCache,
    EncoderCache,
    KVCacheError,
    LayerCaches,
    Snapshot,
    SnapshotMismatchError,
    WrapperCache,
)
from kvcache.snapshots.resuming import last_resumable
from kvcache.snapshots.visibility import Visibility
from kvcache.testing.coded import coded, same

from .. import peek
from . import paging
from .oracle import LAYERS, Oracle, add_positions, check_free, fingerprint, rows

NUMPY = kvcache.get_backend("numpy")
SPECS = ("numpy", "torch", "jax", "mlx", "array_api:array_api_strict")
FRAMES = 3
KINDS = {
    "full": lambda shift: [CausalCache(shift=shift)],
    "window": lambda shift: [CausalCache(window=3, shift=shift)],
    "window 1": lambda shift: [CausalCache(window=1, shift=shift)],
    "memory": lambda shift: [CausalCache(window=3, memory=6, shift=shift)],
    "chunk": lambda shift: [CausalCache(chunk=4, shift=shift)],
    "both": lambda shift: [CausalCache(window=5, chunk=4, shift=shift)],
    "layered": lambda shift: [CausalCache(window=4, shift=shift), CausalCache(shift=shift)],
    "encoder": lambda shift: [EncoderCache(), CausalCache(window=4, shift=shift)],
}


def installed():
    found = []
    for spec in SPECS:
        try:
            found.append(kvcache.get_backend(spec))
        except ImportError:
            continue
    return found


@pytest.fixture(params=installed(), ids=lambda backend: backend.name)
def target(request):
    """Each backend that is installed, in turn: the other end."""
    return request.param


# What is put, and what is seen of it, in any layout.


def laid_out(backend, array, layout):
    """A host array of layout htd on the backend, in another."""
    return backend.from_host(
        np.ascontiguousarray(array.transpose(["htd".index(a) for a in layout]))
    )


def on_host(backend, array, layout):
    return backend.to_host(array).transpose([layout.index(axis) for axis in "htd"])


def put(backend, cache, tokens, positions):
    """Put every layer of a pass of a causal cache, layer 1 with keys only."""
    keys, values = rows(tokens, positions)
    config = peek.config(cache)
    for layer in range(LAYERS):
        cache.set_layer(layer)
        there = laid_out(backend, values, config.value_layout)
        cache.put(laid_out(backend, keys, config.key_layout), None if layer else there)


def seen(backend, cache, layer):
    """``(token, position)`` of all that each token of the pass attends to, sorted."""
    cache.set_layer(layer)
    config = peek.config(cache)
    keys, values, mask = cache.get()
    keys, mask = on_host(backend, keys, config.key_layout), backend.to_host(mask)
    lines = [keys[:, line] for line in mask]
    for line, mine in zip(mask, lines, strict=True):
        np.testing.assert_array_equal(mine[1], mine[0] * [-1, 1])
        if layer == 0:
            found = on_host(backend, values, config.value_layout)[0, line]
            np.testing.assert_array_equal(found, mine[0, :, :1] + np.full(3, 0.5))
    return [sorted((int(t), int(p)) for t, p in mine[0]) for mine in lines]


def store(cache, positions, sequences, tokens=None):
    """One pass; the token at a position is called by its position unless it has a name."""
    positions = list(positions)
    sequences = [sequences] * len(positions) if isinstance(sequences, int) else sequences
    cache.start_forward(Batch(positions, sequences))
    put(peek.buffers(cache).backend, cache, positions if tokens is None else tokens, positions)


def visible(part, tokens, position):
    """What a token attends to in a run that never stopped."""
    low = 0 if part.window is None else max(0, position - part.window + 1)
    low = low if part.chunk is None else max(low, position - position % part.chunk)
    return sorted((tokens[p], p) for p in range(low, position + 1))


def make(window=None, backend=NUMPY, dtype="float32", config=None, **options):
    limits = {name: options.pop(name) for name in ("memory", "chunk", "shift") if name in options}
    cache = CausalCache(window=window, **limits)
    if config is not None:
        cache.set_config(config)
    cache.init(backend, dtype, **{"max_sequences": 4, "capacity": 16, "max_batch": 8} | options)
    return cache


# What is always true.


def check_holders(cache):
    """Every holder is a sequence or rows that stayed, and what has none is free."""
    table, owner = peek.table(cache), peek.pins(cache)
    holders, pins = np.zeros(table.cells, int), np.zeros(table.cells, int)
    for sequence in range(table.max_sequences):
        row = table.cells_of(sequence)
        holders[row] += 1
        assert (np.diff(table.positions[row]) > 0).all()
        if row.size:
            assert table.span(np.array([sequence])) == (row.min(), row.max() + 1)
    for kept in peek.pinned_rows(cache):
        assert kept.owner is owner
        assert table.positions[kept.slots].tolist() == kept.positions.tolist()
        pins[kept.slots] += 1
    np.testing.assert_array_equal(peek.pin_references(cache), pins)
    np.testing.assert_array_equal(table.allocator.refcounts, holders + pins)
    check_free(table, holders + pins)


def check_empty(cache):
    """Nothing leaked."""
    assert not peek.pinned_rows(cache)
    assert peek.table(cache).free == peek.table(cache).cells
    assert not peek.table(cache).allocator.refcounts.any()


def is_full(part, sizes, positions, sequences):
    """Whether the sequences alone leave too little room for a pass."""
    oracle = Oracle(**sizes, window=part.window, memory=part.memory, page=part.page)
    table = peek.table(part)
    oracle.size, oracle.recent = table.cells, set(peek.maybe_expired(part))
    oracle.held = [
        dict(zip(table.positions[row].tolist(), row.tolist(), strict=True))
        for row in map(table.cells_of, range(table.max_sequences))
    ]
    if part.page > 1:
        return paging.is_full(table, oracle.trimmed(positions, sequences), positions, sequences)
    return oracle.refuses(positions, sequences) == "full"


def prints(parts):
    """All that some caches are, to the byte."""
    return [
        fingerprint(part) if isinstance(part, CausalCache) else repr(peek.entries(part))
        for part in parts
    ]


def last_place(positions, sights, limit):
    """The slow way to where a sequence can go on."""
    for place in range(limit, 0, -1):
        needed = [
            {*range(s.lowest_needed(place), place), *range(min(s.sinks, place))} for s in sights
        ]
        if all(n <= set(held) for n, held in zip(needed, positions, strict=True)):
            return place
    return 0


class Chain:
    """Snapshots of one sequence from its beginning, and its tokens."""

    def __init__(self, snapshots, tokens):
        self.snapshots, self.tokens = snapshots, tokens

    def close(self):
        for snapshot in self.snapshots:
            snapshot.close()


class SnapshotMachine(RuleBasedStateMachine):
    """backend: what it runs on. kinds: of caches, by name."""

    backend = NUMPY
    kinds = tuple(KINDS)
    padding = 1
    page = 1

    @initialize(
        kind=st.sampled_from(range(len(KINDS))),
        sizes=st.fixed_dictionaries(
            {
                "max_sequences": st.integers(2, 4),
                "capacity": st.integers(5, 12),
                "max_batch": st.integers(1, 6),
            }
        ),
        layouts=st.tuples(*[st.sampled_from(["htd", "thd", "hdt"])] * 2),
    )
    def make(self, kind, sizes, layouts):
        if self.backend.name == "jax":
            sizes, layouts = {"max_sequences": 3, "capacity": 8, "max_batch": 4}, ("htd", "thd")
        self.sizes, self.count = sizes, sizes["max_sequences"]
        all_parts = KINDS[self.kinds[kind % len(self.kinds)]](self.shift(layouts[0]))
        self.parts = [part for part in all_parts if isinstance(part, CausalCache)]
        for part in self.parts:
            part.page = self.page
        self.encoder = next((p for p in all_parts if isinstance(p, EncoderCache)), None)
        self.cache = all_parts[0] if len(all_parts) == 1 else WrapperCache(*all_parts)
        config = {"key_layout": layouts[0], "value_layout": layouts[1], "padding": self.padding}
        self.cache.set_config(CacheConfig(**config))
        self.cache.init(self.backend, **sizes)
        self.tokens = [[] for _ in range(self.count)]
        self.due = [set() for _ in range(self.count)]
        self.chains, self.name = [], 1
        for sequence in range(2):  # so that there is something to work on
            if self.forward([(position, sequence) for position in range(4)]):
                self.keep_of(sequence, [0, 2, 4])

    def shift(self, layout):
        plain = add_positions(self.backend)

        def shifted(layer, keys, offsets):
            lying = on_host(self.backend, keys, layout)
            return laid_out(
                self.backend,
                self.backend.to_host(plain(layer, self.backend.from_host(lying), offsets)),
                layout,
            )

        return shifted

    # Passes.

    @rule(data=st.data())
    def grow(self, data):
        pairs = []
        for sequence in data.draw(st.sets(st.integers(0, self.count - 1), min_size=1, max_size=3)):
            start = len(self.tokens[sequence])
            stop = start + data.draw(st.integers(1, 7))
            if data.draw(st.booleans()):
                self.schedule(sequence, data.draw(st.sets(st.integers(start, stop), max_size=3)))
            pairs += [(position, sequence) for position in range(start, stop)]
        self.forward(data.draw(st.permutations(pairs)))

    @rule(sequence=st.integers(0, 3), count=st.integers(1, 9))
    def decode(self, sequence, count):
        sequence %= self.count
        for _ in range(count):
            if not self.forward([(len(self.tokens[sequence]), sequence)]):
                break

    def schedule(self, sequence, places):
        self.cache.schedule(sequence, places)
        self.due[sequence] |= places

    def forward(self, pairs):
        """One pass; whether there was room for it."""
        positions, sequences = ([pair[i] for pair in pairs] for i in (0, 1))
        first = [i for i, position in enumerate(positions) if position == 0]
        batch = Batch(positions, sequences, first if self.encoder else ())
        before = [peek.forward_pass(part) for part in self.parts]
        try:
            self.cache.start_forward(batch)
        except CacheFullError:
            assert any(is_full(p, self.sizes, positions, sequences) for p in self.parts)
            assert [peek.forward_pass(part) for part in self.parts] == before
            return False
        names = list(range(self.name, self.name + len(pairs)))
        self.name += len(pairs)
        for position, sequence, name in sorted(zip(positions, sequences, names, strict=True)):
            assert position == len(self.tokens[sequence])
            self.tokens[sequence].append(name)
        if self.encoder and first:
            self.put_frames([names[i] for i in first])
        for part in self.parts:
            put(self.backend, part, names, positions)
        self.look(positions, sequences)
        return True

    def put_frames(self, names):
        frames = np.repeat(np.array(names, np.float32), FRAMES)
        config, every = (
            self.encoder._config,
            np.broadcast_to(frames[None, :, None], (2, frames.size, 3)),
        )
        for layer in range(LAYERS):
            self.encoder.set_layer(layer)
            self.encoder.put(
                laid_out(self.backend, every + np.float32(layer), config.key_layout),
                laid_out(self.backend, -every[:, :, :2], config.value_layout),
                [FRAMES] * len(names),
            )

    def look(self, positions, sequences):
        """Every token attends to what it would in a run that never stopped."""
        for part in self.parts:
            wanted = [
                visible(part, self.tokens[s], p) for p, s in zip(positions, sequences, strict=True)
            ]
            for layer in range(LAYERS):
                assert seen(self.backend, part, layer) == wanted
        if self.encoder:
            self.look_at_frames(list(dict.fromkeys(sequences)))

    def look_at_frames(self, ids):
        wanted = np.repeat([self.tokens[each][0] for each in ids], FRAMES)
        for layer in range(LAYERS):
            self.encoder.set_layer(layer)
            keys, values, _ = self.encoder.get()
            keys = on_host(self.backend, keys, self.encoder._config.key_layout)
            values = on_host(self.backend, values, self.encoder._config.value_layout)
            assert (keys == wanted[None, :, None] + layer).all()
            assert (values == -wanted[None, :, None]).all()

    # Sequences.

    def filled(self, sequence):
        """A sequence that holds something, if one does."""
        ids = [each for each in range(self.count) if self.tokens[each]]
        return ids[sequence % len(ids)] if ids else 0

    @rule(data=st.data(), sequence=st.integers(0, 3), whole=st.integers(0, 2))
    def remove_tail(self, data, sequence, whole):
        sequence = self.filled(sequence)
        size = len(self.tokens[sequence])
        begin = 0 if whole == 0 else data.draw(st.integers(max(0, size - 3), size))
        self.cache.remove(sequence, begin)
        del self.tokens[sequence][begin:]
        self.settle(sequence, begin)

    @rule(data=st.data(), sequence=st.integers(0, 3))
    def remove_middle(self, data, sequence):
        sequence = self.filled(sequence)
        size = len(self.tokens[sequence])
        if size < 2:
            return
        begin = data.draw(st.integers(1, size - 1))
        end = data.draw(st.integers(begin, size))
        try:
            self.cache.remove(sequence, begin, end)
        except kvcache.SharedCellsError:
            return
        except kvcache.NotSupportedError:  # a removal from the first cache on is one from all
            tables = map(peek.table, self.parts)
            assert any(paging.refuses_removal(table, sequence, begin, end) for table in tables)
            return
        del self.tokens[sequence][begin:end]
        self.settle(sequence, begin)

    @rule(data=st.data(), source=st.integers(0, 3), other=st.integers(0, 3))
    def copy_prefix(self, data, source, other):
        source, other = self.filled(source), other % self.count
        length = data.draw(st.integers(0, len(self.tokens[source])))
        try:
            self.cache.copy_prefix(source, other, length)
        except ValueError:  # nothing held, which a window of one is when it was just restored
            return
        self.tokens[other] = self.tokens[source][:length]
        self.settle(other, length if source == other else 0)

    def settle(self, sequence, begin):
        """Go on only where a token would see all it should, and expect no more than is said."""
        held = [part.next_position(sequence) for part in self.parts]
        self.due[sequence] = {p for p in self.due[sequence] if p <= min([begin, *held])}
        size = len(self.tokens[sequence])
        if min(held) < size or not self.cache.can_resume(sequence, size):
            self.cache.remove(sequence, 0)
            self.tokens[sequence], self.due[sequence] = [], set()

    # Snapshots.

    @rule(data=st.data(), sequence=st.integers(0, 3))
    def take(self, data, sequence):
        sequence = self.filled(sequence)
        size = len(self.tokens[sequence])
        if not size:
            return
        cuts = data.draw(st.sets(st.integers(1, size), max_size=3)) | {0, size}
        self.keep_of(sequence, sorted(cuts))

    def keep_of(self, sequence, cuts):
        size = len(self.tokens[sequence])
        taken = [
            self.cache.snapshot(sequence, start, stop) for start, stop in itertools.pairwise(cuts)
        ]
        for place in self.due[sequence]:
            assert place > size or last_resumable(taken, place) == place
        self.chains.append(Chain(taken, list(self.tokens[sequence])))
        if len(self.chains) > 4:
            self.chains.pop(0).close()

    def chain(self, data):
        return data.draw(st.sampled_from(range(len(self.chains))).map(self.chains.__getitem__))

    @precondition(lambda self: self.chains)
    @rule(data=st.data())
    def change_form(self, data):
        snapshots = self.chain(data).snapshots
        which = data.draw(st.integers(0, len(snapshots) - 1))
        one, how = snapshots[which], data.draw(st.sampled_from(["host", "split", "merge"]))
        if how == "host":
            assert not one.to_host().resident
        elif how == "split" and one.stop - one.start > 1:
            at = data.draw(st.integers(one.start + 1, one.stop - 1))
            snapshots[which : which + 1] = one.split(at)
        elif how == "merge" and which + 1 < len(snapshots):
            other, size = snapshots[which + 1], one.nbytes + snapshots[which + 1].nbytes
            snapshots[which : which + 2] = [one.merge(other)]
            assert snapshots[which].nbytes == size
            one.close(), other.close()  # they are already, and it loses nothing

    @precondition(lambda self: self.chains)
    @rule(data=st.data(), sequence=st.integers(0, 3))
    def union(self, data, sequence):
        """Whoever has the same tokens fills what a snapshot lacks."""
        sequence, chain = sequence % self.count, self.chain(data)
        common = len(
            [1 for a, b in zip(chain.tokens, self.tokens[sequence], strict=False) if a == b]
        )
        which = data.draw(st.integers(0, len(chain.snapshots) - 1))
        if chain.snapshots[which].stop <= common:
            other = self.cache.snapshot(sequence, 0, common)
            chain.snapshots[which] = chain.snapshots[which].union(other)
            other.close()

    @precondition(lambda self: self.chains)
    @rule(data=st.data())
    def close(self, data):
        chain = self.chain(data)
        self.chains.remove(chain)
        chain.close()

    @precondition(lambda self: self.chains)
    @rule(data=st.data(), sequence=st.integers(0, 3))
    def restore(self, data, sequence):
        sequence, chain = sequence % self.count, self.chain(data)
        limit = data.draw(st.integers(0, len(chain.tokens)))
        place = last_resumable(chain.snapshots, limit)
        assert place == self.slow_reach(chain, limit)
        if self.impossible(chain):
            self.refused(KVCacheError, sequence, chain)
        elif any(part.next_position(sequence) for part in self.parts):
            self.refused(ValueError, sequence, chain)
        if not place:
            return
        self.cache.remove(sequence, 0)
        self.tokens[sequence], self.due[sequence] = [], set()
        self.cut_at(chain, place)
        try:
            self.cache.restore(sequence, *(s for s in chain.snapshots if s.stop <= place))
        except CacheFullError:
            self.check_full(place)
            return
        self.tokens[sequence] = chain.tokens[:place]
        assert self.cache.can_resume(sequence, place)
        self.forward([(place, sequence)])

    def refused(self, kind, sequence, chain):
        before = prints(self.parts)
        with pytest.raises(kind):
            self.cache.restore(sequence, *chain.snapshots)
        assert prints(self.parts) == before

    def impossible(self, chain):
        return last_resumable(chain.snapshots, len(chain.tokens)) < len(chain.tokens)

    def cut_at(self, chain, place):
        for index, each in enumerate(chain.snapshots):
            if each.start < place < each.stop:
                chain.snapshots[index : index + 1] = each.split(place)
                return

    def slow_reach(self, chain, limit):
        columns = list(zip(*(each.parts for each in chain.snapshots), strict=True))
        held = [[p for part in column for p in part.rows.positions.tolist()] for column in columns]
        return last_place(held, [column[0].spec.visibility for column in columns], limit)

    def check_full(self, place):
        """Sequences alone leave too little room for what is needed at `place`."""
        lacks = []
        for part in self.parts:
            table, page = peek.table(part), part.page
            used = {cell // page for s in range(self.count) for cell in table.cells_of(s).tolist()}
            needed = place - peek.resumed(part).lowest_needed(place)
            # Wherever in a page the first of these tokens lies.
            lacks.append((needed + 2 * (page - 1)) // page > table.cells // page - len(used))
        assert any(lacks)

    @invariant()
    def is_in_order(self):
        for part in getattr(self, "parts", ()):
            check_holders(part)

    def teardown(self):
        for chain in getattr(self, "chains", ()):
            chain.close()
        for sequence in range(getattr(self, "count", 0)):
            self.cache.remove(sequence, 0)
        for part in getattr(self, "parts", ()):
            check_holders(part)
            check_empty(part)


class Copying(type(NUMPY)):
    """NumPy as if slices were no views, like JAX: rows come in few lengths."""

    slices_are_views = False


SHARE = {"numpy": 110, "torch": 14, "array_api": 14, "mlx": 10, "jax": 2}
"""Examples out of a hundred: what a backend's speed affords."""


def run(backend, count, **options):
    machine = type("Machine", (SnapshotMachine,), {"backend": backend, **options})
    count = max(1, settings().max_examples * count // 100)
    run_state_machine_as_test(
        machine, settings=settings(max_examples=count, stateful_step_count=30)
    )


@pytest.mark.slow
def test_any_sequence(backend):
    run(backend, SHARE[backend.name], padding=64 if backend.name == "jax" else 1)


def test_any_sequence_where_slices_are_copies():
    run(Copying(), 25, padding=4)


@pytest.mark.slow
@pytest.mark.parametrize("page", [2, pytest.param(4, marks=pytest.mark.matrix)])
def test_any_sequence_in_pages(page):
    run(NUMPY, SHARE["numpy"] // 3, page=page)


def test_any_sequence_in_pages_where_slices_are_copies():
    run(Copying(), 15, padding=4, page=4)


# Resident ones.


def test_a_snapshot_copies_nothing_and_shares_its_cells(monkeypatch):
    cache = make()
    store(cache, range(6), 0)
    free, row = peek.table(cache).free, peek.table(cache).cells_of(0).tolist()
    monkeypatch.setattr(type(NUMPY), "read_rows", lambda *_: pytest.fail("rows were copied"))
    snapshot = cache.snapshot(0)
    # Keys of 2 x 2, values of 1 x 3; keys alone in the other layer: 44 bytes a token.
    assert (snapshot.host_nbytes, snapshot.nbytes, snapshot.resident) == (0, 6 * 44, True)
    cache.remove(0, 0)
    assert peek.table(cache).free == free
    cache.restore(2, snapshot)
    assert peek.table(cache).free == free
    assert peek.table(cache).cells_of(2).tolist() == row
    snapshot.close()
    cache.remove(2, 0)
    check_empty(cache)


def test_who_is_out_of_sequences_leaves_although_two_hold_its_cells():
    cache = make(capacity=2)
    store(cache, range(7), 0)
    both = [cache.snapshot(0), cache.snapshot(0, 3)]
    cache.remove(0, 0)
    assert peek.table(cache).free == 1
    store(cache, range(8), 1)
    assert [each.resident for each in both] == [False, False]
    cache.remove(1, 0)
    cache.restore(2, both[0])
    store(cache, [7], 2)
    assert seen(NUMPY, cache, 0) == [[(p, p) for p in range(8)]]


def test_what_a_window_lets_go_of_makes_room_where_a_snapshot_holds_it():
    cache = make(window=3, max_sequences=1, max_batch=4)
    for start in range(0, 40, 4):
        store(cache, range(start, start + 4), 0)
        taken = cache.snapshot(0, start, start + 4)  # of the whole pool, soon; never closed
    assert taken.resident
    check_holders(cache)


def test_what_is_restored_leaves_itself_if_there_is_no_other_room():
    cache = make(window=3, max_sequences=2, max_batch=2)  # 8 cells
    store(cache, range(8), 0)
    taken = [cache.snapshot(0, 0, 5), cache.snapshot(0, 5).to_host()]
    cache.remove(0, 0)
    store(cache, range(3), 1)
    cache.restore(0, *taken)  # needs two cells, and none of the five that the first one has
    store(cache, [8], 0)
    assert seen(NUMPY, cache, 0) == [[(6, 6), (7, 7), (8, 8)]]


def test_closing_what_was_merged_loses_nothing():
    cache = make()
    store(cache, range(4), 0)
    for form in (lambda each: each, Snapshot.to_host):
        one, nothing = form(cache.snapshot(0)), form(cache.snapshot(1, 4, 6))
        whole = one.merge(nothing)
        one.close(), nothing.close()
        assert whole.nbytes == 4 * 44
        whole.close()
    cache.remove(0, 0)
    check_empty(cache)


# What was kept on schedule belongs to what was written, and to nothing else.


def test_a_copied_sequence_forgets_what_it_kept():
    cache = make(window=3)
    cache.schedule(0, [2])
    store(cache, range(9), 0, range(100, 109))
    store(cache, [9], 0, [109])
    assert peek.retained_rows(cache)
    store(cache, range(5), 1)
    cache.copy_prefix(1, 0, 5)
    for position in range(5, 9):
        store(cache, [position], 0)
    assert cache.snapshot(0, 0, 2).parts[0].rows.positions.size == 0


def test_a_removal_in_front_of_the_window_forgets_what_was_kept_behind_it():
    cache = make(window=3, shift=add_positions(NUMPY))
    cache.schedule(0, [5])
    store(cache, range(12), 0)
    store(cache, [12], 0)
    cache.remove(0, 4, 11)  # position 4 was kept, and is another token's now
    store(cache, range(6, 20), 0)
    store(cache, [20], 0)
    assert cache.snapshot(0).parts[0].rows.positions.tolist()[:2] == [3, 17]


def test_forgotten_positions_are_not_kept_later():
    cache = make(window=2)
    cache.schedule(0, [6])
    store(cache, range(4), 0)
    cache.remove(0, 0)
    assert not peek.unreached(cache)


def test_rows_leave_before_a_shift_moves_their_cells():
    cache = make(shift=add_positions(NUMPY))
    store(cache, range(6), 0)
    with cache.snapshot(0, 0, 2) as before, cache.snapshot(0, 2) as behind:
        cache.remove(0, 1, 3)
        assert (before.resident, behind.resident) == (True, False)
        cache.restore(1, before, behind)
    store(cache, [6], 1)
    assert seen(NUMPY, cache, 0) == [[(p, p) for p in range(7)]]


def test_an_encoder_that_holds_output_takes_no_other():
    cache = EncoderCache()
    cache.init("numpy")
    cache.start_forward(Batch([0], [0]))
    cache.put(np.zeros((1, 2, 2), np.float32), np.zeros((1, 2, 2), np.float32))
    with pytest.raises(ValueError, match="empty sequence; 0 holds"):
        cache.restore(0, cache.snapshot(0))


def test_what_arrives_while_a_program_runs_is_written_to_what_it_made():
    cache = make()
    store(cache, range(4), 0)
    taken = cache.snapshot(0).to_host()
    made = {
        layer: tuple(part.copy() for part in held) for layer, held in cache.program_state.items()
    }
    cache.restore(1, taken)
    cache.program_state = made
    store(cache, [4], 1)
    assert seen(NUMPY, cache, 0) == [[(p, p) for p in range(5)]]


# What is refused.


def refusals():
    other = make(window=4)
    store(other, range(3), 0)
    narrow = make()
    narrow.start_forward(Batch([0], [0]))
    narrow.put(np.zeros((1, 1, 2), np.float32), np.zeros((1, 1, 3), np.float32))
    half = make(dtype="float16")
    return {
        "same kinds, windows and dtype": lambda taken: [other.snapshot(0)],
        "same heads": lambda taken: [narrow.snapshot(0).to_host()],
        "kinds, windows and dtype": lambda taken: [half.snapshot(0)],
        "follow each other": lambda taken: [taken[1]],
        "follow each other from position 0; got \\[\\]": lambda taken: [],
        "the last place to go on is 2": lambda taken: [taken[0].union(taken[1])],
    }


@pytest.mark.parametrize("match", refusals())
def test_a_refused_restore_changes_nothing(match):
    cache = make()
    store(cache, range(4), 0)
    taken = [cache.snapshot(0, 0, 2), cache.snapshot(0, 2)]
    wrong = refusals()[match](taken)
    if "last place" in match:
        cache.remove(0, 2)
        wrong = [cache.snapshot(0, 0, 4)]
    before = fingerprint(cache)
    with pytest.raises((ValueError, KVCacheError), match=match):
        cache.restore(1, *wrong)
    assert fingerprint(cache) == before


def test_restoring_into_a_sequence_or_a_pool_that_is_full():
    cache = make(capacity=2)
    store(cache, range(4), 0)
    taken = cache.snapshot(0).to_host()
    before = fingerprint(cache)
    with pytest.raises(ValueError, match="empty sequence; 0 holds"):
        cache.restore(0, taken)
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        cache.restore(4, taken)
    assert fingerprint(cache) == before
    store(cache, range(2), 1)
    before = fingerprint(cache)
    with pytest.raises(CacheFullError, match="needs 4 free cells; 2 of 8"):
        cache.restore(2, taken)
    assert fingerprint(cache) == before


def test_a_wrapper_restores_in_all_caches_or_in_none():
    parts = CausalCache(window=2), CausalCache()
    cache = WrapperCache(*parts)
    cache.init("numpy", max_sequences=3, capacity=4, max_batch=4)
    cache.start_forward(Batch(range(7), [0] * 7))
    for part in parts:
        put(NUMPY, part, range(7), range(7))
    taken = cache.snapshot(0).to_host()
    before = [fingerprint(part) for part in parts]
    with pytest.raises(CacheFullError):
        cache.restore(1, taken)
    assert [fingerprint(part) for part in parts] == before


def test_a_cache_that_offers_none():
    class Plain(CausalCache):
        capture = outline = schedule = kvcache.Cache.schedule

    with pytest.raises(kvcache.NotSupportedError, match="Plain offers no snapshots"):
        Plain().schedule(0, [1])


# Where a sequence can go on.


@pytest.mark.parametrize(
    "visibility",
    [
        Visibility(),
        Visibility(0),
        Visibility(3),
        Visibility(2, sinks=2),
        Visibility(chunk=4),
        Visibility(5, 4),
        Visibility(0, 3),
    ],
    ids=repr,
)
def test_reach_is_the_last_place_that_lacks_nothing(visibility):
    random = np.random.default_rng(0)
    for density in random.random(200):
        held = np.flatnonzero(random.random(20) < density**0.3).astype(np.int32)
        for limit in range(0, 20, 3):
            assert visibility.last_resumable(held, limit) == last_place(
                [held.tolist()], [visibility], limit
            )


# Other backends.


def finite_coded(shape, dtype, first):
    """Coded rows, without the patterns of NaN and infinity: a pool replaces these."""
    [rows] = coded(shape, dtype, first)
    return np.where(np.isfinite(rows.astype(np.float32)), rows, np.zeros(1, rows.dtype))


def coded_pool(backend, dtype):
    """A pool with 6 tokens of sequence 1, whose every bit pattern tells where it belongs."""
    cache = make(window=4, backend=backend, dtype=dtype, max_sequences=2)
    cache.start_forward(Batch(range(6), [1] * 6))
    for layer in range(2):
        cache.set_layer(layer)
        keys, values = (finite_coded((1, 2, 6, 3), dtype, 100 * layer + i) for i in (0, 50))
        cache.put(backend.from_host(keys), None if layer else backend.from_host(values))
    return cache


DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def common_dtypes(one, other):
    return [dtype for dtype in DTYPES if dtype in one.dtypes and dtype in other.dtypes]


def test_every_bit_of_finite_numbers_crosses(backend, target, tmp_path):
    for dtype in common_dtypes(backend, target):
        check_crossing(backend, target, dtype, tmp_path)


def check_crossing(backend, target, dtype, tmp_path):
    source = coded_pool(backend, dtype)
    with source.snapshot(1, 0, 3) as one, source.snapshot(1, 3) as two:
        there = make(window=4, backend=target, dtype=dtype, max_sequences=2)
        there.restore(0, one, two)
        assert one.resident
        two.save(tmp_path / "two")
        saved = Snapshot.load(tmp_path / "two")
        again = make(window=4, backend=target, dtype=dtype, max_sequences=2)
        again.restore(0, one, saved)
    for cache in (there, again):
        with cache.snapshot(0) as found:
            assert found.parts[0].rows.positions.tolist() == [3, 4, 5]
            for layer, arrays in found.to_host().parts[0].rows.to_host().items():
                wanted = [
                    finite_coded((1, 2, 6, 3), dtype, 100 * layer + i)[:, 3:] for i in (0, 50)
                ]
                assert [array.name for array in arrays] == ["keys", "values"][: 2 - layer]
                for array, expected in zip(arrays, wanted, strict=False):
                    same(array.data, expected)


def test_encoders_output_crosses(backend, target):
    for dtype in common_dtypes(backend, target):
        check_frames_crossing(backend, target, dtype)


def check_frames_crossing(backend, target, dtype):
    source, there = EncoderCache(), EncoderCache()
    source.init(backend, dtype, max_sequences=3)
    there.set_config(CacheConfig(key_layout="hdt", value_layout="thd"))
    there.init(target, dtype, max_sequences=3)
    source.start_forward(Batch([0], [1]))
    keys, values = (finite_coded((1, 2, 5, dim), dtype, dim) for dim in (3, 4))
    source.put(backend.from_host(keys), backend.from_host(values))
    there.restore(2, source.snapshot(1))
    there.start_forward(Batch([1], [2]))
    found = there.get()
    same(np.ascontiguousarray(on_host(target, found[0], "hdt")), keys)
    same(np.ascontiguousarray(on_host(target, found[1], "thd")), values)


# Files.


@pytest.fixture
def saved(tmp_path):
    cache = make()
    store(cache, range(5), 0)
    with cache.snapshot(0) as snapshot:
        snapshot.save(tmp_path / "one", tokens=[1, 2, 3, 4, 5], fingerprint="model A")
    return tmp_path / "one"


def test_a_file_is_asked_whose_it_is(saved, tmp_path):
    assert Snapshot.load(saved, tokens=[1, 2, 3, 4, 5], fingerprint="model A").stop == 5
    with pytest.raises(SnapshotMismatchError, match="belongs to other tokens"):
        Snapshot.load(saved, tokens=[1, 2, 3, 4, 6])
    with pytest.raises(SnapshotMismatchError, match="model 'model A', not 'B'"):
        Snapshot.load(saved, tokens=[1, 2, 3, 4, 5], fingerprint="B")
    with pytest.raises(kvcache.ForeignFileError, match="holds a snapshot, no caches"):
        LayerCaches.load(saved)
    LayerCaches([kvcache.KVCache()]).save(tmp_path / "caches")
    with pytest.raises(kvcache.ForeignFileError, match="no snapshot"):
        Snapshot.load(tmp_path / "caches")


def test_one_damaged_byte_is_found(saved):
    whole = saved.read_bytes()
    for at in (len(whole) - 1, len(whole) - 300, 200):
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(kvcache.CacheFileError, match=r"damaged|safetensors"):
            Snapshot.load(saved)


def test_a_part_that_holds_nothing_is_saved_too(tmp_path):
    cache = make(window=2)
    store(cache, range(6), 0)
    store(cache, [6], 0)
    encoder = EncoderCache()
    encoder.init("numpy")
    for snapshot in (cache.snapshot(0, 0, 2), encoder.snapshot(0, 0, 2)):
        snapshot.save(tmp_path / "nothing")
        found = Snapshot.load(tmp_path / "nothing")
        assert (found.start, found.stop, found.nbytes) == (0, 2, 0)


# Plans, twins and threads.


def test_a_plan_that_fails_leaves_the_holders_as_they_were():
    cache = make(capacity=4, max_sequences=2)
    store(cache, range(4), 0)
    store(cache, range(2), 1)
    taken, other = cache.snapshot(1), cache.snapshot(0)
    cache.remove(1, 0)
    row, free = peek.table(cache).cells_of(0).tolist(), peek.table(cache).free
    with pytest.raises(CacheFullError):
        cache.plan_steps(Batch([4], [0]), 6)
    assert peek.table(cache).cells_of(0).tolist() == row
    assert (taken.resident, other.resident, peek.table(cache).free) == (False, True, free + 2)
    check_holders(cache)
    cache.restore(1, taken)
    store(cache, [2], 1)
    assert seen(NUMPY, cache, 0) == [[(0, 0), (1, 1), (2, 2)]]


def test_a_plan_of_steps_copies_nothing_that_is_not_written_yet():
    cache = make(window=3, max_sequences=1, max_batch=2)  # 4 cells
    cache.schedule(0, [5, 6, 7])
    store(cache, range(4), 0)
    cache.plan_steps(Batch([4], [0]), 8)
    check_holders(cache)
    assert all(early.owner is not None for early in peek.retained_rows(cache))
    cache.program_state = cache.program_state  # the programs wrote their tokens
    cache.schedule(0, [13])  # and goes on as before
    for position in range(12, 17):
        store(cache, [position], 0)
    assert last_resumable([cache.snapshot(0)], 13) == 13


def test_a_twin_has_no_pins(backend, target):
    cache = make(backend=backend)
    store(cache, range(5), 0)
    with cache.snapshot(0), cache.snapshot(0, 2):
        twin = cache.to_backend(target)
        check_holders(twin)
        check_holders(cache)
        twin.remove(0, 0)
        check_empty(twin)
        assert peek.table(cache).cells_of(0).size == 5


class Visitor(threading.Thread):
    """Lets a sequence come and go, until it is told to stop, and counts what it knows of it."""

    def __init__(self, cache, sequence, done):
        super().__init__()
        self.cache, self.sequence, self.done = cache, sequence, done
        self.taken = cache.snapshot(sequence)
        self.names = [1000 * sequence + p for p in range(12)]
        self.random = np.random.default_rng(sequence)
        self.error = None

    def run(self):
        try:
            self.cache.remove(self.sequence, 0)
            while not self.done.is_set():
                self.come_and_go()
            self.cache.restore(self.sequence, self.taken)
            self.check()
            self.taken.close()
        except Exception as error:  # noqa: BLE001 - the test raises it
            self.error = error

    def come_and_go(self):
        self.cache.restore(self.sequence, self.taken)
        more = self.cache.snapshot(self.sequence, 5)
        if self.random.integers(3) == 0:
            more.to_host()
        if self.random.integers(3) == 0:
            self.taken = Snapshot.merge(*self.taken.split(5))
        self.taken = self.taken.union(more)
        assert self.cache.next_position(self.sequence) == 12
        assert self.cache.can_resume(self.sequence, 12)
        self.cache.remove(self.sequence, 0)
        if self.random.integers(9) == 0:
            self.check()

    def check(self):
        [part] = self.taken.parts
        keys = part.rows.to_host()[0][0].data
        assert keys[0, :, 0].tolist() == [self.names[p] for p in part.rows.positions]


@pytest.fixture
def eager_threads():
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("backend", ["numpy", "torch"], indirect=True)
@pytest.mark.parametrize("window", [None, 4])
def test_sequences_come_and_go_while_passes_run(backend, window, eager_threads):
    cache = make(window, backend, max_sequences=6, capacity=29, max_batch=12)
    for sequence in range(6):
        store(cache, range(12), sequence, [1000 * sequence + p for p in range(12)])
    done = threading.Event()
    visitors = [Visitor(cache, sequence, done) for sequence in range(2, 6)]
    for visitor in visitors:
        visitor.start()
    try:
        for position in range(12, 60):
            decode_both(backend, cache, position)
    finally:
        done.set()
        for visitor in visitors:
            visitor.join()
    assert [visitor.error for visitor in visitors] == [None] * 4
    check_holders(cache)
    for visitor in visitors:
        store(cache, [12], visitor.sequence, [0])
        assert seen(backend, cache, 0) == [visible(cache, [*visitor.names, 0], 12)]
    for sequence in range(6):
        cache.remove(sequence, 0)
    check_empty(cache)


def decode_both(backend, cache, position):
    """One token for sequences 0 and 1, which see what they should."""
    store(cache, [position] * 2, [0, 1], [position, position + 1000])
    tokens = [[1000 * s + p for p in range(position + 1)] for s in (0, 1)]
    for layer in range(LAYERS):
        assert seen(backend, cache, layer) == [visible(cache, each, position) for each in tokens]


def test_schedules_are_of_sequences_there_are():
    cache = make(4, max_sequences=2)
    for sequence in (-1, 2):
        with pytest.raises(ValueError, match=r"must lie in \[0, 2\)"):
            cache.schedule(sequence, [1])


def test_one_lock_for_all_that_changes_together():
    """Snapshots of a part are released under the lock of the whole; a twin has its own."""
    wrapper = kvcache.WrapperCache(CausalCache(window=4), CausalCache())
    wrapper.init(NUMPY, capacity=16, max_batch=4)
    twin = wrapper.to_backend(NUMPY)
    for whole in (wrapper, twin):
        for part in whole.caches:
            assert part.lock is whole.lock
            assert peek.pins(part).lock is whole.lock
    assert twin.lock is not wrapper.lock
    alone = make()
    assert alone.to_backend(NUMPY).lock is not alone.lock
