"""A cache that is locked while a program has its state."""

import copy
import itertools
import pickle

import numpy as np
import pytest

from kvcache import (
    BoundsError,
    DTypeError,
    ExportedError,
    KVCache,
    LayerCaches,
    RotatingKVCache,
    ShapeError,
    StateError,
    TracedArrayError,
    TrimError,
    functional,
)

from .oracle import Oracle, check_whole, fingerprint, host_rows, oracle_for, push

SHAPES = {"growing": (None, 0), "ring": (10, 2)}


def make(backend, kind, step=4):
    size, keep = SHAPES[kind]
    return KVCache(backend, step) if size is None else RotatingKVCache(size, keep, backend, step)


def filled(backend, kind, tokens=5):
    cache = make(backend, kind)
    oracle = oracle_for(cache)
    push(cache, oracle, tokens)
    return cache, oracle


def append(backend, state, position):
    """The program of these tests: append the token that the oracle has at `position`."""
    plain, oracle = KVCache(backend), Oracle()
    push(plain, oracle, 1, stamp=position)
    state, _, _ = functional.append(state, *plain.state)
    return state, oracle.tokens


def everything_of(cache, path):
    one = cache.copy().state
    yield "update", lambda c: c.update(*one)
    yield "mask", lambda c: c.mask(1)
    yield "mask ahead", lambda c: c.mask(1, ahead=True)
    yield "positions", lambda c: c.positions
    yield "next_positions", lambda c: c.next_positions(1)
    yield "state", lambda c: c.state
    yield "trim", lambda c: c.trim(1)
    yield "check_trim", lambda c: c.check_trim(0)
    yield "checkpoint", lambda c: c.checkpoint()
    yield "rollback", lambda c: c.rollback()
    yield "schedule", lambda c: c.schedule([50])
    yield "snapshot", lambda c: c.snapshot()
    yield "copy", lambda c: c.copy()
    yield "to_backend", lambda c: c.to_backend("numpy")
    yield "save", lambda c: c.save(path / "file")
    yield "export", lambda c: c.export_state(1)
    yield "copy.copy", copy.copy
    yield "deepcopy", copy.deepcopy
    yield "pickle", pickle.dumps
    for name in ("checkpoint", "trim 1", "rollback", "snapshot", "copy"):
        method, *tokens = name.split()
        yield (
            f"all layers: {name}",
            lambda c, m=method, t=tuple(tokens): getattr(LayerCaches([c]), m)(*map(int, t)),
        )


@pytest.mark.parametrize("kind", SHAPES)
def test_locked(backend, kind, tmp_path):
    cache, oracle = filled(backend, kind)
    cache.checkpoint()
    calls = list(everything_of(cache, tmp_path))
    state = cache.export_state(3)
    looks = cache.offset, cache.len, cache.nbytes, cache.dtype, cache.backend, repr(cache)
    for _, call in calls:
        with pytest.raises(ExportedError, match=r"import_state\(state\).*or reset\(\)"):
            call(cache)
    assert not cache.can_trim(0)
    assert not list(tmp_path.iterdir())
    assert looks == (5, 5, cache.nbytes, cache.dtype, cache.backend, repr(cache))
    state, tokens = append(backend, state, 5)
    cache.import_state(state)
    oracle.tokens += tokens
    check_whole(cache, oracle)
    push(cache, oracle, 3)


@pytest.mark.parametrize("kind", SHAPES)
def test_all_layers_or_none(backend, kind):
    layers = [filled(backend, kind)[0] for _ in range(2)]
    caches = LayerCaches(layers)
    before = fingerprint(layers[0])
    state = layers[1].export_state(1)
    for call in (caches.checkpoint, caches.snapshot, lambda: caches.trim(1), caches.copy):
        with pytest.raises(ExportedError):
            call()
    assert fingerprint(layers[0]) == before
    with pytest.raises(Exception, match="open checkpoint"):
        layers[0].rollback()
    layers[1].import_state(state)
    caches.trim(1)


@pytest.mark.parametrize("kind", SHAPES)
def test_reset_gives_the_program_up(backend, kind):
    cache, _ = filled(backend, kind)
    state = cache.export_state(1)
    cache.reset()
    assert (cache.offset, cache.nbytes) == (0, 0)
    with pytest.raises(StateError, match="this exported none"):
        cache.import_state(state)
    push(cache, oracle_for(cache), 2)


def refused(cache, state, error, match):
    """Importing raises; what the program has is still good, and can be imported."""
    with pytest.raises(error, match=match):
        cache.import_state(state)
    with pytest.raises(ExportedError):
        cache.trim(0)


@pytest.mark.parametrize(("kind", "other"), list(itertools.product(SHAPES, SHAPES)))
def test_states_of_others(backend, kind, other):
    cache, oracle = filled(backend, kind)
    neighbour, _ = filled(backend, other)
    mine, foreign = cache.export_state(1), neighbour.export_state(1)
    match = "it comes from, number" if kind == other else "this cache exported a"
    refused(cache, foreign, StateError, match)
    refused(cache, (1, 2), StateError, "exported a .*; got tuple")
    cache.import_state(mine)
    check_whole(cache, oracle)
    with pytest.raises(StateError, match="this exported none"):
        cache.import_state(mine)
    again = cache.export_state(1)
    refused(cache, mine._replace(keys=again.keys), StateError, "of an earlier export")
    cache.import_state(again)
    neighbour.import_state(foreign)
    check_whole(cache, oracle)


@pytest.mark.parametrize("kind", SHAPES)
def test_states_of_another_form(backend, kind):
    cache, oracle = filled(backend, kind)
    state = cache.export_state(1)
    shorter = backend.slice(state.values, 0, 2, 2)
    refused(cache, state._replace(values=shorter), ShapeError, "has the shape of the exported one")
    ints = backend.from_host(np.zeros(tuple(state.keys.shape)), "int32")
    refused(cache, state._replace(keys=ints), DTypeError, "has the dtype of the exported one")
    refused(cache, state._replace(offset=5), StateError, r"stay on \S+; offset is int")
    past = backend.from_host(np.asarray(-1), "int32")
    refused(cache, state._replace(offset=past), StateError, "position 0 at most; got offset -1")
    ahead = backend.from_host(np.asarray(7), "int32")
    refused(cache, state._replace(offset=ahead), StateError, "offset")
    cache.import_state(state)
    check_whole(cache, oracle)


def test_more_tokens_than_fit_are_refused_and_the_others_stay(backend):
    cache, oracle = filled(backend, "growing")
    state = cache.export_state(1)
    room = state.keys.shape[2]
    for position in range(5, room + 1):
        state, tokens = append(backend, state, position)
        oracle.tokens += tokens
    refused(cache, state, BoundsError, f"{room + 1} came, {room} fit.*functional.trim")
    cache.import_state(functional.trim(state, 1))
    oracle.cut(room)
    check_whole(cache, oracle)
    push(cache, oracle, 2)


def test_a_short_ring_does_not_turn(backend):
    """Tokens beyond its room overwrite nothing."""
    cache = RotatingKVCache(1000, 2, backend, step=4)
    oracle = oracle_for(cache)
    push(cache, oracle, 3)
    state = cache.export_state(1)
    room = state.keys.shape[2]
    for position in range(3, room):
        state, tokens = append(backend, state, position)
        oracle.tokens += tokens
    before = [backend.to_host(part).tobytes() for part in (state.keys, state.values)]
    state, _ = append(backend, state, room)
    assert [backend.to_host(part).tobytes() for part in (state.keys, state.values)] == before
    refused(cache, state, BoundsError, f"{room + 1} came, {room} fit")
    cache.import_state(state._replace(offset=state.offset - 1))
    check_whole(cache, oracle)


def test_a_program_that_goes_back(backend):
    """Below the offset of the export: snapshots taken before keep their tokens."""
    cache, oracle = filled(backend, "growing")
    snapshot = cache.snapshot()
    state = cache.export_state(4)
    assert not snapshot.resident
    state = functional.trim(state, 2)
    drafted = oracle.copy()
    drafted.cut(3)
    for position in (90, 91):
        state, tokens = append(backend, state, position)
        drafted.tokens += tokens
    cache.import_state(state)
    check_whole(cache, drafted)
    restored = KVCache(backend)
    restored.restore(snapshot)
    check_whole(restored, oracle)
    push(cache, drafted, 3)


def test_a_ring_does_not_go_back(backend):
    cache, _ = filled(backend, "ring", 14)
    state = cache.export_state(4)
    state, _ = append(backend, state, 14)
    with pytest.raises(TrimError, match="a ring cannot go back in a program"):
        functional.trim(state, 1)
    refused(cache, state._replace(offset=state.offset - 1), StateError, "a ring cannot go back")
    cache.import_state(state)
    assert cache.offset == 15


@pytest.mark.parametrize("kind", SHAPES)
def test_a_program_that_failed(backend, kind):
    """The exported state brings the cache back, or is refused: never other tokens."""
    cache, oracle = filled(backend, kind, 14)
    exported = cache.export_state(4)
    latest, tokens = append(backend, exported, 14)
    in_place = backend.name in ("numpy", "torch", "array_api")
    if kind == "ring" and in_place:
        refused(cache, exported, StateError, "has displaced some of them")
        cache.import_state(latest)
        oracle.tokens += tokens
    else:
        cache.import_state(exported)
    check_whole(cache, oracle)
    push(cache, oracle, 2)


@pytest.mark.one_backend(name="jax")
@pytest.mark.parametrize("kind", SHAPES)
def test_a_donated_state(kind):
    jax = pytest.importorskip("jax", reason="jax is not installed")
    cache, oracle = filled(make("jax", kind).backend, kind)
    state = cache.export_state(2)
    one = state.keys[:, :, :1]
    values = state.values[:, :, :1]
    step = jax.jit(lambda s, k, v: functional.append(s, k, v)[0], donate_argnums=0)
    latest = step(state, one, values)
    refused(cache, state, StateError, "a program consumed this state.*reset")

    def traced(state):
        cache.import_state(state)
        return state

    with pytest.raises(TracedArrayError, match=r"kvcache\.functional"):
        jax.jit(traced)(latest)
    cache.import_state(latest)
    assert cache.offset == 6
    assert host_rows(cache.backend, cache.state)[:5] == oracle.tokens
