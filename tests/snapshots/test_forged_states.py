"""Damaged and forged files of recurrent layers: named errors or the same content."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import (
    CacheFileError,
    DamagedFileError,
    KVCacheError,
    LayerCaches,
    NotSupportedError,
    Snapshot,
    StateCache,
)

from ..forging import damages, forge, forgeries, packed, peak_of, unpacked

SPARE = 1 << 20


def caches():
    cache = StateCache("numpy")
    cache.schedule([2])
    for position in (1, 2, 3):
        cache.advance(1, np.full((1, 2, 2), position, "f4"), np.full((1, 3), position, "i4"))
    return LayerCaches([cache])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("forged") / "file"


@pytest.fixture(scope="module")
def whole(path):
    """The bytes of a file of caches, and of a snapshot."""
    caches().save(path)
    saved = path.read_bytes()
    caches().snapshot().save(path)
    return {"caches": saved, "snapshot": path.read_bytes()}


def held(loaded):
    """The states of a cache by their positions, after checking that it goes on."""
    [cache] = loaded
    states = {cache.offset: [array.tobytes() for array in cache.state]}
    twin = cache.copy()
    for position in reversed(cache.kept[:-1]):
        twin.trim(twin.offset - position)
        states[position] = [array.tobytes() for array in twin.state]
    if cache.offset:
        twin.advance(1, *cache.state)
    return states


def load(path, kind, data, same):
    """Load caches or a snapshot: the same content, or a named error, in bounded memory."""
    path.write_bytes(data)
    read = LayerCaches.load if kind == "caches" else Snapshot.load
    result, peak = peak_of(lambda: read(path))
    assert peak < 12 * len(data) + SPARE
    if isinstance(result, Exception):
        assert isinstance(result, CacheFileError | NotSupportedError), repr(result)
        return
    if kind == "snapshot":
        restored = LayerCaches([StateCache("numpy")])
        error, _ = peak_of(lambda: restored.restore(result))
        if error is not None:
            assert isinstance(error, KVCacheError) or "from position 0" in str(error), repr(error)
            return
        result = restored
    content = held(result)
    if same:
        expected = held(caches())
        assert content == {position: expected[position] for position in content}


@pytest.mark.parametrize("kind", ["caches", "snapshot"])
@given(data=st.data())
def test_damaged(whole, path, kind, data):
    load(path, kind, data.draw(damages(whole[kind])), True)


@pytest.mark.parametrize("kind", ["caches", "snapshot"])
@given(data=st.data())
def test_forged(whole, path, kind, data):
    outer, header, tensors = unpacked(whole[kind])
    both = [outer, header]
    forge(both, data.draw(forgeries(both)))
    outer, header = (*both, None, None)[:2]
    load(path, kind, packed(outer if isinstance(outer, dict) else {}, header, tensors), False)


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("caches", lambda record: record.update(offset=4), "ascending positions from 1 to the"),
        ("caches", lambda record: record.update(options={"step": 1}), "takes .*backend"),
        (
            "caches",
            lambda record: record.update(arrays={"state0": 0, "positions": 0, "state1": 0}),
            r"arrays state0, state1, \.\.\.",
        ),
        ("caches", lambda record: record["arrays"].update(state1=-1), r"arrays state0, state1"),
        ("snapshot", lambda record: record.update(dtype=["float64", "int32"]), "dtype must be one"),
        ("snapshot", lambda record: record.update(dtype=[]), None),
        ("snapshot", lambda record: record["arrays"].update(state0=1), "must have 2 tokens on"),
    ],
)
def test_a_forged_header_is_named(whole, path, kind, change, match):
    outer, header, tensors = unpacked(whole[kind])
    change(header["caches" if kind == "caches" else "parts"][0])
    path.write_bytes(packed(outer, header, tensors))
    if match is None:
        StateCache("numpy").restore(Snapshot.load(path))  # it says nothing of the rows
        return
    read = LayerCaches.load if kind == "caches" else Snapshot.load
    with pytest.raises((DamagedFileError, NotSupportedError), match=match):
        read(path)
