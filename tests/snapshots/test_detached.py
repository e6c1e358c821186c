"""Snapshots copied out of their caches: equal to those on the host, whatever is done to them."""

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import KVCache, LayerCaches, PrefixCache, RotatingKVCache, StateCache

from .. import peek

STOP = 24
POINTS = (5, 9, 16)


def numbers(start, stop, sign=1):
    return sign * np.arange(start, stop, dtype=np.float32)[None, None, :, None]


def stack_of(backend):
    ring = RotatingKVCache(6, 2, backend, step=4)
    return LayerCaches([KVCache(backend, step=4), ring, StateCache(backend)])


def feed(caches, backend, start, stop):
    """Keys are their positions; a state has the position that it is behind."""
    for position in range(start, stop):
        for cache in caches[:2]:
            keys, values = numbers(position, position + 1), numbers(position, position + 1, -1)
            cache.update(backend.from_host(keys), backend.from_host(values))
        state = np.full((1, 3), position + 1), np.full((1, 2, 2), -position - 1)
        dtypes = np.float32, np.int32
        arrays = [backend.from_host(s.astype(d)) for s, d in zip(state, dtypes, strict=True)]
        caches[2].advance(1, *arrays)


def filled(backend, stop=STOP):
    caches = stack_of(backend)
    caches.schedule(POINTS)
    feed(caches, backend, 0, stop)
    return caches


def content(snapshot):
    """Positions, and the bytes of every array, of all layers."""
    return [
        (
            part.rows.positions.tolist(),
            {
                layer: [(array.name, array.data.tolist()) for array in arrays]
                for layer, arrays in part.rows.host_copies().items()
            },
        )
        for part in snapshot.parts
    ]


def held(caches):
    """What a model goes on with, in all layers."""
    *attention, recurrent = caches
    layers = [[array.data.tolist() for array in cache.to_layer()] for cache in attention]
    return [*layers, [recurrent.backend.to_host(array).tolist() for array in recurrent.state]]


def test_detached_rows_depend_on_no_cache(backend):
    caches = filled(backend)
    with caches.snapshot() as resident, caches.snapshot() as snapshot:
        expected, nbytes = content(resident), snapshot.nbytes
        assert snapshot.resident
        assert snapshot.host_nbytes < nbytes  # what resume points of a ring retain is on the host
        assert snapshot.detach() is snapshot
        assert not snapshot.resident
        assert snapshot.host_nbytes == snapshot.nbytes == nbytes
        resident.close()
        assert not any(peek.layer_pins(cache) for cache in caches)
        caches.trim(0)
        feed(caches, backend, STOP, STOP + 9)
        caches.reset()
        feed(caches, backend, 100, 120)
        assert content(snapshot) == expected
        other = stack_of(backend)
        other.restore(snapshot)
        assert held(other) == held(filled(backend))


@pytest.mark.parametrize("at", POINTS)
def test_the_memory_of_rows_that_go_is_freed(backend, at):
    """What is split off has memory of its own, so that it goes with the last that names it."""
    snapshot = filled(backend).snapshot().detach()
    whole = [weakref.ref(part.rows.owner) for part in snapshot.parts if part.rows.owner]
    lower, upper = snapshot.split(at)
    upper.close()
    gc.collect()
    assert all(owner() is None for owner in whole)
    for part in lower.parts:
        if part.rows.owner is not None and part.spec.kind != "state":
            assert peek.slots_of(part.rows.owner) == part.rows.positions.size
    caches = stack_of(backend)
    caches.restore(lower)
    expected = filled(backend, at)
    assert held(caches) == held(expected)


STEPS = st.lists(
    st.tuples(st.sampled_from(["split", "merge", "needed", "union", "copy"]), st.integers(0, 99)),
    max_size=6,
)


@given(STEPS)
def test_every_operation_gives_what_it_gives_on_the_host(backend, steps):
    with_host, detached = [filled(backend).snapshot().to_host()], []
    detached.append(filled(backend).snapshot().detach())
    for step, number in steps:
        for spans in (with_host, detached):
            apply(spans, step, number)
        assert [content(one) for one in detached] == [content(one) for one in with_host]
        assert sum(one.nbytes for one in detached) == sum(one.nbytes for one in with_host)
        assert [one.host_nbytes for one in detached] == [one.host_nbytes for one in with_host]


def apply(spans, step, number):
    """Do one thing to adjacent snapshots."""
    at = number % len(spans)
    one = spans[at]
    if step == "split" and one.stop - one.start > 1:
        spans[at : at + 1] = one.split(one.start + 1 + number % (one.stop - one.start - 1))
    elif step == "merge" and at + 1 < len(spans):
        spans[at : at + 2] = [one.merge(spans[at + 1])]
    elif step == "needed":
        spans[at] = one.needed_at(one.stop)
    elif step == "union":
        with one.needed_at(one.stop) as less:
            spans[at] = less.union(one)
    elif step == "copy":
        spans[at] = one.copy()
        one.close()


def test_sessions_store_where_the_caches_are(backend):
    """A hit is exact, and what is stored keeps no cache alive."""
    prefix = PrefixCache(stack_of(backend), budget=None, resume_every=4)
    ids = list(range(STOP))
    with prefix.session(ids) as session:
        feed(session.caches, backend, 0, STOP)
        caches = weakref.ref(session.caches[0])
    del session
    gc.collect()
    assert caches() is None
    assert prefix.stats.resident == 0
    for stop in (16, 22, STOP):
        branch = [*ids[:stop], 99, 98]
        with prefix.session(branch) as session:
            matched = session.matched
            assert matched == stop - stop % 4
            assert held(session.caches) == held_at(backend, matched)
            feed(session.caches, backend, matched, stop + 2)
            assert held(session.caches) == held_at(backend, stop + 2)


def test_a_hit_does_not_pass_through_the_host(backend, monkeypatch):
    if not (backend.in_host_memory and backend.slices_are_views):
        pytest.skip("stores on the host: memory of a device, or a program for each length")
    full, _, state = stack_of(backend)
    prefix, ids = PrefixCache([full, state], budget=None), list(range(STOP))
    with prefix.session(ids) as session:
        caches = session.caches
        feed([caches[0], KVCache(backend), caches[1]], backend, 0, STOP)
        monkeypatch.setattr(type(backend), "to_host", failing)
        monkeypatch.setattr(type(backend), "from_host", failing)
    with prefix.session([*ids, 99]) as session:
        monkeypatch.undo()
        caches = session.caches
        assert session.matched == STOP
        assert held([caches[0], caches[1]]) == held_at(backend, STOP)[::2]


def held_at(backend, stop):
    caches = stack_of(backend)
    feed(caches, backend, 0, stop)
    return held(caches)


def test_if_the_framework_fails_nothing_has_moved(backend, monkeypatch):
    caches = filled(backend)
    with caches.snapshot() as snapshot:
        before, resident = content(snapshot), [part.rows.in_cache for part in snapshot.parts]
        for name in ("concat", "owned", "to_host"):
            with monkeypatch.context() as patch:
                patch.setattr(type(backend), name, failing)
                try:
                    snapshot.detach()
                except MemoryError:
                    assert [part.rows.in_cache for part in snapshot.parts] == resident
                    assert [bool(peek.layer_pins(cache)) for cache in caches] == resident
                    assert content_after(patch, snapshot) == before
        snapshot.detach()
        assert content(snapshot) == before
        assert not snapshot.resident


def failing(*args, **kwargs):
    raise MemoryError


def content_after(patch, snapshot):
    patch.undo()
    return content(snapshot)
