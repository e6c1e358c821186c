"""Sessions over every kind of cache, which check what each token attends to against a cold run.

A key is ``[token, position]``, so what a token should see of a conversation is a list
comprehension over its ids, wherever the keys come from: computed just now, shared, or restored.
"""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

import numpy as np

from kvcache import (
    Batch,
    CausalCache,
    EncoderCache,
    KVCache,
    RecurrentCache,
    RotatingKVCache,
    StateCache,
    WrapperCache,
)
from kvcache.prefix import PrefixCache

from .. import peek

RECURRENT = {"recurrent": True}
"""Of a layer with a state instead of keys and values."""
WIDTH = 40
"""Numbers of a state: so many tokens at most."""
FRAMES = 2
"""What an encoder puts out for one image."""


class Seen(NamedTuple):
    """What the tokens of a layer see of those before them."""

    window: int | None = None
    chunk: int | None = None
    sinks: int = 0

    def by(self, ids, place):
        """``(token, position)`` of all that the token at `place` attends to."""
        low = 0 if self.window is None else max(0, place - self.window + 1)
        low = low if self.chunk is None else max(low, place - place % self.chunk)
        return [(ids[p], p) for p in range(place + 1) if p >= low or p < self.sinks]


class Pool:
    """A model over one multi-sequence cache. media: each prompt begins with an image."""

    media = False

    def __init__(self, backend, *parts, max_sequences=2, capacity=24, max_batch=8):
        caches, self.seen = [], []
        for limits in parts:
            recurrent = limits == RECURRENT
            caches.append(RecurrentCache(8) if recurrent else CausalCache(**limits))
            self.seen.append(None if recurrent else Seen(limits.get("window"), limits.get("chunk")))
        if self.media:
            caches.insert(0, EncoderCache())
        self.cache = caches[0] if len(caches) == 1 else WrapperCache(*caches)
        sizes = {"max_sequences": max_sequences, "capacity": capacity, "max_batch": max_batch}
        self.cache.init(backend, **sizes)
        self.backend, self.max_batch, self.given = backend, max_batch, self.cache

    @property
    def caches(self):
        """Those with cells."""
        parts = getattr(self.cache, "caches", [self.cache])
        return [part for part in parts if isinstance(part, CausalCache)]

    def run(self, session, ids, start, stop):
        """One pass: the tokens ``[start, stop)`` of a session."""
        self.run_all([(session.sequence, ids, start, stop)])

    def run_all(self, requests, check=True):
        """One pass for several sessions."""
        tokens = [(seq, ids, p) for seq, ids, start, stop in requests for p in range(start, stop)]
        images = [i for i, (_, ids, p) in enumerate(tokens) if self.brings_image(ids, p)]
        batch = Batch([p for _, _, p in tokens], [seq for seq, _, _ in tokens], images)
        self.cache.start_forward(batch)
        if self.media:
            self._cross_attend(requests, [tokens[i][1][tokens[i][2]] for i in images])
        keys = np.array([[(ids[p], p) for _, ids, p in tokens]], np.float32)
        for kind, seen in enumerate(self.seen, self.media):
            if isinstance(self.cache, WrapperCache):
                self.cache.set_layer_type(kind)
            for layer in range(2 if check else 1):
                self.cache.set_layer(layer)
                if seen is None:
                    self._advance(requests)
                else:
                    self._attend(layer, keys, seen, tokens, check)

    def brings_image(self, ids, place):
        """Whether the token at `place` comes with the output of an encoder."""
        return self.media and place == 0

    def _advance(self, requests):
        """Look at the states of all sequences, and go on: a state is all tokens so far."""
        states = self.cache.get_states()
        ids = {sequence: ids for sequence, ids, *_ in requests}
        runs = self.cache.runs
        before = [ids[run.sequence][: run.position] for run in runs]
        if states is None:
            assert before == [[]] * len(runs)
        else:  # zeros for a fresh sequence
            rows = [padded(held) if held else [0.0] * WIDTH for held in before]
            assert self.backend.to_host(states[0]).tolist() == rows
        kept = {
            (run.sequence, position): [self._states([ids[run.sequence][:position]])]
            for run in runs
            for position in run.cuts
        }
        after = [ids[run.sequence][: run.end] for run in runs]
        self.cache.put_states(self._states(after), kept=kept)

    def _states(self, held):
        return self.backend.from_host([padded(ids) for ids in held], "float32")

    def _attend(self, layer, keys, seen, tokens, check):
        device = self.backend.from_host(keys * (layer + 1))
        self.cache.put(device, None if layer else self.backend.from_host(-keys))
        if not check:
            return
        found, values, mask = self.cache.get()
        mask = self.backend.to_host(mask)
        found = self.backend.to_host(found)[0]
        for (_, ids, place), line in zip(tokens, mask, strict=True):
            check_rows(found[line] / (layer + 1), seen.by(ids, place))
            if not layer:
                check_rows(-self.backend.to_host(values)[0][line], seen.by(ids, place))

    def _cross_attend(self, requests, arriving):
        self.cache.set_layer_type(0)
        self.cache.set_layer(0)
        if arriving:
            frames = np.repeat(np.array(arriving, np.float32), FRAMES)[None, :, None]
            keys, values = self.backend.from_host(frames), self.backend.from_host(-frames)
            self.cache.put(keys, values, frames=[FRAMES] * len(arriving))
        found, *_ = self.cache.get()
        found = self.backend.to_host(found)[0, :, 0].tolist()
        assert found == [ids[0] for _, ids, _, _ in requests for _ in range(FRAMES)]


class Seeing(Pool):
    """A pool with an encoder in front."""

    media = True


class Layers:
    """A model over per-layer caches of each session's own."""

    max_batch, media = 8, False

    def __init__(self, backend, *parts):
        self.backend, self.seen, self.given = backend, [], []
        for limits in parts:
            if limits == RECURRENT:
                self.given.append(StateCache())
                self.seen.append(None)
                continue
            self.given.append(RotatingKVCache(**limits) if limits else KVCache())
            size, sinks = limits.get("max_size"), limits.get("keep", 0)
            self.seen.append(Seen(size and size - sinks, sinks=sinks))

    def run(self, session, ids, start, stop):
        keys = np.array([[[(ids[p], p) for p in range(start, stop)]]], np.float32)
        for cache, seen in zip(session.caches, self.seen, strict=True):
            if seen is None:
                self._advance(cache, ids, start, stop)
                continue
            found, values = cache.update(
                self.backend.from_host(keys), self.backend.from_host(-keys)
            )
            mask, positions = cache.mask(stop - start), cache.positions
            allowed = np.broadcast_to(positions >= 0, (stop - start, positions.size))
            allowed = allowed if mask is None else self.backend.to_host(mask)
            for place, line in zip(range(start, stop), allowed, strict=True):
                check_rows(self.backend.to_host(found)[0, 0][line], seen.by(ids, place))
                check_rows(-self.backend.to_host(values)[0, 0][line], seen.by(ids, place))

    def _advance(self, cache, ids, start, stop):
        """Look at the state behind `start`, and go on to `stop`: a state is all tokens so far."""
        assert cache.offset == start
        for array in cache.state:
            assert self.backend.to_host(array).tolist() == [padded(ids[:start])]
        for place in cache.cuts(stop - start):
            cache.record(place, self._state(ids[:place]))
        cache.advance(stop - start, self._state(ids[:stop]))

    def _state(self, ids):
        return self.backend.from_host([padded(ids)], "float32")


def padded(ids):
    """Ids as a state of fixed size."""
    return [*map(float, ids), *[-1.0] * (WIDTH - len(ids))]


def check_rows(rows, wanted):
    """Rows ``[token, position]`` in any order are those wanted."""
    got = sorted(rows.tolist(), key=lambda row: row[1])
    assert got == [list(map(float, each)) for each in wanted]


class Server:
    """A prefix cache and a model, and all that sessions have left stored as lists of ids."""

    def __init__(self, model, **options):
        self.model = model
        self.prefix = PrefixCache(model.given, **({"budget": None} | options))
        self.stored = []

    def begin(self, ids, salt="", **options):
        """A session for a prompt, which has been looked at."""
        tokens, media = list(ids), options.pop("media", None)
        if self.model.media:
            tokens[0], media = 7, {(0, 1): f"image {ids[0]}"}
        session = self.prefix.session(tokens, salt=salt, media=media, **options)
        assert session.remaining.tolist() == tokens[session.matched :]
        assert session.matched + session.remaining.size == len(ids)
        assert session.remaining.size >= 1
        return session

    def compute(self, session, ids, start, sizes=(3, 1, 5)):
        """Tokens from `start` on in passes of some sizes, each looked at."""
        turn = 0
        while start < len(ids):
            stop = min(len(ids), start + min(sizes[turn % len(sizes)], self.model.max_batch))
            self.model.run(session, ids, start, stop)
            start, turn = stop, turn + 1

    def ask(self, ids, reply=(), *, sizes=(3, 1, 5), fail=None, **options):
        """A whole session; returns what it did not have to compute.

        The last token of the reply is known, and not computed, as where a model samples it.
        """
        session = self.begin(ids, **options)
        self.finish(session, ids, reply, sizes, fail, options.get("keep_on_error", True))
        return session.matched

    def finish(self, session, ids, reply=(), sizes=(3, 1, 5), fail=None, keep=True):
        """The session from its beginning to its end; it fails after so many tokens."""
        whole = [*ids, *reply]
        held = whole[: max(len(ids), len(whole) - 1)]
        if fail is not None:
            with suppress(Left), session:
                self.compute(session, held[: session.matched + fail], session.matched, sizes)
                raise Left
            # Of the first pass of a pool nothing tells whether it went through all layers.
            first = isinstance(self.model, Pool) and not self.stored
            if keep and not (first and fail <= min(sizes[0], self.model.max_batch)):
                self.stored.append(held[: session.matched + fail])
            return
        with session:
            self.compute(session, held, session.matched, sizes)
            session.extend(reply)
        self.stored.append(held)

    def common(self, ids):
        """Tokens that a prompt shares with something stored, of which one is left to compute."""
        return min(len(ids) - 1, max((shared(ids, old) for old in self.stored), default=0))


class Left(Exception):  # noqa: N818 - nothing is wrong
    """Somebody went away."""


def shared(one, two):
    """How many tokens two sequences begin with alike."""
    pairs = zip(one, two, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(two)))


def all_spans(prefix):
    """All spans of all trees, ghosts among them."""
    nodes = (node for tree in prefix._trees.values() for node in tree.root.below())
    return [node.value for node in nodes if node.value is not None]


def spans_of(prefix):
    """All spans that are stored."""
    return [span for span in all_spans(prefix) if span.payload is not None]


def check_accounts(server):
    """Nothing is counted wrongly, and no cell has gone astray."""
    prefix, stats = server.prefix, server.prefix.stats
    spans = spans_of(prefix)
    payloads = [span.payload.snapshot for span in spans]
    assert stats.nbytes == sum(span.nbytes for span in spans)
    assert stats.nbytes == sum(each.nbytes for each in payloads)
    assert stats.spans == len(spans)
    if not prefix._requests._active:
        assert stats.pinned == stats.active == 0
        assert not any(span.pins for span in all_spans(prefix))
    for number, cache in enumerate(getattr(server.model, "caches", [])):
        check_cells(cache, [each.parts[number + server.model.media].rows for each in payloads])


def check_cells(cache, rows):
    """Cells are held by sequences and what is stored, and by nobody else."""
    table, kept = peek.table(cache), peek.retained_rows(cache)
    holders = np.zeros(table.cells, int)
    for sequence in range(table.max_sequences):
        np.add.at(holders, table.cells_of(sequence), 1)
    for each in [*rows, *kept]:
        np.add.at(holders, each.slots, 1)
    np.testing.assert_array_equal(table.allocator.refcounts, holders)
    assert table.free + np.count_nonzero(holders) == table.cells


def check_nothing_left(server):
    """After clear() everything is free."""
    server.prefix.clear()
    assert server.prefix.stats.nbytes == server.prefix.stats.spans == 0
    parts = getattr(server.model.given, "caches", [server.model.given])
    for cache in parts:
        if isinstance(cache, RecurrentCache):
            assert not peek.state_rows(cache)
            assert not any(map(cache.holds_tokens, range(cache.max_sequences)))
    for cache in getattr(server.model, "caches", []):
        assert peek.table(cache).free == peek.table(cache).cells
        assert not peek.table(cache).allocator.refcounts.any()
        assert not peek.pinned_rows(cache)
        assert not peek.retained_rows(cache)
        assert not peek.unreached(cache)


MODELS = {
    "full": lambda backend: Pool(backend, {}),
    "window": lambda backend: Pool(backend, {"window": 4}),
    "window of one": lambda backend: Pool(backend, {"window": 1}),
    "memory": lambda backend: Pool(backend, {"window": 3, "memory": 6}),
    "chunk": lambda backend: Pool(backend, {"chunk": 4}),
    "window and chunk": lambda backend: Pool(backend, {"window": 3, "chunk": 4}),
    "layers of both": lambda backend: Pool(backend, {"window": 4}, {}),
    "encoder": lambda backend: Seeing(backend, {}),
    "encoder and window": lambda backend: Seeing(backend, {"window": 4}),
    "per-layer": lambda backend: Layers(backend, {}, {}),
    "rotating": lambda backend: Layers(backend, {"max_size": 5}, {"max_size": 5}),
    "sinks": lambda backend: Layers(backend, {"max_size": 6, "keep": 2}, {"max_size": 3}, {}),
    "recurrent": lambda backend: Layers(backend, RECURRENT),
    "hybrid": lambda backend: Layers(backend, RECURRENT, {}, {"max_size": 6, "keep": 2}, RECURRENT),
    "recurrent pool": lambda backend: Pool(backend, RECURRENT),
    "hybrid pool": lambda backend: Pool(backend, {}, {"window": 4}, RECURRENT),
}
FULL = {"full", "chunk", "encoder", "per-layer"}
"""Those that never drop a token: what is stored can be gone on from anywhere."""
SOME = ["full", "window", "window and chunk", "layers of both", "encoder", "sinks", "hybrid pool"]
"""Those that differ most, for where time is short."""
