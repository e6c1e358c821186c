"""Traces of strangers: named errors or the same requests, in bounded memory."""

import gzip
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import FileAccessError
from kvcache.prefix.simulation.trace import read_trace

from ...forging import DEEP, damages, forge, forgeries, peak_of

LINES = [{"timestamp": 5 * at, "hash_ids": list(range(at))} for at in range(6)]
WHOLE = "".join(f"{json.dumps(line)}\n" for line in LINES).encode()
ZIPPED = gzip.compress(WHOLE, mtime=0)
SPARE = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


def shown(requests):
    return [(request.now, request.blocks.tolist()) for request in requests]


def read(path, content):
    """The requests of a file, None for a named error."""
    path.write_bytes(content)
    result, peak = peak_of(lambda: read_trace(path))
    assert peak < 300 * len(content) + SPARE
    if isinstance(result, Exception):
        assert type(result) is ValueError, repr(result)
        assert path.name in str(result)
        return None
    return shown(result)


@given(damages(ZIPPED))
def test_damaged_gzip(folder, content):
    """Its checksum finds damage, except of the header, which says nothing of the content."""
    requests = read(folder / "trace.gz", content)
    assert requests in (None, [], shown(read_trace(write(folder / "whole", WHOLE))))


@given(damages(WHOLE))
def test_damaged_lines(folder, content):
    read(folder / "trace", content)


@given(st.data())
def test_forged_lines(folder, data):
    lines = json.loads(json.dumps(LINES))
    forge(lines, data.draw(forgeries(lines)))
    read(folder / "trace", "".join(f"{json.dumps(line)}\n" for line in lines).encode())


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "line",
    [
        '{"timestamp": NaN, "hash_ids": []}',
        '{"timestamp": Infinity, "hash_ids": []}',
        '{"timestamp": 1' + "0" * 400 + ', "hash_ids": []}',
        '{"timestamp": true, "hash_ids": []}',
        '{"timestamp": 1, "hash_ids": {}}',
        '{"timestamp": 1, "hash_ids": ""}',
        '{"timestamp": 1, "hash_ids": ' + DEEP,
        '{"timestamp": 1, "hash_ids": [' + "9" * 5000 + "]}",
    ],
)
def test_lines_that_are_no_requests(folder, line):
    with pytest.raises(ValueError, match="line 1: a request is a JSON object"):
        read_trace(write(folder / "odd", line.encode()))


def test_every_truncation_of_a_gzipped_file_is_named(folder):
    for length in range(1, len(ZIPPED)):
        with pytest.raises(ValueError, match=r"cut\.gz (ends too early|is damaged)"):
            read_trace(write(folder / "cut.gz", ZIPPED[:length]))


def test_damage_inside_of_a_gzipped_file_is_named(folder):
    for at in range(10, len(ZIPPED)):
        content = ZIPPED[:at] + bytes([ZIPPED[at] ^ 0x55]) + ZIPPED[at + 1 :]
        with pytest.raises(ValueError, match=r"bad\.gz"):
            read_trace(write(folder / "bad.gz", content))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unit", "match"),
    [
        (b"0" * 1000, "at most 16777216 bytes"),
        (b'{"timestamp": 0, "hash_ids": [' + b" " * 100_000 + b"]}\n", "64 times"),
    ],
)
def test_what_unpacks_to_far_more_is_given_up(folder, unit, match):
    """A file of some 100 KB that holds 60 MB."""
    content = gzip.compress(unit * (60_000_000 // len(unit)), mtime=0)
    path = write(folder / "bomb.gz", content)
    result, peak = peak_of(lambda: read_trace(path))
    assert isinstance(result, ValueError)
    assert match in str(result)
    assert peak < 2 * 64 * len(content) + (1 << 28)


def test_what_is_no_file(folder):
    fifo = folder / "fifo.gz"
    os.mkfifo(fifo)
    for path, match in ((fifo, "a FIFO"), (folder, "a directory")):
        with pytest.raises(FileAccessError, match=match):
            read_trace(path)
