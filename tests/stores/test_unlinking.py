"""Names of files go at once, their bytes beside other work; no descriptor stays."""

import contextlib
import os
import threading
from pathlib import Path

import pytest

from kvcache.stores import FileStore, Item, Stored
from kvcache.stores.unlinking import Unlinking

from .servers import wait_for
from .values import key_of

LARGE = 1 << 20


def held(directory):
    """Return how many descriptors of this process are of files that were in a directory."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("no /proc here, which tells of open files")
    count = 0
    for descriptor in descriptors.iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            target = str(descriptor.readlink())
            count += target.startswith(str(directory)) and target.endswith(" (deleted)")
    return count


def wait_until_freed(directory):
    wait_for(lambda: not held(directory), "all bytes are freed")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(LARGE))
    return path


def test_the_name_goes_at_once_and_the_bytes_behind_the_block(tmp_path, path):
    with Unlinking() as unlinking:
        unlinking.unlink(path, LARGE)
        assert not path.exists()
        assert held(tmp_path) == 1
    wait_until_freed(tmp_path)


def test_small_files_are_not_held(tmp_path, path):
    with Unlinking() as unlinking:
        unlinking.unlink(path, LARGE - 1)
        assert not held(tmp_path)
    assert not path.exists()


def test_few_files_are_held(tmp_path):
    with Unlinking() as unlinking:
        for number in range(40):
            path = tmp_path / f"{number}"
            path.touch()
            unlinking.unlink(path, LARGE)
        assert held(tmp_path) == 16
    wait_until_freed(tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_of_other_things(tmp_path, path):
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(path)
    os.mkfifo(pipe)
    with Unlinking() as unlinking:
        for name in (link, pipe, tmp_path / "absent"):
            unlinking.unlink(name, LARGE)
    wait_until_freed(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_raises_holds_nothing(tmp_path, path):
    def fail():
        with Unlinking() as unlinking:
            unlinking.unlink(path, LARGE)
            raise OSError("the index is full")

    with pytest.raises(OSError, match="the index is full"):
        fail()
    wait_until_freed(tmp_path)


def test_without_a_thread(tmp_path, path, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with Unlinking() as unlinking:
        unlinking.unlink(path, LARGE)
    assert not held(tmp_path)


def test_evictions_of_a_store_leave_no_descriptor(tmp_path):
    item = [bytes(LARGE)]
    with FileStore(tmp_path, budget=2 * LARGE + 1000) as store:
        for number in range(6):
            assert store.put([Item(key_of(number), item)]) == [Stored()]
        wait_until_freed(tmp_path)
        assert len(list(store.entries())) == 2
        assert store.stats.evicted == 4
