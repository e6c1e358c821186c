"""Observations of caches: whatever a user can see of them, as values to compare."""

from __future__ import annotations

import numpy as np

import kvcache
from kvcache import EncoderCache, RecurrentCache, StateCache, WrapperCache
from kvcache.layers.base import LayerCache

from .. import peek


class Bits(tuple):
    """An array by its bits, so that NaN equals itself."""

    __slots__ = ()

    def __new__(cls, array):
        array = np.asarray(array)
        return super().__new__(cls, (array.dtype, array.shape, array.tobytes()))

    def __repr__(self):
        dtype, shape, data = self
        return f"{dtype}{list(shape)} {np.frombuffer(data, dtype).tolist()}"


def attempt(call, *args, **kwargs):
    """Return the result of a call, or the error that it raised, as a value to compare."""
    try:
        return call(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - an error is an observation, whatever it is
        return f"{type(error).__name__}: {error}"


def differences(expected, got, path=""):
    """Return one line for each place where two observations differ."""
    if type(expected) is type(got) and expected == got:
        return []
    if isinstance(expected, dict) and isinstance(got, dict):
        return [
            line
            for key in {**expected, **got}
            for line in differences(
                expected.get(key, "nothing"), got.get(key, "nothing"), f"{path}.{key}".lstrip(".")
            )
        ]
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        pairs = enumerate(zip(expected, got, strict=True))
        return [line for i, pair in pairs for line in differences(*pair, f"{path}[{i}]")]
    return [f"{path}: {_short(got)} instead of {_short(expected)}"]


def _short(value, limit=160):
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


# Snapshots.


def look_at_rows(rows):
    """Observe rows, leaving them where they are. Their place, cache or host, is not content."""
    content = rows.read(np.arange(rows.positions.size)) if rows.positions.size else {}
    return {
        "positions": rows.positions.tolist(),
        "layers": {
            layer: {array.name: Bits(array.data) for array in arrays}
            for layer, arrays in content.items()
        },
    }


def look_at_snapshot(snapshot):
    """Observe a snapshot: its span and its rows, which say where it can be resumed."""
    return {
        "span": (snapshot.start, snapshot.stop),
        "bytes": snapshot.nbytes,
        "specs": [tuple(spec) for spec in snapshot.specs],
        "parts": [attempt(look_at_rows, part.rows) for part in snapshot.parts],
    }


def _taken(snapshot):
    """Observe a snapshot taken for this only."""
    with snapshot:
        return look_at_snapshot(snapshot)


# Per-layer caches.


def look_at_layer(cache):
    """Observe one per-layer cache."""
    if isinstance(cache, StateCache):
        return look_at_states(cache)
    offset = cache.offset
    return {
        "repr": repr(cache),
        "rows": (cache.rows, _listed(cache.padding)),
        "offset": offset,
        "len": cache.len,
        "nbytes": cache.nbytes,
        "growths": cache.growths,
        "dtype": cache.dtype,
        "backend": cache.backend and cache.backend.spec,
        "options": dict(cache.options),
        "positions": attempt(_positions, cache),
        "held": attempt(_held, cache),
        "masks": [attempt(_mask, cache, tokens) for tokens in range(1, min(offset, 2) + 1)],
        "can trim": [tokens for tokens in range(offset + 2) if cache.can_trim(tokens)],
    }


def look_at_states(cache):
    """Observe the cache of a recurrent layer."""
    return {
        "repr": repr(cache),
        "rows": (cache.rows, _listed(cache.padding)),
        "offset": cache.offset,
        "nbytes": cache.nbytes,
        "dtype": cache.dtype,
        "backend": cache.backend and cache.backend.spec,
        "kept": attempt(lambda: list(cache.kept)),
        "state": attempt(lambda: [Bits(_on_host(cache.backend, a)) for a in cache.state]),
        "can trim": [tokens for tokens in range(cache.offset + 2) if cache.can_trim(tokens)],
    }


def _listed(padding):
    return None if padding is None else padding.tolist()


def _positions(cache):
    return cache.positions.tolist()


def _held(cache):
    """Return the content of `state`, without the padding behind it."""
    state = cache.state
    return [Bits(_on_host(cache.backend, array)[:, :, : cache.len]) for array in state]


def _on_host(backend, array):
    return None if array is None else backend.to_host(array)


def _mask(cache, tokens):
    mask = cache.mask(tokens)
    return None if mask is None else Bits(_on_host(cache.backend, mask))


def columns(cache, result):
    """Observe the result of an update by position, without padding."""
    arrays = [_on_host(cache.backend, array) for array in result]
    if cache.padding is None:
        return _row_columns(cache.positions, arrays)
    rows = enumerate(cache.positions)
    return [_row_columns(own, [array[row : row + 1] for array in arrays]) for row, own in rows]


def _row_columns(positions, arrays):
    """Observe the columns of rows with equal positions."""
    order = np.argsort(positions)[np.count_nonzero(positions < 0) :]
    bits = [Bits(array[:, :, order]) for array in arrays]
    return {"positions": positions[order].tolist(), "arrays": bits}


def look_at_layers(caches):
    """Observe caches of several layers, one by one and together."""
    return {
        "layers": [look_at_layer(cache) for cache in caches],
        "offset": attempt(lambda: caches.offset),
        "nbytes": caches.nbytes,
        "can trim": [tokens for tokens in range(12) if caches.can_trim(tokens)],
        "snapshot": attempt(lambda: _taken(caches.snapshot())),
    }


# Pools.


def look_at_pool(cache):
    """Observe a multi-sequence cache: every sequence of it, and the room for more tokens."""
    sequences = attempt(lambda: cache.max_sequences)
    if isinstance(sequences, str):
        return {"sequences": sequences}
    return {
        "sequences": [_look_at_sequence(cache, sequence) for sequence in range(sequences)],
        "specs": attempt(lambda: [tuple(spec) for spec in cache.specs]),
        "parts": [_look_at_part(part) for part in parts(cache)],
    }


def parts(cache):
    """Return the caches behind a cache."""
    return list(cache.caches) if isinstance(cache, WrapperCache) else [cache]


def _look_at_sequence(cache, sequence):
    return {
        "next": attempt(cache.next_position, sequence),
        "resumable": [p for p in range(14) if attempt(cache.can_resume, sequence, p)],
        "snapshot": attempt(lambda: _taken(cache.snapshot(sequence, 0, 14))),
    }


def _look_at_part(cache):
    if isinstance(cache, EncoderCache):
        return {"encoded": cache.encoder_cached}
    if isinstance(cache, RecurrentCache):
        return {"nbytes": attempt(lambda: cache.nbytes)}
    return {"cells": attempt(lambda: cache.cells), "room": attempt(peek.room, cache)}


def attended(backend, cache):
    """Observe the result of `get`: the keys and values seen by each token, in order of content."""
    keys, values, mask = (_on_host(backend, array) for array in cache.get())
    if mask is None:
        return [Bits(keys), Bits(values)]
    visible = mask if mask.dtype == np.bool_ else mask == 0
    rows = [
        array.reshape(-1, array.shape[1], array.shape[2])
        for array in (keys, values)
        if array is not None
    ]
    flat = np.concatenate([row.transpose(1, 0, 2).reshape(row.shape[1], -1) for row in rows], 1)
    return [sorted(map(tuple, flat[line].tolist())) for line in visible]


# Any result.


def look_at(thing):
    """Observe whatever a call returned."""
    if isinstance(thing, LayerCache):
        return {**look_at_layer(thing), "snapshot": attempt(lambda: _taken(thing.snapshot()))}
    if isinstance(thing, kvcache.LayerCaches):
        return look_at_layers(thing)
    if isinstance(thing, kvcache.Snapshot):
        return look_at_snapshot(thing)
    if isinstance(thing, kvcache.Cache):
        return look_at_pool(thing)
    return type(thing).__name__
