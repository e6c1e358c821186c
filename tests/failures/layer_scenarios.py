"""Scenarios of per-layer caches and of snapshots."""

from __future__ import annotations

import numpy as np

from kvcache import KVCache, LayerCaches, RotatingKVCache, StateCache, backend_of, functional

from .. import peek
from .observation import attempt, columns, look_at_layers
from .scenario import Act, Scenario, World


class LayerWorld(World):
    """Per-layer caches. dtype: of all keys and values. rows: of the batch, before the first one."""

    dtype = "float32"

    def __init__(self, place, *caches, rows=1):
        super().__init__(place)
        self.caches = LayerCaches(caches)
        self.rows = rows

    @property
    def cache(self):
        return self.caches[0]

    def tokens(self, count):
        """Return keys and values of `count` new tokens for each layer; a key is its stamp."""
        rows = self.cache.rows or self.rows
        stamps = np.array(self.stamps(count), np.float32)[None, None, :, None]
        stamps = stamps + np.arange(rows)[:, None, None, None] / 16
        return [
            (
                self.array(np.broadcast_to(stamps + layer / 2, (rows, 2, count, 2)), self.dtype),
                self.array(np.broadcast_to(-stamps - layer / 2, (rows, 2, count, 1)), self.dtype),
            )
            for layer in range(len(self.caches))
        ]

    def feed(self, *counts):
        """Update all layers several times; observe each result."""
        return [
            [
                attempt(_update, cache, pair)
                for cache, pair in zip(self.caches, self.tokens(count), strict=True)
            ]
            for count in counts
        ]

    def look_at_caches(self):
        return look_at_layers(self.caches)

    def orphans(self):
        known = {id(rows) for rows in self.known_rows()}
        known |= {id(peek.layer_retained(cache)) for cache in self.caches}
        pinned = [rows for cache in self.caches for rows in peek.layer_pins(cache)]
        return len([rows for rows in pinned if id(rows) not in known])


def _update(cache, pair):
    if not isinstance(cache, StateCache):
        return columns(cache, cache.update(*pair))
    tokens, start = pair[0].shape[2], cache.offset
    for position in cache.cuts(tokens):
        cache.record(position, *state_behind(pair, position - start))
    cache.advance(tokens, *state_behind(pair, tokens))
    return None


def state_behind(pair, tokens):
    """Return the state behind the first tokens of an update: the keys and values of the last."""
    return [backend_of(array).slice(array, tokens - 1, tokens, 2) for array in pair]


# Later calls.


def goes_on(world):
    """Go on with every kind of call, and observe each."""
    caches = world.caches
    seen = {"updates": world.feed(1, 3)}
    seen["trim"] = attempt(caches.trim, 1)
    seen["checkpoint"] = attempt(caches.checkpoint)
    seen["drafts"] = world.feed(1, 3)
    seen["rollback"] = attempt(caches.rollback, 2)
    seen["rolled back"] = world.look()
    copies = attempt(caches.copy)
    seen["turned"] = world.feed(9)
    seen["copies"] = attempt(look_at_layers, copies)
    seen["restored"] = [_restored(world, snapshot) for snapshot in world.snapshots.values()]
    seen["end"] = _end(world)
    return seen


def _restored(world, snapshot):
    caches = LayerCaches(type(cache).make(world.backend, cache.options) for cache in world.caches)
    error = attempt(caches.restore, snapshot, backend=world.backend)
    return [error, look_at_layers(caches)]


def _end(world):
    """Close and reset everything, and begin anew."""
    errors = [attempt(snapshot.close) for snapshot in world.snapshots.values()]
    errors.append(attempt(world.caches.reset))
    left = [len(peek.layer_pins(cache)) for cache in world.caches]
    return [errors, left, world.caches.nbytes, world.feed(2), look_at_layers(world.caches)]


def rolls_back(accepted):
    """Return later calls that begin with a rollback."""

    def later(world):
        error = attempt(world.caches.rollback, accepted)
        return {"rollback": error, "state": world.look(), "later": goes_on(world)}

    return later


# States.

STEP = 4
PADDING = [0, 2, 1]
RING = {"max_size": 6, "keep": 2, "step": STEP}


def _growing(place, *counts, backend=True, rows=1, padding=()):
    world = LayerWorld(place, KVCache(place.backend if backend else None, step=STEP), rows=rows)
    world.caches.pad(padding)
    world.feed(*counts)
    return world


def _ring(place, *counts, rows=1, padding=(), points=()):
    world = LayerWorld(place, RotatingKVCache(**RING, backend=place.backend), rows=rows)
    world.caches.pad(padding)
    world.caches.schedule(points)
    world.feed(*counts)
    return world


def _stack(place, *counts):
    world = LayerWorld(
        place,
        KVCache(place.backend, step=STEP),
        RotatingKVCache(**RING, backend=place.backend),
        RotatingKVCache(5, backend=place.backend, step=STEP),
    )
    world.feed(*counts)
    return world


def _held(world, name="held", start=0, stop=None):
    """Take a snapshot that stays resident while it can."""
    world.snapshots[name] = world.caches.snapshot(start, stop)
    return world


def _with_checkpoint(world, *counts, points=()):
    """Open a checkpoint after scheduling `points`, and go on by some updates."""
    world.caches.schedule(points)
    world.caches.checkpoint()
    world.feed(*counts)
    return world


def _bits(place):
    world = LayerWorld(place, KVCache(place.backend, step=STEP))
    world.dtype = "bfloat16"
    world.feed(3)
    return world


def _in_pieces(place, host=False):
    """Make adjacent snapshots, and one of other rows of the same span."""
    world = _stack(place, 3, 2)
    _held(world, "lower", 0, 3)
    _held(world, "upper", 3, 5)
    _held(world, "whole")
    if host:
        world.snapshots["upper"].to_host()
    return world


STATES = {
    "unbound": lambda place: _growing(place, backend=False),
    "empty": _growing,
    "growing": lambda place: _held(_growing(place, 2)),
    "full": lambda place: _held(_growing(place, 4)),
    "growing checkpoint": lambda place: _held(_with_checkpoint(_growing(place, 3), 1, 2)),
    "empty ring": _ring,
    "part of ring": lambda place: _held(_ring(place, 4)),
    "full ring": lambda place: _held(_ring(place, 6)),
    "turned ring": lambda place: _held(_ring(place, 6, 3)),
    "ring without snapshots": lambda place: _ring(place, 6, 3),
    "ring to turn": lambda place: _held(_with_checkpoint(_ring(place, 5), points=[5, 6, 7])),
    "ring checkpoint": lambda place: _held(_with_checkpoint(_ring(place, 7), 1, 3)),
    "ring schedule": lambda place: _held(_with_points(_ring(place, 9), [9, 10, 12, 20])),
    "ring retained": lambda place: _held(_with_checkpoint(_ring(place, 7), 1, 3, points=[7, 8, 9])),
    "stack": lambda place: _held(_stack(place, 2, 3)),
    "empty stack": _stack,
    "stack checkpoint": lambda place: _held(_with_checkpoint(_stack(place, 7), 1, 3, points=[8])),
    "bfloat16": _bits,
    "pieces": _in_pieces,
    "pieces on host": lambda place: _in_pieces(place, host=True),
    "rows": lambda place: _held(_growing(place, 3, rows=3)),
    "rows of ring": lambda place: _held(_ring(place, 6, 3, rows=3, points=[5, 7, 20])),
    "rows of ring checkpoint": lambda place: _held(
        _with_checkpoint(_ring(place, 7, rows=3), 1, 3, points=[7, 8, 9])
    ),
    "padded": lambda place: _held(_growing(place, 3, rows=3, padding=PADDING)),
    "padded ring": lambda place: _held(_ring(place, 8, 3, rows=3, padding=PADDING)),
}


def _with_points(world, points):
    world.caches.schedule(points)
    return world


# Acts.


def _given(count):
    def prepare(world):
        [world.given, *_] = world.tokens(count)

    return prepare


def _updating(count):
    def run(world):
        return columns_of(world.cache.update(*world.given))

    def columns_of(result):
        return None  # valid until the next call only

    return Act(f"update {count}", run, _given(count))


def _export(world):
    world.given = world.cache.export_state(2)


def _append(world):
    """Let a program append a token to an exported state."""
    [pair, *_] = world.tokens(1)
    world.given, _, _ = functional.append(world.given, *pair)


def _lend(world):
    _export(world)
    _append(world)


def _give_back(world):
    world.cache.import_state(world.given)


def _come_back(world):
    """Let a program run on the exported state, and give it back."""
    _append(world)
    _give_back(world)


def _foreign(world):
    """Take snapshots of other caches of the same kinds, one in its cache and one on the host."""
    source = LayerWorld(
        world.place, *(type(c).make(world.backend, c.options) for c in world.caches)
    )
    source._stamps = world._stamps
    source.feed(3, 3)
    world.snapshots["first"] = source.caches.snapshot(0, 3).to_host()
    world.snapshots["second"] = source.caches.snapshot(3)
    world.source = source


def _restore(world):
    snapshots = world.snapshots["first"], world.snapshots["second"]
    world.caches.restore(*snapshots, backend=world.backend)


def _file(world):
    return world.place.directory / "caches"


def _save_first(world):
    world.caches.save(_file(world))


def _snapshot_file(world):
    return world.place.directory / "snapshot"


def _split(world):
    return world.snapshots["whole"].split(4)


def _merge(world):
    return world.snapshots["lower"].merge(world.snapshots["upper"])


def _union(world):
    return world.snapshots["lower"].union(world.snapshots["whole"])


def _selecting(*rows):
    """Select rows of the first layer, whose own savepoint has to do."""
    return Act(f"select {len(rows)}", lambda world: world.cache.select(rows))


def _concat(world):
    return type(world.caches).concat([world.caches, world.source.caches])


def _others(world):
    """Make caches of the same kinds, with fewer tokens and one row."""
    caches = (type(cache).make(world.backend, cache.options) for cache in world.caches)
    world.source = LayerWorld(world.place, *caches)
    world.source._stamps = world._stamps
    world.source.feed(2)


TRIM, TRIM_ALL = (
    Act("trim", lambda world: world.cache.trim(2)),
    Act("trim", lambda world: world.caches.trim(2)),
)
FOR_ANY = [
    Act("checkpoint", lambda world: world.caches.checkpoint(), silent=True),
    Act("reset", lambda world: world.caches.reset()),
    Act("schedule", lambda world: world.caches.schedule([10, 11]), silent=True),
    Act("snapshot", lambda world: world.caches.snapshot(), resource=True),
    Act("copy", lambda world: world.caches.copy()),
    Act("to_backend", lambda world: world.caches.to_backend(world.place.other)),
    Act("save", lambda world: world.caches.save(_file(world))),
    Act("load", lambda world: type(world.caches).load(_file(world), world.backend), _save_first),
]
ROLLBACKS = [
    Act("rollback 0", lambda world: world.caches.rollback()),
    Act("rollback 2", lambda world: world.caches.rollback(2)),
]
ROLLBACK_AT_ONCE = Act("rollback at once", lambda world: world.caches.rollback(), silent=True)
UPDATES = [_updating(count) for count in (1, 3, 9)]
EXPORT = Act("export_state", _export, finish=_come_back)
IMPORT = Act("import_state", _give_back, _lend)
PROGRAMS = [EXPORT, IMPORT]
RESTORE = Act("restore", _restore, _foreign)
PAD = Act("pad", lambda world: world.cache.pad([2]))
PAD_ALL = Act("pad", lambda world: world.caches.pad([2]))
RESERVE = Act("reserve", lambda world: world.cache.reserve(20))
SELECT_ALL = Act("select all", lambda world: world.caches.select([1, 1]))
REORDER, FEWER, MORE = _selecting(2, 0, 1), _selecting(1), _selecting(0, 0, 2, 1)
SPLIT = Act("split", lambda world: tuple(world.caches.split()))
CONCAT = Act("concat", _concat, _others)
PIECES = [
    Act("split", _split, resource=True),
    Act("merge", _merge, resource=True),
    Act("union", _union, resource=True),
    Act("to_host", lambda world: world.snapshots["whole"].to_host() and None, silent=True),
    Act("close", lambda world: world.snapshots["whole"].close()),
    Act("save", lambda world: world.snapshots["whole"].save(_snapshot_file(world))),
]

ACTS = {
    "unbound": [UPDATES[1], RESTORE],
    "empty": [UPDATES[1], RESTORE, FOR_ANY[0], PAD],
    "growing": [*UPDATES, TRIM, *FOR_ANY, *PROGRAMS],
    "full": [*UPDATES[:2], TRIM, *PROGRAMS],
    "growing checkpoint": [*UPDATES, TRIM, *ROLLBACKS, IMPORT],
    "empty ring": [UPDATES[1], UPDATES[2], RESTORE, PAD],
    "part of ring": [*UPDATES, TRIM, *PROGRAMS],
    "full ring": [*UPDATES, TRIM, IMPORT],
    "turned ring": [*UPDATES, *FOR_ANY, *PROGRAMS],
    "ring without snapshots": UPDATES,
    "ring to turn": [*UPDATES, ROLLBACK_AT_ONCE, TRIM],
    "ring checkpoint": [*UPDATES, *ROLLBACKS, IMPORT],
    "ring schedule": [*UPDATES, *FOR_ANY, *PROGRAMS],
    "ring retained": [*UPDATES, *ROLLBACKS, FOR_ANY[1], FOR_ANY[2], FOR_ANY[3], FOR_ANY[4]],
    "stack": [TRIM_ALL, *FOR_ANY],
    "empty stack": [RESTORE],
    "stack checkpoint": [*ROLLBACKS, *FOR_ANY],
    "bfloat16": [*UPDATES[:1], *PROGRAMS],
    "pieces": PIECES,
    "pieces on host": PIECES,
    "rows": [REORDER, FEWER, MORE, SPLIT, CONCAT, RESERVE],
    "rows of ring": [REORDER, MORE, SPLIT, CONCAT, RESERVE],
    "rows of ring checkpoint": [FEWER, MORE],
    "padded": [UPDATES[1], REORDER, FEWER, SPLIT, CONCAT],
    "padded ring": [UPDATES[0], UPDATES[2], REORDER, SPLIT, CONCAT],
}


def _laters(state, act):
    """Return later calls: with an open checkpoint, also those that begin with a rollback."""
    if "checkpoint" in act.name:
        return (rolls_back(0),)
    if state in (
        "growing checkpoint",
        "ring to turn",
        "ring checkpoint",
        "ring retained",
        "rows of ring checkpoint",
        "stack checkpoint",
    ):
        return (goes_on, rolls_back(1))
    return (goes_on,)


SCENARIOS = [
    Scenario(state, STATES[state], act, _laters(state, act))
    for state, acts in ACTS.items()
    for act in acts
]
