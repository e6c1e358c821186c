"""Damaged files, and forged ones with valid checksums: named errors or the same content.

Nothing is made of a file that its size does not warrant, and no cache that does not fit together.
"""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import (
    Batch,
    CacheFileError,
    CausalCache,
    DamagedFileError,
    EncoderCache,
    KVCache,
    KVCacheError,
    LayerCaches,
    NotSupportedError,
    RotatingKVCache,
    Snapshot,
    WrapperCache,
)

from ..forging import DEEP, damages, forge, forgeries, packed, peak_of, unpacked

SPARE = 1 << 20
"""Bytes that reading may take beside a few times the size of the file: errors, headers, steps."""


def filled(cache, tokens):
    for position in range(tokens):
        row = np.full((1, 1, 1, 2), position, np.float32)
        cache.update(row, -row)
    return cache


def caches():
    return LayerCaches(
        [filled(KVCache("numpy", step=4), 5), filled(RotatingKVCache(4, 1, "numpy"), 7), KVCache()]
    )


def pool(fed=True):
    cache = WrapperCache(CausalCache(window=4), EncoderCache())
    cache.init("numpy", max_sequences=2, capacity=16, max_batch=8)
    for position in range(3 if fed else 0):
        cache.start_forward(Batch([position], [0], [0] if position == 1 else []))
        for kind in (0, 1):
            if kind == 0 or position == 1:
                cache.set_layer_type(kind)
                cache.set_layer(0)
                rows = np.full((2, 1, 2), position, np.float32)
                cache.put(rows, -rows)
    return cache


def file_of(tmp_path_factory, save):
    path = tmp_path_factory.mktemp("whole") / "file"
    save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole_caches(tmp_path_factory):
    return file_of(tmp_path_factory, caches().save)


@pytest.fixture(scope="module")
def whole_snapshot(tmp_path_factory):
    return file_of(tmp_path_factory, pool().snapshot(0).save)


@pytest.fixture(scope="module")
def whole_layer_snapshot(tmp_path_factory):
    return file_of(tmp_path_factory, caches()[:1].snapshot().save)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("forged") / "file"


def held(loaded):
    """Everything in caches, after checking that it fits together and goes on."""
    content = []
    for cache in loaded:
        arrays = [array[:, :, : cache.len] for array in cache.state]
        assert all(array.shape[2] == cache.len for array in arrays)
        positions = cache.positions[: cache.len].tolist()
        assert len(set(positions)) == cache.len
        content.append((type(cache), cache.offset, positions, [a.tobytes() for a in arrays]))
    return content


def go_on(loaded):
    """Update each cache with a token as those that it holds."""
    for cache in loaded:
        if cache.offset:
            update = [np.zeros_like(array[:, :, :1]) for array in cache.state]
            cache.update(*update)
            assert cache.len in (cache.offset, min(cache.offset, cache.options.get("max_size", 0)))


def load(path, whole, expected=None):
    """Load caches: the same content, or a named error, in bounded memory."""
    path.write_bytes(whole)
    result, peak = peak_of(lambda: LayerCaches.load(path))
    assert peak < 12 * len(whole) + SPARE, f"{peak} bytes for a file of {len(whole)}"
    if isinstance(result, Exception):
        assert isinstance(result, CacheFileError | NotSupportedError), repr(result)
    elif expected is not None:
        assert held(result) == expected
    else:
        held(result)
        if all(cache.options["step"] <= 4096 for cache in result):
            go_on(result)


def load_snapshot(path, whole, same=None):
    """Load a snapshot and restore it: the same content, or a named error, in bounded memory."""
    path.write_bytes(whole)
    result, peak = peak_of(lambda: Snapshot.load(path))
    assert peak < 12 * len(whole) + SPARE, f"{peak} bytes for a file of {len(whole)}"
    if isinstance(result, Exception):
        assert isinstance(result, CacheFileError), repr(result)
        return
    path.unlink()
    result.save(path)
    if same is not None:
        assert path.read_bytes() == same
    for target in (pool(fed=False), LayerCaches([KVCache("numpy")])):
        restored, _ = peak_of(lambda cache=target: restore(cache, result))
        # ValueError, of both kinds of cache: a snapshot that does not begin at position 0.
        named = isinstance(restored, KVCacheError) or "from position 0" in str(restored)
        assert restored is None or named, repr(restored)


def restore(target, snapshot):
    if isinstance(target, LayerCaches):
        target.restore(snapshot)
        go_on(target)
        return
    target.restore(0, snapshot)
    position = target.next_position(0)
    target.start_forward(Batch([position], [0]))
    target.set_layer_type(0)
    target.set_layer(0)
    target.get()  # writes what was restored
    target.abort()


@given(st.data())
def test_damaged_caches(whole_caches, path, data):
    load(path, data.draw(damages(whole_caches)), held(caches()))


@given(st.data())
def test_damaged_snapshots(whole_snapshot, path, data):
    load_snapshot(path, data.draw(damages(whole_snapshot)), whole_snapshot)


@given(st.data())
def test_forged_caches(whole_caches, path, data):
    outer, header, tensors = unpacked(whole_caches)
    both = [outer, header]
    forge(both, data.draw(forgeries(both)))
    outer, header = (*both, None, None)[:2]
    load(path, packed(outer if isinstance(outer, dict) else {}, header, tensors))


@pytest.mark.parametrize("kind", ["whole_snapshot", "whole_layer_snapshot"])
@given(st.data())
def test_forged_snapshots(request, kind, path, data):
    outer, header, tensors = unpacked(request.getfixturevalue(kind))
    both = [outer, header]
    forge(both, data.draw(forgeries(both)))
    outer, header = (*both, None, None)[:2]
    load_snapshot(path, packed(outer if isinstance(outer, dict) else {}, header, tensors))


def forged(whole, change):
    """The file with another header, and for it a checksum that is right."""
    outer, header, tensors = unpacked(whole)
    other = change(header)
    return packed(outer, other if isinstance(other, str) else header, tensors)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda header: DEEP, "recursion"),
        (lambda header: "no JSON", "Expecting value"),
        (lambda header: "[]", "must be an object"),
        (lambda header: header.update(version="2"), "version must be an integer"),
        (lambda header: header.pop("tensors"), "lacks .'tensors'"),
        (lambda header: header.pop("caches"), "lacks .'caches'"),
        (lambda header: header["tensors"]["0.keys"].update(dtype="int32"), "it is float32, not"),
        (lambda header: header["caches"][0].update(offset=4), "holds 4 tokens"),
        (lambda header: header["caches"][0].update(offset=-1), "offset must be an integer from 0"),
        (lambda header: header["caches"][0].update(offset=2**40), "offset must be an integer"),
        (lambda header: header["caches"][0].update(kind=None), "kind must be a string"),
        (lambda header: header["caches"][1]["options"].update(max_size=0), "max_size must be >= 1"),
        (lambda header: header["caches"][1]["options"].update(max_size=3), "holds 3 tokens"),
        (lambda header: header["caches"][1]["options"].update(step=[]), "step must be"),
        (lambda header: header["caches"][1]["options"].update(dtype="float16"), "holds float16"),
        (lambda header: header["caches"][0].update(arrays={"keys": -2}), "not in both"),
        (
            lambda header: header["caches"][0].update(arrays={"values": -2, "keys": -2}),
            "are keys, values",
        ),
        (
            lambda header: header["caches"][0].update(arrays={"keys": -1, "values": -2}),
            "are keys, values",
        ),
        (lambda header: header["caches"].append(header["caches"][0]), "not in both"),
    ],
)
def test_a_forged_header_of_caches_is_named(whole_caches, path, change, match):
    path.write_bytes(forged(whole_caches, change))
    with pytest.raises(DamagedFileError, match=match):
        LayerCaches.load(path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda header: header.update(kind="else"), "kind must be one of 'snapshot'"),
        (lambda header: header.update(span=[3, 0]), "must be a range"),
        (lambda header: header.update(span=[0, 2]), "ascend within the span"),
        (lambda header: header.update(span=[0]), "a list of 2"),
        (lambda header: header.update(tokens=5), "tokens must be a string"),
        (lambda header: header["parts"].pop(), "not in both"),
        (lambda header: header["parts"][0].update(visibility=[4, 0, 0]), "from 1 to"),
        (lambda header: header["parts"][0].update(visibility=[4, None]), "a list of 3"),
        (lambda header: header["parts"][0].update(dtype="float64"), "dtype must be one of"),
        (lambda header: header["parts"][0].update(arrays={"keys": -1, "values": -2}), "3 tokens"),
        (lambda header: header["parts"][0].update(arrays={"keys": 9, "values": -2}), "3 tokens"),
        (lambda header: header["parts"][0].update(arrays={"keys": -2}), "not in both"),
    ],
)
def test_a_forged_header_of_a_snapshot_is_named(whole_snapshot, path, change, match):
    path.write_bytes(forged(whole_snapshot, change))
    with pytest.raises(DamagedFileError, match=match):
        Snapshot.load(path)


def test_a_step_is_no_reason_to_allocate(whole_caches, path):
    """A file of five tokens that asks for gigabytes of spare room loads without."""

    def greedy(header):
        header["caches"][0]["options"]["step"] = 2**31 - 1

    path.write_bytes(forged(whole_caches, greedy))
    loaded, peak = peak_of(lambda: LayerCaches.load(path))
    assert peak < SPARE
    assert loaded[0].nbytes == 5 * 2 * 2 * 4
    assert held(loaded) == held(caches())


def test_keys_alone_are_no_layer_of_a_cache(whole_layer_snapshot, path):
    outer, header, tensors = unpacked(whole_layer_snapshot)
    header["parts"][0]["arrays"] = {"keys": -2}
    del header["tensors"]["0.0.values"]
    start, stop = outer.pop("0.0.values")["data_offsets"]
    tensors = tensors[:start] + tensors[stop:]
    for entry in outer.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= stop:
            entry["data_offsets"] = [offset - stop + start for offset in entry["data_offsets"]]
    path.write_bytes(packed(outer, header, tensors))
    cache = KVCache("numpy")
    with pytest.raises(KVCacheError, match="rows of such a layer are keys, values"):
        cache.restore(Snapshot.load(path))
    assert cache.offset == 0


@pytest.mark.parametrize("change", [{"arrays": {"values": -2, "keys": -2}}, {"arrays": {}}])
def test_rows_of_another_form_are_not_restored(whole_snapshot, path, change):
    """The file fits together, but is none that a pool could have saved."""
    outer, header, tensors = unpacked(whole_snapshot)
    header["parts"][0].update(change)
    if not change["arrays"]:
        for name in ("0.0.keys", "0.0.values"):
            del header["tensors"][name]
        outer = json.loads(json.dumps(outer))
        start = min(outer.pop(name)["data_offsets"][0] for name in ("0.0.keys", "0.0.values"))
        assert start == 0, "the rows of the pool lie first, and are cut off"
        cut = 3 * 2 * 2 * 4 * 2
        tensors = tensors[cut:]
        for name, entry in outer.items():
            if name != "__metadata__":
                entry["data_offsets"] = [offset - cut for offset in entry["data_offsets"]]
    path.write_bytes(packed(outer, header, tensors))
    snapshot = Snapshot.load(path)
    cache = pool()
    before = cache.next_position(0)
    with pytest.raises(KVCacheError, match=r"rows of such a layer|the same heads and head_dim"):
        cache.restore(1, snapshot)
    assert (cache.next_position(0), cache.next_position(1)) == (before, 0)
