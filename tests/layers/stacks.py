"""Several layers of all kinds over one batch, whose tokens are one number each."""

from __future__ import annotations

import numpy as np

from kvcache import KVCache, LayerCaches, RotatingKVCache, StateCache

from .rows import arrays, host


def stack_of(backend):
    """A growing, a rotating and a recurrent layer, and one that shares the ring."""
    ring = RotatingKVCache(6, 2, backend, step=4)
    return LayerCaches([KVCache(backend, step=4), ring, StateCache(backend), ring])


def state_of(backend, numbers):
    """The state behind tokens, one of each row: arrays of two shapes and dtypes."""
    column = np.asarray(numbers, np.float32)[:, None]
    pair = column * [1, 2], np.repeat(-column[:, None], 3, axis=2)
    return [backend.from_host(array.astype(dtype)) for array, dtype in zip(pair, "fi", strict=True)]


def update_all(caches, numbers, recording=False):
    """Bring tokens ``[B, L]`` to all layers."""
    grown, ring, state, _ = caches
    if recording:
        record_all(state, numbers)
    for cache in (grown, ring):
        cache.update(*arrays(cache, numbers))
    state.advance(numbers.shape[1], *state_of(state.backend, numbers[:, -1]))


def record_all(state, numbers):
    """Record the state at every cut of an update, which is yet to come."""
    start = state.offset
    for cut in state.cuts(numbers.shape[1]):
        state.record(cut, *state_of(state.backend, numbers[:, cut - start - 1]))


def check_state(state, numbers):
    """The cache has the state behind these tokens, one of each row."""
    backend = state.backend
    for array, expected in zip(state.state, state_of(backend, numbers), strict=True):
        np.testing.assert_array_equal(backend.to_host(array), backend.to_host(expected))


def filled(backend, rows=3, tokens=8, padding=()):
    caches = stack_of(backend)
    caches.pad(padding)
    caches.schedule([tokens - 2])
    update_all(caches, 1 + np.arange(rows * tokens).reshape(rows, tokens), recording=True)
    return caches


def held_by(caches):
    """The number of the token at the end of each row, in each layer."""
    keys = [host(cache, cache.state[0])[:, -1].tolist() for cache in caches[:2]]
    return [*keys, caches[2].backend.to_host(caches[2].state[0])[:, 0].tolist()]
