"""Stores by URL."""

import pytest

from kvcache.errors import StoreError
from kvcache.stores import FileStore, MemoryStore, ObjectStore, open_store


def test_directories(tmp_path):
    store = open_store(f"file://{tmp_path}/a%20b", budget=100)
    assert isinstance(store, FileStore)
    assert store.directory == tmp_path / "a b"
    assert open_store(f"file://localhost{tmp_path}").directory == tmp_path
    assert open_store(store) is store


def test_memory():
    store = open_store("memory:", budget=100)
    assert isinstance(store, MemoryStore)
    assert store.usage().budget == 100


def test_objects(tmp_path):
    assert isinstance(open_store(f"local://{tmp_path}"), ObjectStore)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("cache", "a store is named by a URL"),
        ("/var/cache", "a store is named by a URL"),
        ("file://server/cache", "with three slashes"),
        ("file:cache", "with three slashes"),
        ("memory://name", "host memory is memory: without a path"),
        ("nothing://host", "fsspec cannot open this URL"),
    ],
)
def test_other_urls(url, message):
    with pytest.raises(StoreError, match=message):
        open_store(url)


def test_no_urls():
    with pytest.raises(TypeError, match=r"a store is a URL or a kvcache\.stores\.Store; got 5"):
        open_store(5)
