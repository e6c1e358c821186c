"""Multi-sequence caches to make scenarios of: passes, later calls, and states.

Every pass has the same tokens in two layers, of which the second holds keys only. A key is the
stamp of its token and its position, which a shift adds its offsets to.
"""

from __future__ import annotations

import numpy as np
import pytest

from kvcache import (
    Batch,
    CausalCache,
    EncoderCache,
    WrapperCache,
    functional,
)

from .. import peek
from .observation import attempt, attended, look_at_pool, parts
from .scenario import World

LAYERS = 2
SEQUENCES = 3
FRAMES = 2
"""Frames of each image."""


class PoolWorld(World):
    """One multi-sequence cache. sizes: given to `init`."""

    def __init__(self, place, *caches, capacity=6, max_batch=6, dtype="float32"):
        super().__init__(place)
        self.cache = caches[0] if len(caches) == 1 else WrapperCache(*caches)
        self.dtype = dtype
        self.sizes = {
            "max_sequences": SEQUENCES,
            "capacity": capacity,
            "max_batch": max_batch,
        }

    def initialised(self):
        self.cache.init(self.backend, self.dtype, **self.sizes)
        return self

    # Passes.

    def batch(self, tokens):
        """Return a batch, and the keys and values of its tokens. tokens: positions by sequence."""
        pairs = [(sequence, position) for sequence in tokens for position in tokens[sequence]]
        sequences, positions = zip(*pairs, strict=True)
        stamps = self.stamps(len(pairs))
        keys = np.array([stamps, positions], np.float32).T[None]
        values = -np.array(stamps, np.float32)[None, :, None]
        first = [sequences.index(sequence) for sequence in tokens]
        encoders = any(isinstance(cache, EncoderCache) for cache in parts(self.cache))
        images = [index for index in first if positions[index] == 0] if encoders else []
        frames = np.repeat(np.array(stamps, np.float32)[images], FRAMES)[None, :, None]
        return (
            Batch(positions, sequences, images),
            (self.array(keys, self.dtype), self.array(values, self.dtype)),
            (self.array(frames, self.dtype), self.array(-frames, self.dtype)) if images else None,
        )

    def layers(self):
        """Yield the number of each layer, with its cache chosen in a wrapper."""
        for index, cache in enumerate(parts(self.cache)):
            if isinstance(self.cache, WrapperCache):
                self.cache.set_layer_type(index)
            for layer in range(LAYERS):
                self.cache.set_layer(layer)
                yield cache, layer

    def put(self, arrays, frames):
        """Put one layer of a pass, chosen before."""
        cache = getattr(self.cache, "underlying_cache", self.cache)
        if not isinstance(cache, EncoderCache):
            self.cache.put(*arrays)
        elif frames is not None:
            self.cache.put(*frames, frames=[FRAMES] * (frames[0].shape[1] // FRAMES))

    def run(self, tokens):
        """Make a pass with new tokens; observe the attention of each layer."""
        batch, arrays, frames = self.batch(tokens)
        self.cache.start_forward(batch)
        return self.fill(arrays, frames)

    def fill(self, arrays, frames):
        """Put and get all layers of the pass under way."""
        seen = []
        for _, layer in self.layers():
            self.put(arrays if layer == 0 else arrays[:1], frames)
            seen.append(attempt(attended, self.backend, self.cache))
        return seen

    # Observations.

    def look_at_caches(self):
        return look_at_pool(self.cache)

    def orphans(self):
        known = {id(rows) for rows in self.known_rows()}
        return sum(
            id(rows) not in known
            for cache in parts(self.cache)
            if isinstance(cache, CausalCache)
            for rows in _rows_of(cache)
        )


def _rows_of(cache):
    """Return the rows pinned in a causal cache, except those that it retains itself."""
    pinned = attempt(peek.pinned_rows, cache)
    if isinstance(pinned, str):
        return []  # not initialised, or closed
    retained = {id(rows) for rows in peek.retained_rows(cache)}
    return [rows for rows in pinned if id(rows) not in retained]


def _shift(backend):
    def shift(layer, keys, offsets):
        moved = backend.to_host(keys).copy()
        moved[..., 1] += backend.to_host(offsets)
        return backend.from_host(moved)

    return shift


# Later calls.


def goes_on(world):
    """Go on with every kind of call, and observe each."""
    cache = world.cache
    nexts = [attempt(cache.next_position, sequence) for sequence in range(SEQUENCES)]
    if isinstance(nexts[0], str):
        return {"error": nexts, "init": attempt(_used, world)}
    seen = {"under way": [attempt(_got, world)]}
    for sequence in range(SEQUENCES):
        seen[f"token {sequence}"] = attempt(world.run, {sequence: [nexts[sequence]]})
    pair = {0: following(cache, 0, 2), 1: following(cache, 1, 1)}
    seen["tokens"] = attempt(world.run, pair)
    seen["plan"] = attempt(_planned, world, 0)
    seen["state"] = world.look()
    seen["removed"] = [attempt(cache.remove, 0, 1, 2), attempt(cache.remove, 2, 0)]
    seen["copied"] = attempt(cache.copy_prefix, 0, 1, 3)
    seen["after"] = world.look()
    seen["restored"] = [_restored(world, snapshot) for snapshot in world.snapshots.values()]
    seen["room"] = _fill_up(world)
    seen["end"] = _end(world)
    return seen


def gives_up(world):
    """Undo the pass under way, and go on."""
    return {"abort": attempt(world.cache.abort), "later": goes_on(world)}


def following(cache, sequence, count):
    start = attempt(cache.next_position, sequence)
    return range(start, start + count)


def _used(world):
    """Initialise a cache that was not, and use it."""
    world.initialised()
    return [world.run({0: range(3)}), world.look()]


def _got(world):
    [*_] = world.layers()
    return attended(world.backend, world.cache)


def _planned(world, sequence):
    """Observe a pass made by a program."""
    cache = world.cache
    if not isinstance(cache, CausalCache):
        return None
    batch, arrays, _ = world.batch({sequence: following(cache, sequence, 1)})
    world.plan = cache.plan(batch)
    return by_program(world, arrays)


def by_program(world, arrays):
    """Apply the plan of this world to the buffers, as a program does; observe its attention."""
    state, seen = world.cache.program_state, []
    for layer in range(LAYERS):
        pair = arrays if layer == 0 else arrays[:1]
        state = functional.put(state, world.plan, layer, *pair)
        seen.append(Got(functional.get(state, world.plan, layer)))
    world.cache.program_state = state
    return [attended(world.backend, got) for got in seen]


class Got:
    """The result of a get, as a cache that was asked already."""

    def __init__(self, result):
        self._result = result

    def get(self):
        return self._result


def _restored(world, snapshot):
    cache = world.cache
    errors = [attempt(cache.remove, 2, 0), attempt(cache.restore, 2, snapshot)]
    token = attempt(world.run, {2: following(cache, 2, 1)})
    return [errors, token, look_at_pool(cache)]


def _fill_up(world):
    """Add tokens to sequence 1 until none fits; return their number, or the error."""
    for count in range(100):
        error = attempt(world.run, {1: following(world.cache, 1, 1)})
        if isinstance(error, str):
            return count, error.partition(":")[0]
        if count > 2 * SEQUENCES * world.sizes["capacity"]:
            return "no end"
    return None


def _end(world):
    """Close and remove everything; no cell may be in use then, and a new pass is as the first."""
    errors = [attempt(snapshot.close) for snapshot in world.snapshots.values()]
    errors += [attempt(world.cache.remove, sequence, 0) for sequence in range(SEQUENCES)]
    causal = [cache for cache in parts(world.cache) if isinstance(cache, CausalCache)]
    left = [attempt(lambda cache=cache: cache.cells - peek.table(cache).free) for cache in causal]
    run = attempt(world.run, {0: range(3), 1: range(2)})
    return [errors, left, run, attempt(world.cache.close), look_at_pool(world.cache)]


# States.


def _new(place):
    return PoolWorld(place, CausalCache()).initialised()


def _uninitialised(place):
    return PoolWorld(place, CausalCache())


def _plain(place, dtype="float32"):
    """Fill two sequences with a common prefix, and keep a snapshot of one in its cells."""
    if dtype not in place.backend.dtypes:
        pytest.skip(f"{place.backend.name} has no {dtype}")
    world = PoolWorld(place, CausalCache(shift=_shift(place.backend)), dtype=dtype).initialised()
    world.run({0: range(4)})
    world.cache.copy_prefix(0, 1, 2)
    world.run({1: [2]})
    world.run({0: [4], 1: [3]})
    return held(world, 0)


def held(world, sequence, name="held"):
    world.snapshots[name] = world.cache.snapshot(sequence)
    return world


def _crowded(place):
    """Leave no cell free but those that only snapshots hold."""
    world = PoolWorld(place, CausalCache(), capacity=4).initialised()
    world.run({0: range(4)})
    held(world, 0)
    world.cache.remove(0, 0)
    world.run({1: range(4)})
    held(world, 1, "second")
    world.cache.remove(1, 0)
    world.run({2: range(4)})
    return world


def _windowed(place):
    """Fill sequences to where the next token drops others, with resume points at hand."""
    world = PoolWorld(place, CausalCache(window=3, memory=4), capacity=10).initialised()
    world.run({0: range(5), 1: [0]})
    world.cache.schedule(0, [5, 6, 8])
    world.run({0: [5], 1: [1]})
    world.run({0: [6]})
    held(world, 0)
    return world


def _paged(place):
    """Share a page that is partly filled, with moved keys in it: who goes on second copies it."""
    cache = CausalCache(page=2, shift=_shift(place.backend))
    world = PoolWorld(place, cache, capacity=8).initialised()
    world.run({0: range(7)})
    world.cache.remove(0, 0, 2)
    world.cache.copy_prefix(0, 1, 5)
    held(world, 0)
    return world


def _one_window(place):
    """Prepare the fast path of a single sequence that drops a token for each."""
    world = PoolWorld(place, CausalCache(window=3), capacity=10).initialised()
    world.run({0: range(5)})
    world.run({0: [5]})
    return world


def _scattered(place):
    """Leave free cells here and there."""
    world = PoolWorld(place, CausalCache(shift=_shift(place.backend)), capacity=4).initialised()
    for position in range(4):
        world.run({0: [position], 1: [position], 2: [position]})
    held(world, 2)
    world.cache.remove(1, 0)
    return world


def _arriving(place):
    """Restore rows from the host that no pass has written yet."""
    world = _plain(place)
    snapshot = world.cache.snapshot(1).to_host()
    world.cache.restore(2, snapshot)
    world.snapshots["arriving"] = snapshot
    return world


def _wrapped(place):
    world = PoolWorld(
        place,
        CausalCache(window=3),
        CausalCache(shift=_shift(place.backend)),
        EncoderCache(),
        capacity=7,
    ).initialised()
    world.run({0: range(3)})
    world.cache.schedule(0, [4, 6])
    world.run({0: [3], 1: range(3)})
    return held(world, 0)


def _shifting(place):
    """Wrap two caches that shift."""
    world = PoolWorld(
        place,
        CausalCache(shift=_shift(place.backend)),
        CausalCache(shift=_shift(place.backend)),
    ).initialised()
    world.run({0: range(6)})
    return held(world, 0)


def _encoder(place):
    world = PoolWorld(place, EncoderCache()).initialised()
    world.run({0: range(2), 1: range(2)})
    return held(world, 0)


STATES = {
    "uninitialised": _uninitialised,
    "new": _new,
    "plain": _plain,
    "crowded": _crowded,
    "windowed": _windowed,
    "paged": _paged,
    "one window": _one_window,
    "scattered": _scattered,
    "arriving": _arriving,
    "wrapper": _wrapped,
    "shifting wrapper": _shifting,
    "encoder": _encoder,
    "bfloat16": lambda place: _plain(place, "bfloat16"),
    "new wrapper": lambda place: PoolWorld(place, CausalCache(), EncoderCache(), CausalCache()),
}
