"""Files are replaced whole or not at all, as their owner left them, and without litter."""

import json
import os
import stat
import subprocess
import sys

import pytest

from kvcache import FileAccessError
from kvcache.storage.reading import open_regular, read_regular
from kvcache.storage.writing import replace_file

if sys.platform == "win32":
    pytest.skip("links, permissions, FIFOs and locks are those of POSIX", allow_module_level=True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_pieces_follow_one_another(path):
    replace_file(path, [b"one", memoryview(b"two"), b""])
    assert path.read_bytes() == b"onetwo"


@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o644, 0o400, 0o755])
def test_permissions_stay(path, permissions):
    path.write_bytes(b"old")
    path.chmod(permissions)
    replace_file(path, [b"new"])
    assert (path.read_bytes(), mode(path)) == (b"new", permissions)


def test_nobody_else_reads_a_private_file_while_it_is_written(path, tmp_path):
    path.write_bytes(b"old")
    path.chmod(0o600)
    seen = []

    def pieces():
        seen.extend(mode(file) for file in tmp_path.iterdir())
        yield b"secret"

    replace_file(path, pieces())
    assert seen == [0o600, 0o600]


@pytest.mark.parametrize(("umask", "permissions"), [(0o022, 0o644), (0o077, 0o600), (0, 0o666)])
def test_a_new_file_follows_the_umask(path, umask, permissions):
    before = os.umask(umask)
    try:
        replace_file(path, [b"new"])
    finally:
        os.umask(before)
    assert mode(path) == permissions


def test_a_symbolic_link_is_followed(path, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "real").write_bytes(b"old")
    path.symlink_to("link")
    (tmp_path / "link").symlink_to("elsewhere/real")
    replace_file(path, [b"new"])
    assert path.is_symlink()
    assert (folder / "real").read_bytes() == b"new"
    assert list(folder.iterdir()) == [folder / "real"]
    (folder / "real").unlink()
    replace_file(path, [b"newer"])
    assert (folder / "real").read_bytes() == b"newer"


def test_file_and_directory_are_on_the_disk(path, monkeypatch):
    """The file before it has its name, the directory after."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def noted(descriptor):
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append("directory" if is_directory else os.fstat(descriptor).st_size)
        fsync(descriptor)

    def renamed(*args):
        calls.append("rename")
        replace(*args)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", renamed)
    replace_file(path, [b"12345"])
    assert calls == [5, "rename", "directory"]


def test_a_directory_that_cannot_be_synchronised_is_no_failure(path, monkeypatch):
    fsync = os.fsync

    def refused(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    replace_file(path, [b"new"])
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [OSError(28, "No space"), MemoryError(), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_alone(path, tmp_path, error):
    path.write_bytes(b"old")

    def pieces():
        yield b"new"
        raise error

    with pytest.raises(type(error)):
        replace_file(path, pieces())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# What is no file.


def fifo(path):
    os.mkfifo(path)


def directory(path):
    path.mkdir()


def loop(path):
    path.symlink_to(path.name)


def below_a_file(path):
    path.parent.rmdir()
    path.parent.write_bytes(b"")


ODD_ONES = [
    (fifo, "a FIFO"),
    (directory, "a directory"),
    (lambda path: path.symlink_to("/dev/zero"), "a device"),
    (loop, "loop of symbolic links|Too many levels"),
    (below_a_file, "Not a directory"),
]


@pytest.mark.parametrize(("make", "match"), ODD_ONES)
@pytest.mark.parametrize("use", [read_regular, lambda path: replace_file(path, [b"new"])])
def test_what_is_no_file_is_refused_at_once(tmp_path, make, match, use):
    path = tmp_path / "folder" / "odd"
    path.parent.mkdir()
    make(path)
    with pytest.raises(FileAccessError, match=match) as caught:
        use(path)
    assert "odd" in str(caught.value)
    if path.parent.is_dir():
        assert list(path.parent.iterdir()) == [path]


def test_a_name_with_a_zero_byte():
    for use in (read_regular, lambda path: replace_file(path, [b""])):
        with pytest.raises(FileAccessError, match="null"):
            use("a\0b")


def test_what_is_not_there(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="file"):
        read_regular(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        replace_file(tmp_path / "nowhere" / "file", [b""])


def test_missing_permissions_are_named(path, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may open everything")
    path.write_bytes(b"secret")
    path.chmod(0)
    with pytest.raises(FileAccessError, match=r"Permission denied\. Check the path"):
        read_regular(path)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(FileAccessError, match="permissions of the directory"):
            replace_file(tmp_path / "new", [b""])
    finally:
        tmp_path.chmod(0o700)


def test_refused_by_the_system_is_named(path, monkeypatch):
    """As above, also where the tests run as root."""
    path.write_bytes(b"secret")

    def refused(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(FileAccessError, match=r"file cannot be opened: Permission denied"):
        open_regular(path)
    with pytest.raises(FileAccessError, match=r"file cannot be saved: Permission denied in"):
        replace_file(path, [b""])


# Writers that were killed, and others at work.

KILLED = """
import os, sys
from kvcache.storage.writing import replace_file
def pieces():
    yield b"new"
    print("half", flush=True)
    sys.stdin.readline()          # until killed
    yield b"newer"
replace_file(sys.argv[1], pieces())
"""


def writer(path):
    """A process that has written half of a file, and waits."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", KILLED, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"half\n"
    return process


def end(process):
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_a_killed_writer_leaves_the_old_file_and_the_next_one_cleans_up(path, tmp_path):
    path.write_bytes(b"old")
    killed = [writer(path) for _ in range(3)]
    assert len(list(tmp_path.iterdir())) == 4
    for process in killed:
        end(process)
        assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 4, "nobody has cleaned up yet"
    replace_file(path, [b"fresh"])
    assert path.read_bytes() == b"fresh"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_the_file_of_a_writer_at_work_is_left_alone(path, tmp_path):
    working, killed = writer(path), writer(path)
    end(killed)
    try:
        replace_file(path, [b"mine"])
        assert path.read_bytes() == b"mine"
        assert len(list(tmp_path.iterdir())) == 2
        working.communicate(b"\n")
        assert path.read_bytes() == b"newnewer"
        assert list(tmp_path.iterdir()) == [path]
    finally:
        end(working)


def test_files_of_others_are_left_alone(path, tmp_path):
    others = ["file.0.partial", ".other.0.partial", ".file.partial", ".file.x.partial"]
    for name in others:
        (tmp_path / name).write_bytes(b"precious")
    replace_file(path, [b"new"])
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*others, "file"])


@pytest.mark.parametrize("make", [fifo, directory, lambda path: path.symlink_to("victim")])
def test_odd_things_under_the_name_of_a_partial_file(path, tmp_path, make):
    (tmp_path / "victim").write_bytes(b"precious")
    make(tmp_path / ".file.0.partial")
    replace_file(path, [b"new"])
    assert path.read_bytes() == b"new"
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_long_names(tmp_path):
    path = tmp_path / ("é" * 120)
    replace_file(path, [b"new"])
    replace_file(path, [b"newer"])
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]


READER = """
import sys
import kvcache
path = sys.argv[1]
print("ready", flush=True)
offsets = set()
for line in sys.stdin:            # one line for each file that the writer has replaced
    offsets.add(kvcache.LayerCaches.load(path).offset)
print(sorted(offsets), flush=True)
"""


@pytest.mark.slow
def test_a_reader_beside_a_writer_reads_one_file_or_the_other(path, monkeypatch):
    """The file is replaced in each moment between two system calls of a reader."""
    import numpy as np

    from kvcache import KVCache, LayerCaches

    caches = []
    for tokens in (3, 5):
        cache = KVCache("numpy")
        rows = np.full((1, 1, tokens, 2), tokens, np.float32)
        cache.update(rows, rows)
        caches.append(LayerCaches([cache]))
    caches[0].save(path)
    real_open, real_fstat, moments = os.open, os.fstat, []

    def replacing(call):
        def replaced(*args, **options):
            result = call(*args, **options)
            if not moments or moments[-1] != "saving":
                moments.append("saving")
                caches[len(moments) % 2].save(path)
                moments.append(call)
            return result

        return replaced

    monkeypatch.setattr(os, "open", replacing(real_open))
    monkeypatch.setattr(os, "fstat", replacing(real_fstat))
    for _ in range(20):
        assert LayerCaches.load(path).offset in (3, 5)
    assert {real_open, real_fstat} <= set(moments)
    monkeypatch.undo()

    process = subprocess.Popen(
        [sys.executable, "-P", "-c", READER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"ready\n"
    for number in range(200):  # the pipe lets the reader fall behind, never run ahead
        caches[number % 2].save(path)
        process.stdin.write(b"\n")
        process.stdin.flush()
    output, _ = process.communicate()
    assert process.returncode == 0
    assert set(json.loads(output)) <= {3, 5}
