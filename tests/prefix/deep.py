"""A model of two layers whose second layer tells all that a token was computed from.

A key of the first layer is ``[token, position]``. A key of the second is a checksum of the keys
that the token attends to in the first. So a key computed after a token was removed differs from
that of a cold run, as it does in a transformer.

The first layer of a hybrid is recurrent: its state is such a checksum of all tokens so far, in
their order, and the key of the second.
"""

import numpy as np

from kvcache import (
    Batch,
    CausalCache,
    KVCache,
    RecurrentCache,
    RotatingKVCache,
    StateCache,
    WrapperCache,
)
from kvcache.prefix import PrefixCache

PRIME = 8191  # products of two such numbers are exact in float32 arithmetic on the host


def checksum(rows):
    """A number for the rows ``[token, position]`` in any order."""
    return sum(int((token + 3) * (2 * place + 5) ** 2 % PRIME) for token, place in rows) % PRIME


def states_behind(before, ids, start):
    """The states behind each token of ``ids[start:]``, by position, from that behind `start`."""
    states = {start: before}
    for place in range(start, len(ids)):
        states[place + 1] = (states[place] * 31 + ids[place] + 3) % PRIME
    return states


def as_keys(states, start):
    """The keys of the second layer of a hybrid: the states behind each token from `start` on."""
    return [(states[place], 0) for place in sorted(states) if place > start]


def as_array(state):
    return np.array([[state]], np.float32)


def add_positions(layer, keys, offsets):
    """The shift of these keys: positions move, checksums stay."""
    if layer:
        return keys
    moved = np.array(keys)
    moved[..., 1] += offsets
    return moved


class DeepPool:
    """The model over a pool. limits: of its causal cache."""

    def __init__(self, max_sequences=3, max_batch=30, **limits):
        self.cache = CausalCache(shift=add_positions, **limits)
        self.cache.init("numpy", max_sequences=max_sequences, capacity=60, max_batch=max_batch)
        self.given, self.limits = self.cache, limits

    def cold(self):
        """The same model, with nothing in it."""
        return DeepPool(1, **self.limits)

    def place(self, session):
        """What :meth:`run` computes on: the sequence of a session, or the only one."""
        return 0 if session is None else session.sequence

    def run(self, sequence, ids, start, layers=2, ahead=()):
        """A pass of ``ids[start:]``; returns what the last token attends to in the last layer."""
        count = len(ids) - start
        self.cache.start_forward(Batch(range(start, len(ids)), [sequence] * count))
        self.cache.set_causal(ahead)
        keys = np.array([[(ids[p], p) for p in range(start, len(ids))]], np.float32)
        for layer in range(layers):
            self.cache.set_layer(layer)
            self.cache.put(keys, keys)
            found, _, mask = self.cache.get()
            seen = [found[0][line].tolist() for line in np.asarray(mask)]
            keys = np.array([[(checksum(rows), 0) for rows in seen]], np.float32)
        return sorted(map(tuple, seen[-1]))


class DeepLayers:
    """The model over per-layer caches of each session's own, full ones or rings."""

    def __init__(self, max_size=None):
        self.max_size = max_size
        self.given = [self._make(), self._make()]

    def _make(self):
        return (
            KVCache("numpy")
            if self.max_size is None
            else RotatingKVCache(self.max_size, keep=1, backend="numpy")
        )

    def cold(self):
        return DeepLayers(self.max_size)

    def place(self, session):
        return self.given if session is None else session.caches

    def run(self, caches, ids, start):
        """An update of ``ids[start:]``; returns what the last token attends to in layer 1."""
        keys = np.array([[[(ids[p], p) for p in range(start, len(ids))]]], np.float32)
        count = len(ids) - start
        for cache in caches:
            found, _ = cache.update(keys, keys)
            mask = cache.mask(count)
            allowed = np.broadcast_to(cache.positions >= 0, (count, cache.positions.size))
            seen = [found[0, 0][line].tolist() for line in (allowed if mask is None else mask)]
            keys = np.array([[[(checksum(rows), 0) for rows in seen]]], np.float32)
        return sorted(map(tuple, seen[-1]))


class DeepHybridLayers(DeepLayers):
    """The hybrid over per-layer caches of each session's own."""

    def __init__(self, max_size=None):
        super().__init__(max_size)
        self.given[0] = StateCache("numpy")

    def cold(self):
        return DeepHybridLayers(self.max_size)

    def run(self, caches, ids, start):
        recurrent, attention = caches
        before = int(recurrent.state[0][0, 0]) if recurrent.state else 0
        count, states = len(ids) - start, states_behind(before, ids, start)
        for place in recurrent.cuts(count):
            recurrent.record(place, as_array(states[place]))
        recurrent.advance(count, as_array(states[len(ids)]))
        keys = np.array([[as_keys(states, start)]], np.float32)
        found, _ = attention.update(keys, keys)
        mask = attention.mask(count)
        allowed = attention.positions >= 0 if mask is None else mask[-1]
        return sorted(map(tuple, found[0, 0][allowed].tolist()))


class DeepHybridPool(DeepPool):
    """The hybrid over a pool."""

    def __init__(self, max_sequences=3, max_batch=30, **limits):
        self.cache = WrapperCache(RecurrentCache(), CausalCache(**limits))
        self.cache.init("numpy", max_sequences=max_sequences, capacity=60, max_batch=max_batch)
        self.given, self.limits = self.cache, limits

    def cold(self):
        return DeepHybridPool(1, **self.limits)

    def run(self, sequence, ids, start, layers=2, ahead=()):
        count = len(ids) - start
        self.cache.start_forward(Batch(range(start, len(ids)), [sequence] * count))
        self.cache.set_layer(0)
        self.cache.set_layer_type(0)
        held = self.cache.get_states()
        states = states_behind(0 if held is None else int(held[0][0, 0]), ids, start)
        cuts = {(sequence, place): [as_array(states[place])] for place in self.cache.runs[0].cuts}
        self.cache.put_states(as_array(states[len(ids)]), kept=cuts)
        if layers == 1:
            return []
        self.cache.set_layer_type(1)
        keys = np.array([as_keys(states, start)], np.float32)
        self.cache.put(keys, keys)
        found, _, mask = self.cache.get()
        return sorted(map(tuple, found[0][np.asarray(mask)[-1]].tolist()))


class Deep:
    """A prefix cache over such a model; each answer is compared with that of a cold run."""

    def __init__(self, model, **options):
        self.model = model
        self.prefix = PrefixCache(model.given, **({"budget": None} | options))

    def ask(self, ids, **options):
        """Serve a prompt; return the tokens that were found. It computes what a cold run does."""
        with self.prefix.session(ids, **options) as session:
            place = self.model.place(session)
            answer = self.model.run(place, ids, session.matched)
        cold = self.model.cold()
        steps = [cold.run(cold.place(None), ids[: n + 1], n) for n in range(len(ids))]
        assert answer == steps[-1], (session.matched, ids)
        return session.matched

    def begin(self, ids, **options):
        """A session whose prompt was computed."""
        session = self.prefix.session(ids, **options)
        self.model.run(self.model.place(session), ids, session.matched)
        return session

    def go_on(self, session, ids, start):
        """Compute ``ids[start:]`` in a session."""
        return self.model.run(self.model.place(session), ids, start)
