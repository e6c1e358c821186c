"""Saved caches: live tokens only, bit for bit on any backend, whole or not at all."""

import hashlib
import json
import os
import re
import stat
import struct
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import kvcache
from kvcache import (
    CacheFileError,
    DamagedFileError,
    DTypeError,
    ForeignFileError,
    KVCache,
    LayerCaches,
    NewerFileError,
    RotatingKVCache,
    get_backend,
)
from kvcache.testing.coded import same

from .oracle import Oracle, Shape, check_whole, fingerprint, oracle_for, push

READERS = ("numpy", "torch", "jax", "mlx", "array_api:array_api_strict")


def layers(backend="numpy", dtype="float32"):
    """A model of four layers, no two alike, one of them empty."""
    where = get_backend(backend)
    caches = [
        KVCache(where, step=4),
        RotatingKVCache(6, 2, where, step=4, dtype=dtype),
        RotatingKVCache(8, backend=where),
        KVCache(where),
    ]
    shape = Shape(1, 2, 3, 4, dtype)
    for cache, chunks in zip(caches, ([5], [9, 1], [3], []), strict=True):
        oracle = oracle_for(cache)
        for tokens in chunks:
            push(cache, oracle, tokens, shape)
    return caches


def described(caches):
    """All that a file must keep of caches: every bit, and how they go on."""
    return [tuple(_described(cache.copy())) for cache in caches]


def _described(cache):
    yield type(cache), cache.offset, cache.len, cache.dtype, cache.positions[: cache.len].tolist()
    yield {name: value for name, value in cache.options.items() if name != "backend"}
    for part in cache.state:
        assert cache.backend is not None
        held = np.ascontiguousarray(cache.backend.to_host(part)[:, :, : cache.len])
        yield held.shape, held.tobytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.safetensors"


# There and back.


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("dtype", get_backend("numpy").dtypes)
def test_any_backend_reads_what_any_other_wrote(backend, reader, dtype, path):
    try:
        where = get_backend(reader)
    except ImportError as error:
        pytest.skip(str(error))
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    caches = layers(backend, dtype)
    LayerCaches(caches).save(path)
    if dtype not in where.dtypes:
        with pytest.raises(DTypeError, match=f"has no dtype '{dtype}'"):
            LayerCaches.load(path, where)
        return
    loaded = LayerCaches.load(path, reader)
    assert described(loaded) == described(caches)
    assert {cache.backend.spec for cache in loaded if cache.backend} == {where.spec}


def test_a_loaded_cache_goes_on(backend, path):
    for cache in (KVCache(backend, step=4), RotatingKVCache(5, 1, backend, step=4)):
        oracle = oracle_for(cache)
        for tokens in (3, 4):
            push(cache, oracle, tokens)
        cache.save(path)
        loaded = type(cache).load(path, backend)
        assert type(loaded) is type(cache)
        for tokens in (1, 6, 1):
            push(loaded, oracle, tokens)
        check_whole(loaded, oracle)
        loaded.reset()
        push(loaded, oracle_for(loaded), 7)


def test_load_is_numpy_unless_told(path):
    caches = layers()
    caches[0].save(path)
    for loaded in (KVCache.load(path), *LayerCaches.load(path), *LayerCaches.load(str(path))):
        assert loaded.backend is not None
        assert loaded.backend.name == "numpy"


def test_no_layers_at_all(path):
    LayerCaches([]).save(path)
    assert list(LayerCaches.load(path)) == []
    with pytest.raises(ForeignFileError, match=r"KVCache\.load reads one KVCache"):
        KVCache.load(path)


def test_a_cache_emptied_by_trim(path):
    cache, oracle = KVCache("numpy"), Oracle()
    push(cache, oracle, 4)
    cache.trim(4)
    cache.save(path)
    loaded = KVCache.load(path)
    assert (loaded.offset, loaded.nbytes, loaded.state) == (0, 0, ())


def test_saving_changes_nothing(backend, path):
    caches = layers(backend)
    caches[1].checkpoint()
    before = [fingerprint(cache) for cache in caches]
    LayerCaches(iter(caches)).save(path)
    assert [fingerprint(cache) for cache in caches] == before
    caches[1].rollback()


def test_live_tokens_only(backend, path):
    """Neither spare capacity, nor trimmed or displaced tokens, nor padding."""
    grown, ring = KVCache(backend, step=4096), RotatingKVCache(16, 4, backend, step=4096)
    shape = Shape(1, 4, 32, 16)
    for cache in (grown, ring):
        push(cache, oracle_for(cache), 40, shape)
    grown.trim(30)
    for cache, held in ((grown, 10), (ring, 16)):
        cache.save(path)
        tokens = held * 4 * (32 + 16) * 4
        assert tokens < path.stat().st_size < tokens + 1500
        with safetensors.safe_open(path, "np") as file:
            assert [file.get_tensor(key).shape[2] for key in file.keys()] == [held, held]  # noqa: SIM118


def test_any_safetensors_reader_reads_the_tensors(path):
    cache, oracle, shape = KVCache("numpy"), Oracle(), Shape()
    push(cache, oracle, 5, shape)
    cache.save(path)
    tensors = safetensors.numpy.load_file(path)
    assert sorted(tensors) == ["0.keys", "0.values"]
    same(tensors["0.keys"], shape.keys(5, 0))
    same(tensors["0.values"], shape.values(5, 0))


# Not what it should be.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "cache"
    LayerCaches(layers()).save(path)
    return path.read_bytes()


def test_one_damaged_byte_anywhere(whole, path):
    """It is found, or it was of no meaning: never another cache, never another kind of error."""
    expected = described(layers())
    found, meaningless = 0, []
    for index in range(len(whole)):
        damaged = bytearray(whole)
        damaged[index] ^= (0x01, 0x04, 0x20, 0x02)[index % 4]
        path.write_bytes(damaged)
        try:
            loaded = LayerCaches.load(path)
        except CacheFileError:
            found += 1
        else:
            assert described(loaded) == expected, f"byte {index}: read as something else"
            meaningless.append(index)
    assert found > 0.97 * len(whole), f"bytes without meaning: {meaningless}"


def test_one_damaged_byte_in_a_tensor(whole, path):
    (size,) = struct.unpack("<Q", whole[:8])
    for index in range(8 + size, len(whole), 7):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        with pytest.raises(DamagedFileError, match=r"damaged: '\d\.(keys|values)' does not match"):
            LayerCaches.load(path)


def test_truncated_anywhere(whole, path):
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(CacheFileError, match=r"cache\.safetensors"):
            LayerCaches.load(path)
    for length in range(200, len(whole), 50):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFileError):
            LayerCaches.load(path)


def test_something_behind_the_end(whole, path):
    path.write_bytes(whole + b"\0")
    with pytest.raises(DamagedFileError):
        LayerCaches.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"hello", b"PK\3\4" + bytes(100), bytes(5000), b"\xff" * 5000, os.urandom(64)],
    ids=["empty", "one byte", "text", "zip", "zeros", "ones", "noise"],
)
def test_not_safetensors(content, path):
    path.write_bytes(content)
    with pytest.raises(ForeignFileError, match=r"cache\.safetensors is not a .*safetensors file"):
        LayerCaches.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_of_somebody_else(metadata, path):
    safetensors.numpy.save_file({"weight": np.ones(3, np.float32)}, path, metadata)
    with pytest.raises(ForeignFileError, match=r"has 'kvcache' in its metadata; .*Load files that"):
        LayerCaches.load(path)


def rewritten(whole, path, change, sealed=True):
    """Writes the file with another header: on purpose, or (not sealed) by damage."""
    (size,) = struct.unpack("<Q", whole[:8])
    outer = json.loads(whole[8 : 8 + size])
    metadata = outer["__metadata__"]
    header = json.loads(metadata["kvcache"])
    change(header)
    metadata["kvcache"] = json.dumps(header)
    if sealed:
        metadata["kvcache.sha256"] = hashlib.sha256(metadata["kvcache"].encode()).hexdigest()
    encoded = json.dumps(outer).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + whole[8 + size :])


@pytest.mark.parametrize("sealed", [True, False])
def test_rewriting_is_what_it_says(whole, path, sealed):
    rewritten(whole, path, lambda header: None, sealed)
    assert described(LayerCaches.load(path)) == described(layers())


@pytest.mark.parametrize("version", [3, 17])
def test_a_newer_format(whole, path, version):
    rewritten(whole, path, lambda header: header.update(version=version))
    with pytest.raises(NewerFileError, match=rf"up to 2; .* has {version}\. Upgrade kvcache"):
        LayerCaches.load(path)
    with pytest.raises(NewerFileError):
        RotatingKVCache.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.clear(),
        lambda header: header.pop("caches"),
        lambda header: header.pop("tensors"),
        lambda header: header.update(version=3),
        lambda header: header["caches"].pop(),
        lambda header: header["caches"][0].pop("kind"),
        lambda header: header["caches"][0].update(offset=4),
        lambda header: header["caches"][3].update(offset=5),
        lambda header: header["caches"][1]["options"].update(max_size=7),
        lambda header: header["caches"][1]["options"].update(keep=6),
        lambda header: header["caches"][1]["options"].update(colour="red"),
        lambda header: header["tensors"].pop("0.keys"),
        lambda header: header["tensors"]["0.keys"].update(dtype="int32"),
        lambda header: header["tensors"]["0.keys"].update(sha256="0" * 64),
    ],
)
def test_a_header_that_is_not_what_was_written(whole, path, change):
    rewritten(whole, path, change, sealed=False)
    with pytest.raises(DamagedFileError, match=r"cache\.safetensors is damaged: its header does"):
        LayerCaches.load(path)


def test_a_header_without_a_seal(whole, path):
    path.write_bytes(whole.replace(b"kvcache.sha256", b"kvcache.sha512"))
    with pytest.raises(DamagedFileError):
        LayerCaches.load(path)


@pytest.mark.parametrize("part", ["0.keys", "1.values"])
def test_a_tensor_that_is_missing(path, part):
    """Another tool may have filtered the file and kept its metadata."""
    LayerCaches(layers()).save(path)
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(path)
    del tensors[part]
    safetensors.numpy.save_file(tensors, path, metadata)
    with pytest.raises(DamagedFileError, match="its header lists"):
        LayerCaches.load(path)


def test_a_tensor_of_another_shape(path):
    """The same bytes, so that no checksum of them would tell."""
    LayerCaches(layers()).save(path)
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(path)
    tensors["0.keys"] = tensors["0.keys"].reshape(2, 1, 5, 3)
    safetensors.numpy.save_file(tensors, path, metadata)
    with pytest.raises(DamagedFileError, match=r"'0\.keys' does not match"):
        LayerCaches.load(path)


def test_another_kind_of_cache(path):
    grown, ring, *_ = layers()
    grown.save(path)
    with pytest.raises(ForeignFileError, match=r"RotatingKVCache.load reads one .* holds KVCache"):
        RotatingKVCache.load(path)
    ring.save(path)
    with pytest.raises(
        ForeignFileError, match=r"holds RotatingKVCache. Use kvcache.LayerCaches.load"
    ):
        KVCache.load(path)
    LayerCaches([grown, grown]).save(path)
    with pytest.raises(
        ForeignFileError, match=r"holds KVCache, KVCache. Use kvcache.LayerCaches.load"
    ):
        KVCache.load(path)


def test_a_kind_from_elsewhere(whole, path):
    rewritten(whole, path, lambda header: header["caches"][0].update(kind="tape"))
    with pytest.raises(ForeignFileError, match=r"of the kinds kv, .*rotating.* holds 'tape'"):
        LayerCaches.load(path)


def test_a_subclass_does_not_take_over_the_files_of_its_base(path):
    program = """
import sys, kvcache, numpy as np
class Mine(kvcache.KVCache):
    "Has no kind of its own."
class Other(kvcache.RotatingKVCache):
    kind = "other"
one = np.ones((1, 1, 1, 1), np.float32)
cache = kvcache.KVCache()
cache.update(one, one)
cache.save(sys.argv[1])
assert type(kvcache.KVCache.load(sys.argv[1])) is kvcache.KVCache
cache = Other(4)
cache.update(one, one)
cache.save(sys.argv[1])
assert type(kvcache.LayerCaches.load(sys.argv[1])[0]) is Other
"""
    run(program, path)


def run(program, *arguments):
    """Runs a program in an interpreter of its own and returns what it printed."""
    command = [sys.executable, "-P", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_file(path):
    for load in (LayerCaches.load, KVCache.load, RotatingKVCache.load):
        with pytest.raises(FileNotFoundError, match=r"cache\.safetensors"):
            load(path)


def test_a_folder(tmp_path):
    with pytest.raises(OSError, match=re.escape(str(tmp_path)) + "|directory|device"):
        LayerCaches.load(tmp_path)


def test_a_failed_load_makes_nothing(whole, path, tmp_path):
    path.write_bytes(whole[:-1])
    with pytest.raises(DamagedFileError):
        LayerCaches.load(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == whole[:-1]


# Whole or not at all.


@pytest.mark.parametrize(("owner", "function"), [(os, "fdopen"), (os, "fsync"), (os, "replace")])
def test_a_failed_save_leaves_the_old_file(owner, function, path, tmp_path, monkeypatch):
    first, second = layers()[:2]
    first.save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    def interrupted(*args):
        raise KeyboardInterrupt

    for failure, error in ((full, OSError), (interrupted, KeyboardInterrupt)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, failure)
            with pytest.raises(error):
                second.save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path], "a partial file was left behind"
    second.save(path)
    assert described([RotatingKVCache.load(path)]) == described([second])


def test_a_full_disk_leaves_the_old_file(path, tmp_path):
    """The operating system's own refusal, half way through the file."""
    layers()[0].save(path)
    before = path.read_bytes()
    program = """
import resource, signal, sys, kvcache, numpy as np
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
cache = kvcache.KVCache()
many = np.ones((1, 1, 1000, 1000), np.float32)
cache.update(many, many)
try:
    cache.save(sys.argv[1])
except OSError as error:
    print(error)
"""
    pytest.importorskip("resource", reason="this system has no limits on file sizes")
    assert run(program, path).strip()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        layers()[0].save(tmp_path / "nowhere" / "cache")


def test_a_reader_sees_the_old_file_or_the_new_one(path):
    """Saving replaces the name; who has the old file open keeps reading the old one."""
    first, second = layers()[:2]
    first.save(path)
    before = path.read_bytes()
    with path.open("rb") as old:
        second.save(path)
        assert old.read() == before
    assert path.read_bytes() != before


def test_who_may_read_it_is_for_the_user_to_say(path):
    """As any other new file: the temporary one's 0600 is not what stays."""
    if os.name != "posix":
        pytest.skip("permissions are those of POSIX")
    previous = os.umask(0o027)
    try:
        layers()[0].save(path)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_errors_are_os_errors():
    for error in (DamagedFileError, ForeignFileError, NewerFileError):
        assert issubclass(error, CacheFileError)
        assert issubclass(error, OSError)
        assert issubclass(error, kvcache.KVCacheError)
