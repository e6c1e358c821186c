"""A small model with caches of its own, which are right, and can be broken in one place each.

Every token is computed by itself, so that logits are the same bit for bit in passes of any size.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from kvcache.verify import Ability, Conversation, Target, Trial

VOCAB, WIDTH, DIM, WINDOW, KEEP, SLACK, PAGE = 24, 12, 8, 6, 2, 4, 4
FULL, RING, RECURRENT = "full", "ring", "recurrent"
DECAY = np.float32(0.9)
ANGLES = np.outer(np.arange(-50, 200), 1.5 ** -np.arange(DIM // 2))
COS, SIN = np.cos(ANGLES).astype(np.float32), np.sin(ANGLES).astype(np.float32)


class Weights:
    """Random weights; `keep` tokens at the beginning are seen by every token of a ring."""

    def __init__(self, kinds, keep=0, seed=0):
        rng = np.random.default_rng(seed)

        def matrix(rows, columns):
            return rng.normal(scale=1.5 * columns**-0.5, size=(rows, columns)).astype(np.float32)

        self.kinds, self.keep = kinds, keep
        self.embedding = matrix(VOCAB, WIDTH)
        self.layers = [
            (matrix(DIM, WIDTH), matrix(DIM, WIDTH), matrix(DIM, WIDTH), matrix(WIDTH, DIM))
            for _ in kinds
        ]
        self.head = matrix(VOCAB, WIDTH)


def rotated(vector, position):
    cos, sin = COS[position + 50], SIN[position + 50]
    a, b = vector[: DIM // 2], vector[DIM // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin])


def projected(layer, x, position):
    queries, keys, values, _ = layer
    return rotated(queries @ x, position), rotated(keys @ x, position), values @ x


def attended(query, keys, values):
    scores = np.array(keys) @ query
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()) @ np.array(values)


def advanced(state, key, value):
    return DECAY * state + np.outer(key, value)


def added(layer, x, out):
    return np.tanh(x + layer[3] @ out)


def reference(weights, ids):
    """Logits and hidden states without a cache."""
    hidden, behind = [weights.embedding[token] for token in ids], []
    for kind, layer in zip(weights.kinds, weights.layers, strict=True):
        parts = [projected(layer, x, position) for position, x in enumerate(hidden)]
        state, outputs = np.zeros((DIM, DIM), np.float32), []
        for at, (query, key, value) in enumerate(parts):
            state = advanced(state, key, value)
            if kind == RECURRENT:
                outputs.append(query @ state)
                continue
            seen = range(at + 1)
            if kind == RING:
                seen = [p for p in seen if p < weights.keep or p > at - WINDOW]
            outputs.append(
                attended(query, [parts[p][1] for p in seen], [parts[p][2] for p in seen])
            )
        hidden = [added(layer, x, out) for x, out in zip(hidden, outputs, strict=True)]
        behind.append(np.array(hidden))
    return np.array([weights.head @ x for x in hidden]), behind


@dataclass
class Full:
    """Keys and values of all tokens."""

    rows: list = field(default_factory=list)

    def add(self, position, key, value):
        del self.rows[position:]
        self.rows.append((key, value))

    def seen(self, position, chunked):
        return self.rows

    def can_trim(self, offset, count):
        return True

    def trim(self, length):
        del self.rows[length:]

    def copy(self):
        return Full(list(self.rows))


@dataclass
class Ring:
    """Sinks, and slots that are used in turn; some more than the window, so as to go back."""

    keep: int
    window: int = WINDOW
    sinks: list = field(default_factory=list)
    slots: list = field(default_factory=lambda: [None] * (WINDOW + SLACK))
    high: int = -1

    def add(self, position, key, value):
        self.high = max(self.high, position)
        if position < self.keep:
            del self.sinks[position:]
            self.sinks.append((key, value))
        self.slots[position % len(self.slots)] = key, value

    def seen(self, position, chunked):
        first = max(position - self.window + 1, min(self.keep, position + 1))
        return self.sinks + [self.slots[p % len(self.slots)] for p in range(first, position + 1)]

    def can_trim(self, offset, count):
        return offset - count - WINDOW + 1 > self.high - len(self.slots)

    def trim(self, length):
        del self.sinks[length:]

    def copy(self):
        return type(self)(self.keep, self.window, list(self.sinks), list(self.slots), self.high)


@dataclass
class Recurrent:
    """A state."""

    state: np.ndarray = field(default_factory=lambda: np.zeros((DIM, DIM), np.float32))

    def add(self, position, key, value):
        self.state = advanced(self.state, key, value)

    def can_trim(self, offset, count):
        return count == 0

    def trim(self, length):
        """Done by putting a copy back."""

    def copy(self):
        return Recurrent(self.state)


class Tiny(Target):
    """The target. Faults override its methods."""

    vocab_size, max_tokens, tiers = VOCAB, 40, ("device", "host", "store")
    abilities = frozenset(Ability)

    def __init__(self, kinds=(FULL, RING), keep=0):
        self.weights = Weights(kinds, keep)
        self.name = f"tiny {', '.join(kinds)}" + f" and {keep} sinks" * bool(keep)
        self.edges = (WINDOW, PAGE)
        self.recorded = None
        if RECURRENT in kinds:
            self.abilities -= {Ability.TRIM}

    def trial(self):
        return TinyTrial(self)

    def reference(self, ids):
        logits, hidden = reference(self.weights, ids)
        if self.recorded is not None:
            self.recorded += hidden
        return logits

    @contextmanager
    def layers(self):
        self.recorded = []
        try:
            yield self.recorded
        finally:
            self.recorded = None

    # What faults change.

    def ring(self):
        return Ring(self.weights.keep)

    def visible(self, cache, position, chunked):
        return cache.seen(position, chunked)

    def shift(self, length):
        """Of positions, after `length` tokens were restored."""
        return 0

    def stored(self, caches, before):
        """Layers as they are stored at the end of a page, and as they were one token before."""
        return [cache.copy() for cache in caches]

    def restored(self, caches):
        return [cache.copy() for cache in caches]

    def key(self, tenant, ids, page):
        """Of the page that ends behind `ids`."""
        return tenant, tuple(ids)

    def undone(self, caches, copies):
        """Layers after a cancelled pass."""
        return copies

    def join(self, conversations):
        """Before a pass of several conversations."""

    def spilled(self, caches):
        return [cache.copy() for cache in caches]

    def fetched(self, store, key):
        """The page under a key of the store; None if there is none."""
        return store.get(key)


class TinyTrial(Trial):
    """Pages by key. A page is the state of all layers behind it: at its size, that is cheap."""

    def __init__(self, target):
        self.target, self.device, self.host, self.store = target, {}, {}, {}

    def begin(self, ids, tenant=0):
        target, conversation = self.target, TinyConversation(self, tenant)
        for stop in range(PAGE, len(ids), PAGE):
            key = target.key(tenant, ids[:stop], ids[stop - PAGE : stop])
            page = self.device.get(key) or self.host.get(key) or target.fetched(self.store, key)
            if page is None:
                break
            conversation.ids = list(ids[:stop])
            conversation.caches = target.restored(page)
            conversation.shift = target.shift(stop)
        conversation.held_at_first = len(conversation.ids)
        return conversation

    def together(self, rows):
        self.target.join([row for row, _ in rows])
        return [row.forward(ids) for row, ids in rows]

    def evict(self, tier):
        if tier != "store":
            self.host |= {key: self.target.spilled(page) for key, page in self.device.items()}
            self.device = {}
        if tier == "host":
            self.store |= self.host
            self.host = {}
        elif tier == "store":
            self.store = {}


class TinyConversation(Conversation):
    def __init__(self, trial, tenant):
        self.trial, self.target, self.tenant = trial, trial.target, tenant
        make = {FULL: Full, RING: self.target.ring, RECURRENT: Recurrent}
        self.caches = [make[kind]() for kind in self.target.weights.kinds]
        self.ids, self.shift, self.held_at_first = [], 0, 0
        self.pages = {}

    @property
    def held(self):
        return self.held_at_first

    def forward(self, ids):
        # In pieces that end with a page, or one token before, as the states are stored there.
        outputs, ids = [], list(ids)
        chunked = len(ids) > 1 and self.ids
        while ids:
            size = PAGE - 1 - len(self.ids) % PAGE or 1
            before = [cache.copy() for cache in self.caches]
            outputs += self.run(ids[:size], chunked)
            ids = ids[size:]
            if len(self.ids) % PAGE == 0:
                key = self.target.key(self.tenant, self.ids, self.ids[-PAGE:])
                self.pages[key] = self.target.stored(self.caches, before)
        if self.target.recorded is not None:
            self.target.recorded[:] = map(np.concatenate, zip(*self.target.recorded, strict=True))
        return np.array(outputs)

    def run(self, ids, chunked, layers=9):
        weights, start = self.target.weights, len(self.ids)
        hidden, behind = [weights.embedding[token] for token in ids], []
        for kind, layer, cache in list(
            zip(weights.kinds, weights.layers, self.caches, strict=True)
        )[:layers]:
            for at, x in enumerate(hidden):
                query, key, value = projected(layer, x, start + at + self.shift)
                cache.add(start + at, key, value)
                if kind == RECURRENT:
                    out = query @ cache.state
                else:
                    rows = self.target.visible(cache, start + at, chunked)
                    out = attended(query, *zip(*rows, strict=True))
                hidden[at] = added(layer, x, out)
            behind.append(np.array(hidden))
        if layers >= len(weights.kinds):
            self.ids += ids
            if self.target.recorded is not None:
                self.target.recorded.append(behind)
        return [weights.head @ x for x in hidden]

    def can_trim(self, count):
        return all(cache.can_trim(len(self.ids), count) for cache in self.caches)

    def trim(self, count):
        del self.ids[len(self.ids) - count :]
        for cache in self.caches:
            cache.trim(len(self.ids))

    def draft(self, ids, accepted):
        copies, before = [cache.copy() for cache in self.caches], list(self.ids)
        logits = self.forward(ids)
        self.caches, self.ids = copies, before
        if accepted:
            recorded, self.target.recorded = self.target.recorded, None
            self.forward(ids[:accepted])
            self.target.recorded = recorded
        return logits

    def fork(self):
        other = TinyConversation(self.trial, self.tenant)
        other.caches = [cache.copy() for cache in self.caches]
        other.ids, other.shift, other.pages = list(self.ids), self.shift, dict(self.pages)
        return other

    def cancel(self, ids, layer):
        copies = [cache.copy() for cache in self.caches]
        self.run(list(ids), True, layer)
        self.ids = self.ids[: len(self.ids) - (len(ids) if layer >= len(self.caches) else 0)]
        self.caches = self.target.undone(self.caches, copies)

    def end(self, store):
        if store:
            self.trial.device = self.pages | self.trial.device
