"""Values with key and checksum: forged headers, which pass every checksum, and pieces."""

import struct

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvcache.stores import Corrupt, Hit
from kvcache.stores.frames import OVERHEAD, IncomingFrame, checked, framed

from .values import LABEL, is_right, item_of, key_of

FIELDS = {"magic": (0, "<8s"), "version": (8, "<I"), "reserved": (12, "<I"), "length": (16, "<Q")}


def frame_of(number, nbytes=1000):
    return b"".join(framed(item_of(number, nbytes)))


def forged(field, value):
    """A frame with another field, and a checksum that fits."""
    place, form = FIELDS[field]
    frame = bytearray(frame_of(1))
    struct.pack_into(form, frame, place, value)
    frame[-16:] = xxhash.xxh3_128_digest(frame[:-16])
    return bytes(frame)


def incoming(key, frame, pieces):
    """The outcome of a frame that comes in pieces of so many bytes."""
    own = IncomingFrame(key, len(frame))
    start = 0
    for nbytes in pieces:
        piece = frame[start : start + nbytes]
        own.buffer[start : start + len(piece)] = piece
        own.received(len(piece))
        start += len(piece)
    return own.finish()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("magic", b"KVCOTHER", "a frame begins with"),
        ("version", 2, "frames of version 1 are read; got 2"),
        ("reserved", 1, "frames of version 1 are read"),
        ("length", 999, "the frame of 999 bytes has 1143; got 1144"),
        ("length", 2**63, "the frame of"),
    ],
)
def test_forged_headers(field, value, message):
    frame = forged(field, value)
    for outcome in (
        checked(key_of(1), memoryview(frame)),
        incoming(key_of(1), frame, [len(frame)]),
    ):
        assert isinstance(outcome, Corrupt)
        assert message in outcome.reason


@given(st.lists(st.integers(0, 300), max_size=12))
def test_a_frame_in_any_pieces(pieces):
    frame = frame_of(1)
    outcome = incoming(key_of(1), frame, pieces)
    if sum(pieces) < len(frame):
        assert outcome == Corrupt(f"{sum(pieces)} of {len(frame)} bytes came")
    else:
        assert is_right(outcome, 1)
    assert is_right(incoming(key_of(1), frame, [*pieces, len(frame)]), 1)


@pytest.mark.parametrize("nbytes", [0, 1, OVERHEAD - 1])
def test_too_short(nbytes):
    frame = frame_of(1)[:nbytes]
    assert isinstance(checked(key_of(1), memoryview(frame)), Corrupt)
    assert isinstance(incoming(key_of(1), frame, [nbytes]), Corrupt)


def test_the_form_stays_the_same():
    """Files outlive versions: a change of these bytes is a change of the format."""
    frame = frame_of(1, 20)
    assert frame[:24] == b"KVCSTORE" + struct.pack("<IIQ", 1, 0, 20)
    assert frame[24:56] == key_of(1)
    assert frame[56:88] == LABEL.layout
    assert frame[88:120] == LABEL.parent
    assert frame[120:128] == struct.pack("<II", LABEL.start, LABEL.stop)
    assert frame[128:148] == bytes(item_of(1, 20).buffers[0]) + bytes(item_of(1, 20).buffers[1])
    assert frame[148:] == xxhash.xxh3_128(frame[:148]).digest()
    assert isinstance(checked(key_of(1), memoryview(frame)), Hit)
