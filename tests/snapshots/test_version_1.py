"""Files of version 1 of the format load as they were saved.

They were written by the last revision that wrote version 1. Keys at position p are p, values -p;
layer 1 of the pool holds keys only, 100 more; the encoder's frame f holds f.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from kvcache import (
    Batch,
    CausalCache,
    EncoderCache,
    KVCache,
    LayerCaches,
    RotatingKVCache,
    Snapshot,
    SnapshotMismatchError,
    WrapperCache,
)

FILES = Path(__file__).parents[1] / "data" / "version1"
TOKENS = [7, 8, 9, 10, 11, 12]


def coded(position, dim, layer=0):
    return np.full((2, 1, dim), position + 100 * layer, np.float32)


def test_layers(backend):
    if "float16" not in backend.dtypes or "bfloat16" not in backend.dtypes:
        pytest.skip(f"{backend.name} lacks a dtype of the file")
    grown, ring, empty = LayerCaches.load(FILES / "layers.safetensors", backend)
    assert (type(grown), type(ring), type(empty)) == (KVCache, RotatingKVCache, KVCache)
    assert (grown.offset, ring.offset, empty.offset) == (6, 6, 0)
    assert (grown.dtype, ring.dtype, empty.dtype) == ("bfloat16", "bfloat16", "float16")
    assert (ring.max_size, ring.keep, ring.options["step"]) == (4, 1, 2)
    for cache, positions in ((grown, [0, 1, 2, 3, 4, 5]), (ring, [0, 3, 4, 5])):
        held = cache.positions
        assert sorted(held[held >= 0].tolist()) == positions
        for array, sign in zip(cache.state, (1, -1), strict=True):
            rows = backend.to_host(array)[:, :, : held.size].astype(np.float32)
            for column, position in enumerate(held.tolist()):
                if position >= 0:
                    assert (rows[:, :, column] == sign * position).all()


def test_a_loaded_ring_goes_on():
    ring = LayerCaches.load(FILES / "layers.safetensors")[1]
    rows = np.full((2, 1, 1, 4), 6, ml_dtypes.bfloat16)
    ring.update(rows, -rows[..., :2])
    held = ring.positions
    assert sorted(held[held >= 0].tolist()) == [0, 4, 5, 6]


def restored_pool():
    wrapper = WrapperCache(CausalCache(window=3), EncoderCache())
    wrapper.init("numpy", max_sequences=2, capacity=16, max_batch=8)
    snapshot = Snapshot.load(FILES / "snapshot.safetensors", tokens=TOKENS, fingerprint="model A")
    wrapper.restore(0, snapshot)
    return wrapper, snapshot


def test_a_snapshot_of_a_window_and_an_encoder():
    wrapper, snapshot = restored_pool()
    assert (snapshot.start, snapshot.stop) == (0, 6)
    assert [part.rows.positions.tolist() for part in snapshot.parts] == [[2, 3, 4, 5], [2, 2, 2]]
    wrapper.start_forward(Batch([6], [0]))
    for layer in (0, 1):
        wrapper.set_layer_type(0)
        wrapper.set_layer(layer)
        wrapper.put(coded(6, 3, layer), None if layer else -coded(6, 2))
        keys, values, mask = wrapper.get()
        seen = np.flatnonzero(mask[0])
        assert sorted(keys[0, seen, 0].tolist()) == [p + 100 * layer for p in (4, 5, 6)]
        assert values is None if layer else (values[:, seen, :2] == -keys[:, seen, :2]).all()
    wrapper.set_layer_type(1)
    wrapper.set_layer(0)
    keys, values, mask = wrapper.get()
    assert mask is None
    assert keys[0, :, 0].tolist() == [0, 1, 2]
    assert (values == -keys).all()


def test_the_owner_is_checked():
    with pytest.raises(SnapshotMismatchError, match="other tokens"):
        Snapshot.load(FILES / "snapshot.safetensors", tokens=TOKENS[:-1])
    with pytest.raises(SnapshotMismatchError, match="model 'model A', not 'B'"):
        Snapshot.load(FILES / "snapshot.safetensors", fingerprint="B")


def test_a_snapshot_of_a_ring():
    ring = RotatingKVCache(4, keep=1, backend="numpy")
    ring.restore(Snapshot.load(FILES / "ring_snapshot.safetensors"))
    held, keys = ring.positions, ring.state[0]
    assert sorted(held.tolist()) == [0, 3, 4, 5]
    assert keys[0, 0, :, 0].tolist() == held.tolist()


def test_a_version_1_file_written_anew_is_the_same(tmp_path):
    """Loading and saving changes the version and nothing that is held."""
    caches = LayerCaches.load(FILES / "layers.safetensors")
    caches.save(tmp_path / "new")
    again = LayerCaches.load(tmp_path / "new")
    for one, other in zip(caches, again, strict=True):
        assert (type(one), one.offset, one.options) == (type(other), other.offset, other.options)
        for array, same_array in zip(one.state, other.state, strict=True):
            assert array.tobytes() == same_array.tobytes()
