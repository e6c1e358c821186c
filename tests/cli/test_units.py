"""Bytes and times as people write them."""

import pytest

pytest.importorskip("typer", reason="needs pip install 'kvcache[cli]'")

import typer

from kvcache.cli.units import as_bytes, as_seconds, in_bytes, in_time


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("17", 17),
        ("17B", 17),
        ("1k", 1 << 10),
        ("500 MB", 500 << 20),
        ("32MiB", 32 << 20),
        ("1.5G", 3 << 29),
        ("2t", 2 << 40),
    ],
)
def test_bytes_are_read(text, nbytes):
    assert as_bytes("--it", text) == nbytes


@pytest.mark.parametrize("text", ["", "G", "-1", "1e9", "1x", "1" * 16, "\uff11"])
def test_what_is_no_number_of_bytes(text):
    with pytest.raises(typer.BadParameter, match="--it takes bytes like 500M, 64G or"):
        as_bytes("--it", text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (77266944, "73.7 MiB"),
        (1000 << 20, "1,000 MiB"),
        (5 << 40, "5.0 TiB"),
        (5 << 50, "5,120 TiB"),
    ],
)
def test_bytes_are_written(nbytes, text):
    assert in_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0s", 0), ("90m", 5400), ("12h", 43200), ("7d", 604800), ("0.5w", 302400), ("2 D", 172800)],
)
def test_times_are_read(text, seconds):
    assert as_seconds("--it", text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "1y", "1e3s"])
def test_what_is_no_time(text):
    with pytest.raises(typer.BadParameter, match="--it takes a time like 90m, 12h, 7d or 2w; got"):
        as_seconds("--it", text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0s"),
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (7200, "2h"),
        (172800, "2d"),
        (1e9, "11,574d"),
    ],
)
def test_times_are_written(seconds, text):
    assert in_time(seconds) == text
