"""Servers whose prefix caches have a store, for tests of tiers."""

import threading

import kvcache
from kvcache import KVCache, RotatingKVCache, StateCache
from kvcache.stores import Deadline, MemoryStore

from .served import MODELS, RECURRENT, Layers, Server

NUMPY = kvcache.get_backend("numpy")
PAGE = 4
"""Tokens of a page."""
FIRST, REPLY = [1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]
TURNED = [*FIRST, *REPLY]
LATER = Deadline.after(6000)
"""A deadline that no test waits for: what comes does not depend on the speed of the machine."""


class Restored(Layers):
    """Per-layer caches that name their backend, and can be filled from elsewhere."""

    def __init__(self, backend, *parts):
        super().__init__(backend, *parts)
        self.given = [named(cache, backend) for cache in self.given]


def named(cache, backend):
    if isinstance(cache, StateCache):
        return StateCache(backend)
    if isinstance(cache, RotatingKVCache):
        return RotatingKVCache(cache.max_size, cache.keep, backend)
    return KVCache(backend)


def model_of(name, backend):
    layers = {
        "per-layer": [{}, {}],
        "rotating": [{"max_size": 5}, {"max_size": 5}],
        "sinks": [{"max_size": 6, "keep": 2}, {"max_size": 3}, {}],
        "recurrent": [RECURRENT],
        "hybrid": [RECURRENT, {}, {"max_size": 6, "keep": 2}, RECURRENT],
    }
    return Restored(backend, *layers[name]) if name in layers else MODELS[name](backend)


class Stored(Server):
    """A server whose prefix cache has a store; all that it stores is there at once."""

    def __init__(self, model, store, **options):
        tiers = {"store": store, "namespace": "tiny", "page_tokens": PAGE}
        super().__init__(model, **tiers, **options)

    def begin(self, ids, salt="", **options):
        return super().begin(ids, salt, **{"deadline": LATER} | options)

    def finish(self, *arguments):
        super().finish(*arguments)
        assert self.prefix.flush(LATER)

    @property
    def counts(self):
        return self.prefix.stats.store


def stored_in(store, name="full", backend=NUMPY):
    """A store with one turn of a conversation."""
    server = Stored(model_of(name, backend), store)
    server.ask(FIRST, REPLY)
    return store


class Gate(MemoryStore):
    """Another store behind a gate that can be closed.

    broken: raise in every call. asked: called by each that comes.
    """

    def __init__(self, inner):
        super().__init__()
        self.inner, self.broken, self.opened = inner, False, threading.Event()
        self.opened.set()
        self.asked = None

    def _ask(self, name, asked, deadline):
        if self.asked is not None:
            self.asked()
        self.opened.wait()
        if self.broken:
            raise ConnectionError("no server")
        return getattr(self.inner, name)(asked)

    def _get(self, keys, deadline):
        return self._ask("get", keys, deadline)

    def _put(self, items, deadline):
        return self._ask("put", items, deadline)

    def _contains(self, keys, deadline):
        return self._ask("contains", keys, deadline)
