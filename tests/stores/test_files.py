"""The store in a directory: what several processes, a kill, a full disk and strangers do to it."""

import errno
import logging
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from kvcache.stores import (
    Corrupt,
    Deadline,
    Deleted,
    FileStore,
    Hit,
    Item,
    Miss,
    Present,
    Refused,
    Stored,
    Unavailable,
)
from tests import peek

from .scripts import run
from .values import LABEL, is_right, item_of, key_of

NUMBERS = range(8)


def files_in(place, folder):
    return [path for path in (place / folder).rglob("*") if path.is_file()]


def path_of(place, number):
    key = key_of(number).hex()
    return place / "objects" / key[:2] / key


@pytest.fixture
def place(tmp_path):
    return tmp_path / "cache"


# Killed, and several at once.


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_line(place, seed):
    """A hundred times each: no wrong value, no file without an account, no heap of partial ones."""
    assert run("killed.py", place, 100, seed) == ""


def test_processes_at_once(place):
    assert run("load.py", place, 4, 60) == ""


@pytest.mark.matrix
def test_many_processes_under_load(place):
    assert run("load.py", place, 8, 3000) == ""


def test_threads_at_once_write_each_value_once(place):
    with FileStore(place) as store:
        outcomes = []

        def work():
            outcomes.extend(store.put([item_of(number, 50_000) for number in NUMBERS]))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [outcome for outcome in outcomes if outcome != Stored()]
        assert {*refused} <= {Refused("another thread is writing it")}
        assert all(is_right(store.get([key_of(number)])[0], number) for number in NUMBERS)


FORKED = """
import os, sys
from kvcache.stores import FileStore, Item, Present, Stored
one, two, three = ([Item(bytes([number]) * 32, [b"value"])] for number in range(3))
with FileStore(sys.argv[1]) as store:
    store.put(one)
    child = os.fork()
    if not child:
        stored = store.put(two) == [Stored()]
        os._exit(not (stored and len(os.listdir(sys.argv[1] + "/writers")) == 2))
    assert os.waitpid(child, 0)[1] == 0
    assert store.put(three) == [Stored()]
    assert store.contains([item.key for item in one + two + three]) == [Present()] * 3
"""


def test_a_forked_child_is_a_writer_of_its_own(place):
    """In a process of its own, without threads of frameworks, which a fork would warn of."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED, place], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_value_that_another_process_writes_is_left_to_it(place):
    with FileStore(place) as one, FileStore(place) as two:
        one.put([item_of(0)])
        written = []
        with peek.writing(one, item_of(1)):
            written += two.put([item_of(1)])
            written += two.delete([key_of(1)])
        assert written == [Refused("another process is writing it"), Miss()]
        assert two.put([item_of(1)]) == [Stored()]


def test_what_another_thread_writes_keeps_its_account(place):
    with FileStore(place) as store:
        store.put([item_of(0)])
        with peek.writing(store, item_of(1)):
            store.put([item_of(2)])
            assert store.usage().entries == 3
        assert store.usage().entries == 2  # it wrote no file


def test_the_oldest_use_goes_first_whoever_used_it(place):
    size = 1000
    budget = 3 * (size + 144)
    with FileStore(place, budget) as one, FileStore(place, budget) as two:
        one.put([item_of(number, size) for number in (1, 2, 3)])
        two.get([key_of(1)])
        two.put([item_of(4, size)])
        held = [one.contains([key_of(number)])[0] == Present() for number in (1, 2, 3, 4)]
        assert held == [True, False, True, True]


# What the system refuses.


def test_a_full_disk(place, monkeypatch, caplog):
    with FileStore(place) as store:
        store.put([item_of(0)])

        def full(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "writev", full)
            outcomes = store.put([item_of(1), item_of(2)])
        assert outcomes == [Unavailable("OSError: [Errno 28] No space left on device")] * 2
        assert store.stats.unavailable == 2
        warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert "the store is unavailable" in warnings[0].getMessage()
        assert not files_in(place, "partial")
        assert store.usage().entries == 1
        assert store.put([item_of(1)]) == [Stored()]


FILE_LIMIT = """
import resource, sys
from kvcache.stores import FileStore, Item, Unavailable
store = FileStore(sys.argv[1])
assert not isinstance(store.put([Item(bytes(32), [b"small"])])[0], Unavailable)
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
[outcome] = store.put([Item(b"k" * 32, [bytes(1_000_000)])])
assert isinstance(outcome, Unavailable), outcome
assert store.get([bytes(32)])[0].value == b"small"
assert store.usage().entries == 1, store.usage()
"""


def test_a_file_that_the_system_ends(place):
    """A write that stops in the middle, of a real system call."""
    done = subprocess.run(
        [sys.executable, "-c", FILE_LIMIT, place], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not files_in(place, "partial")


READ_ONLY = """
import os, sys
from kvcache.stores import FileStore, Present, Unavailable
if os.geteuid() == 0:
    os.setgid(65534), os.setuid(65534)
store = FileStore(sys.argv[1])
assert store.get([b"k" * 32])[0].value == b"value"
assert store.contains([b"k" * 32]) == [Present()]
assert [entry.nbytes for entry in store.entries()] == [5]
from kvcache.stores import Item
for number in range(3):
    assert isinstance(store.put([Item(bytes(32), [b"other"])])[0], Unavailable)
    assert isinstance(store.delete([b"k" * 32])[0], Unavailable)
assert store.stats.unavailable == 6
store.close()
"""


def test_a_directory_that_may_only_be_read():
    with tempfile.TemporaryDirectory() as parent:  # pytest's own are closed to other users
        place = Path(parent) / "cache"
        with FileStore(place) as store:
            store.put([Item(b"k" * 32, [b"value"])])
        Path(parent).chmod(0o755)
        for path in [place, *place.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            done = subprocess.run(
                [sys.executable, "-c", READ_ONLY, place],
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            for path in [place, *place.rglob("*")]:
                path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the store is unavailable") == 1


def test_a_file_in_place_of_the_directory(place):
    place.write_bytes(b"")
    with FileStore(place) as store:
        assert isinstance(store.get([key_of(1)])[0], Unavailable)
        assert isinstance(store.put([item_of(1)])[0], Unavailable)
        assert isinstance(store.usage(), Unavailable)


def test_a_store_that_is_only_read_makes_nothing(place):
    with FileStore(place) as store:
        assert store.get([key_of(1)]) == store.contains([key_of(1)]) == [Miss()]
    assert not place.exists()


def test_a_new_directory_is_private(place):
    with FileStore(place) as store:
        store.put([item_of(1)])
    assert place.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("taken", [0, 1, 128, 200, 1000])
def test_a_system_that_takes_less_than_all(place, monkeypatch, taken):
    write = os.write
    monkeypatch.setattr(os, "writev", lambda file, pieces: write(file, b"".join(pieces)[:taken]))
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:301]))
    with FileStore(place) as store:
        assert store.put([item_of(1)]) == [Stored()]
        assert is_right(store.get([key_of(1)])[0], 1)


def test_values_of_many_buffers(place):
    whole = item_of(1, 9_000_000)
    value = b"".join(whole.buffers)
    pieces = [value[start : start + 5001] for start in range(0, len(value), 5001)]
    with FileStore(place) as store:
        assert store.put([whole._replace(buffers=pieces)]) == [Stored()]
        assert is_right(store.get([key_of(1)])[0], 1)


# Time.


def test_a_locked_index_ends_at_the_deadline(place):
    with FileStore(place) as store:
        store.put([item_of(1)])
        other = sqlite3.connect(place / "index.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        # Time enough to come as far as the index, on a busy machine too.
        [outcome] = store.put([item_of(2)], deadline=Deadline.after(0.5))
        assert outcome == Unavailable("OperationalError: database is locked")
        assert is_right(store.get([key_of(1)])[0], 1)  # a read needs no index
        other.close()
        assert store.put([item_of(2)]) == [Stored()]
        assert not files_in(place, "partial")


def test_a_put_that_ends_in_the_middle_leaves_nothing(place, monkeypatch):
    with FileStore(place) as store:
        store.put([item_of(0)])
        deadline = Deadline.after(1000)
        writev = os.writev

        def slow(descriptor, pieces):
            deadline.at = 0  # by the time it is written
            return writev(descriptor, pieces)

        monkeypatch.setattr(os, "writev", slow)
        [outcome] = store.put([item_of(1)], deadline=deadline)
        assert outcome == Unavailable("TimeoutError: the deadline has passed")
        assert store.contains([key_of(1)]) == [Miss()]
        assert not files_in(place, "partial")
        assert store.usage().entries == 1


def test_keys_read_before_the_deadline_are_hits(place, monkeypatch):
    with FileStore(place) as store:
        store.put([item_of(1), item_of(2)])
        deadline = Deadline.after(1000)
        close = os.close

        def slow(descriptor):
            deadline.at = 0
            close(descriptor)

        monkeypatch.setattr(os, "close", slow)
        one, two = store.get([key_of(1), key_of(2)], deadline=deadline)
        assert is_right(one, 1)
        assert two == Unavailable("TimeoutError: the deadline has passed")


def test_ctrl_c_in_a_put_leaves_nothing(place, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with FileStore(place) as store:
        store.put([item_of(0)])
        with monkeypatch.context() as patched:
            patched.setattr(os, "writev", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.put([item_of(1)])
        assert not files_in(place, "partial")
        assert store.usage().entries == 1
        assert store.put([item_of(1)]) == [Stored()]


# Damage.


def test_a_whole_file_that_came_meanwhile_is_not_removed(place, monkeypatch):
    with FileStore(place) as store:
        store.put([item_of(1)])
        path = path_of(place, 1)
        whole = path.with_name("whole")
        whole.write_bytes(path.read_bytes())

        def ends_early(descriptor, buffers):
            whole.replace(path)  # by another process
            return 0

        with monkeypatch.context() as patched:
            patched.setattr(os, "readv", ends_early)
            assert isinstance(store.get([key_of(1)])[0], Corrupt)
        assert is_right(store.get([key_of(1)])[0], 1)


def test_damage_is_told_once(place, caplog):
    with FileStore(place) as store:
        store.put([item_of(number) for number in NUMBERS])
        for number in NUMBERS:
            path_of(place, number).write_bytes(b"damaged")
        outcomes = store.get([key_of(number) for number in NUMBERS])
        assert all(isinstance(outcome, Corrupt) for outcome in outcomes)
        [record] = caplog.records
        assert record.getMessage() == (
            f"{store!r}: a value is damaged: a frame has 144 bytes or more; got 7. Further cases "
            "are counted in its stats only."
        )
        assert store.stats.corrupt == len(NUMBERS)
        assert store.usage().entries == 0


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(__file__)])
def test_what_is_no_file_is_never_read(place, make):
    with FileStore(place) as store:
        store.put([item_of(1)])
        path_of(place, 1).unlink()
        make(path_of(place, 1))
        [outcome] = store.get([key_of(1)])
        assert isinstance(outcome, Corrupt | Unavailable)


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("content", [b"", b"no database" * 1000, None])
def test_a_damaged_index_is_made_anew(place, content, suffix):
    with FileStore(place) as store:
        store.put([item_of(number) for number in NUMBERS])
    index = place / f"index.sqlite{suffix}"
    if content is not None:
        index.write_bytes(content)
    else:
        index.unlink(missing_ok=True)
    with FileStore(place, budget=5 * 1144) as store:
        assert store.usage().entries == len(NUMBERS)
        assert {entry.label for entry in store.entries()} == {LABEL}
        assert store.put([item_of(100)]) == [Stored()]
        assert store.usage().entries == 5
        assert len(files_in(place, "objects")) == 5


def test_an_index_that_goes_while_it_is_used(place):
    with FileStore(place) as store:
        store.put([item_of(1)])
        for path in place.glob("index.sqlite*"):
            path.unlink()
        assert store.put([item_of(2)]) == [Stored()]
        assert store.usage().entries == 2


def test_an_index_of_another_version(place):
    with FileStore(place) as store:
        store.put([item_of(1)])
    index = sqlite3.connect(place / "index.sqlite")
    index.execute("PRAGMA user_version = 99")
    index.close()
    with FileStore(place) as store:
        [outcome] = store.put([item_of(2)])
        assert "indexes of version 1 are read" in outcome.reason
        assert isinstance(store.get([key_of(1)])[0], Hit)


def test_strange_files_are_no_entries(place):
    with FileStore(place) as store:
        store.put([item_of(1)])
    (place / "objects" / "note").write_text("hello")
    (place / "objects" / key_of(1).hex()[:2] / "note").write_text("hello")
    forged = path_of(place, 2)
    forged.parent.mkdir(exist_ok=True)
    forged.write_bytes(b"no frame")
    (place / "index.sqlite").unlink()
    with FileStore(place) as store:
        assert store.usage().entries == 1
        assert [entry.key for entry in store.entries()] == [key_of(1)]
    assert not forged.exists()


def test_files_that_went_are_no_entries(place):
    with FileStore(place) as store:
        store.put([item_of(number) for number in NUMBERS])
        path_of(place, 3).unlink()
        assert store.get([key_of(3)]) == [Miss()]
        assert store.put([item_of(3)]) == [Stored()]
        assert is_right(store.get([key_of(3)])[0], 3)
        path_of(place, 4).unlink()
    with FileStore(place) as store:
        assert store.usage().entries == len(NUMBERS) - 1


def test_uses_are_kept(place):
    with FileStore(place) as store:
        store.put([item_of(1), item_of(2)])
        for _ in range(3):
            store.get([key_of(1)])
    with FileStore(place) as store:
        assert {entry.key: entry.uses for entry in store.entries()} == {key_of(1): 3, key_of(2): 0}


def test_deleted_files_are_gone(place):
    with FileStore(place) as store:
        store.put([item_of(1)])
        assert store.delete([key_of(1), key_of(2)]) == [Deleted(), Miss()]
        assert not files_in(place, "objects")
        assert store.usage().nbytes == 0
