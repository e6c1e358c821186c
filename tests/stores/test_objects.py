"""The store of objects: calls that hang or fail, and strangers' objects."""

import threading
from datetime import UTC, datetime

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from kvcache.stores import Corrupt, Deadline, Miss, ObjectStore, Stored, Unavailable

from .values import is_right, item_of, key_of


@pytest.fixture
def store(tmp_path):
    with ObjectStore(f"memory:/{tmp_path}") as opened:
        yield opened


@pytest.fixture
def gate():
    """Set, it lets calls go on that hang."""
    gate = threading.Event()
    yield gate
    gate.set()


def test_a_call_that_hangs_ends_at_the_deadline(store, gate, monkeypatch):
    store.put([item_of(1)])
    read = MemoryFileSystem.cat_file

    def hang(self, path, *arguments, **options):
        if key_of(1).hex() in path:
            gate.wait()
        return read(self, path, *arguments, **options)

    store.put([item_of(2)])
    monkeypatch.setattr(MemoryFileSystem, "cat_file", hang)
    # A second, in which a busy machine begins and ends the other call.
    one, two = store.get([key_of(1), key_of(2)], deadline=Deadline.after(1))
    assert one == Unavailable("the deadline has passed")
    assert is_right(two, 2)


def test_hanging_calls_are_few(store, gate, monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "info", lambda *_, **__: gate.wait())
    threads = threading.active_count()
    for _ in range(1000):
        outcomes = store.contains([key_of(n) for n in range(8)], deadline=Deadline.after(0.02))
        assert {type(outcome) for outcome in outcomes} == {Unavailable}
        if outcomes[0] == Unavailable("32 calls hang"):
            break
    assert outcomes == [Unavailable("32 calls hang")] * 8
    assert threading.active_count() <= threads + 32


def test_errors_of_one_object_are_its_own(store, monkeypatch, caplog):
    store.put([item_of(1)])
    opened = MemoryFileSystem.open

    def fails(self, path, *arguments, **options):
        if key_of(2).hex() in path:
            raise PermissionError("no credentials")
        return opened(self, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "open", fails)
    outcomes = store.put([item_of(2), item_of(3)])
    assert outcomes == [Unavailable("PermissionError: no credentials"), Stored()]
    assert len(caplog.records) == 1


def test_a_failed_upload_leaves_no_object(tmp_path, monkeypatch):
    def fails(self):
        raise OSError("no space")

    with ObjectStore(f"file://{tmp_path}/cache") as store:
        with monkeypatch.context() as patched:
            patched.setattr("tempfile.tempdir", str(tmp_path))
            patched.setattr("fsspec.implementations.local.LocalFileOpener.commit", fails)
            assert store.put([item_of(1)]) == [Unavailable("OSError: no space")]
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        assert store.get([key_of(1)]) == [Miss()]
        assert store.put([item_of(1)]) == [Stored()]


def test_strange_objects_are_no_entries(store):
    store.put([item_of(1)])
    system, path = store._system, store._path(key_of(1))
    folder = path.rsplit("/", 1)[0]
    system.pipe_file(f"{folder}/note", b"hello")
    system.pipe_file(store._path(key_of(2)), b"no frame")
    [entry] = store.entries()
    assert (entry.key, entry.nbytes) == (key_of(1), 1000)
    assert abs(entry.used - datetime.now(UTC).timestamp()) < 1000
    assert isinstance(store.get([key_of(2)])[0], Corrupt)
    assert store.usage().entries == 1


def test_a_folder_that_went_is_made_again(tmp_path):
    with ObjectStore(f"file://{tmp_path}/cache") as store:
        store.put([item_of(1)])
        store.delete([key_of(1)])
        store._system.rm(f"{tmp_path}/cache", recursive=True)
        assert isinstance(store.put([item_of(1)])[0], Unavailable)
        assert store.put([item_of(1)]) == [Stored()]


def test_a_name_shows_no_password():
    with ObjectStore("memory://secret@host/cache") as store:
        assert "memory" in repr(store)
