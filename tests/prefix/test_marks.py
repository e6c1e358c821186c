"""Drawings mark why requests compute tokens that the tree knows, and say what the marks mean."""

import xml.etree.ElementTree as ET
from textwrap import dedent

import numpy as np
import pytest

import kvcache
from kvcache import KVCache
from kvcache.prefix import PrefixCache
from kvcache.prefix.radix import RadixTree
from kvcache.prefix.render import render
from kvcache.prefix.spans import Span

from .served import MODELS, Server
from .tiered import FIRST, REPLY

pytest.importorskip("rich")
NUMPY = kvcache.get_backend("numpy")


def drawn(name="full", **options):
    """A server with two conversations that part at position 6, at 17 seconds by its clock."""
    server = Server(MODELS[name](NUMPY), clock=lambda: 17.0, **options)
    server.ask(FIRST, REPLY, resume_points=[3])
    server.ask([*FIRST[:6], 70, 71])
    return server


def picture(text):
    """A picture in a test, as it is drawn."""
    return f"{dedent(text).strip()}\n"


def test_what_is_reused_from_anywhere_has_no_mark():
    assert drawn().prefix.render() == picture("""
        prefix cache, 288 B stored
        └── [0, 6)  1 2 3 4 5 6  144 B resident, used 2x
            ├── [6, 10)  7 8 9 10  96 B resident, used 2x
            └── [6, 8)  70 71  48 B resident, used 1x
        """)


def test_what_was_evicted():
    server = drawn(policy="s3fifo")
    server.prefix.trim(150)
    server.ask([5], salt="b")
    assert server.prefix.render() == picture("""
        prefix cache, 168 B stored
        ├── [0, 6)  1 2 3 4 5 6  144 B resident, used 2x
        │   ├── ✗ [6, 10)  7 8 9 10  evicted by s3fifo at 17 s
        │   └── ✗ [6, 8)  70 71  evicted by s3fifo at 17 s
        └── salt 'b'
            └── [0, 1)  5  24 B resident, used 1x
        ✗ evicted: computed again, or fetched from a store
        """)


def test_what_can_be_resumed_at_some_positions_only():
    assert drawn("recurrent").prefix.render() == picture("""
        prefix cache, 1.094 KiB stored
        └── ◐ [0, 6)  1 2 3 4 5 6  320 B host, used 2x; resume points 3, 6; limited by cache 0
            ├── ◐ [6, 10)  7 8 9 10  480 B host, used 2x; resume points 7, 8, 10; limited by cache 0
            └── ◐ [6, 8)  70 71  320 B host, used 1x; resume points 7, 8; limited by cache 0
        ◐ stored, and requests can go on at its resume points only
        """)


def test_the_resume_points_are_those_of_requests():
    for name in ("window", "hybrid pool", "layers of both"):
        server = drawn(name)
        for line in server.prefix.render(width=200).splitlines():
            if "; limited by" in line:
                points = line.split("resume points ")[1].split("; ")[0].removeprefix("… ")
                ids = [*FIRST[:6], 70, 71] if "70 71" in line else [*FIRST, *REPLY]
                for point in map(int, points.split(", ")):
                    assert server.prefix.lookup([*ids[:point], 99]).matched == point


def test_a_turn_that_gave_up_its_state():
    server = Server(MODELS["recurrent"](NUMPY), policy="cost")
    server.ask([1, 2, 3])
    server.ask([1, 2, 3, 4, 5])
    server.prefix.trim(server.prefix.stats.nbytes - 1)
    assert server.prefix.render() == picture("""
        prefix cache, 320 B stored
        └── ◐ [0, 3)  1 2 3  0 B resident, used 2x; no resume point; limited by cache 0
            └── ◐ [3, 5)  4 5  320 B host, used 1x; resume points 4, 5; limited by cache 0
        ◐ stored, and requests can go on at its resume points only
        """)


def test_what_was_never_stored():
    tree = RadixTree()
    node = tree.insert(np.arange(3, dtype=np.int32))
    node.value = Span(tree, node)
    assert render({"": tree}, 0, "lru", None, False, 80) == picture("""
        prefix cache, 0 B stored
        └── ○ [0, 3)  0 1 2  not stored
        ○ known, and never stored: computed
        """)


def test_media():
    prefix, ids = PrefixCache([KVCache("numpy")]), [1, 2, 9, 9, 9, 4]
    with prefix.session(ids, media={(2, 5): "cat"}) as session:
        rows = np.zeros((1, 1, session.remaining.size, 1), np.float32)
        session.caches[0].update(rows, rows)
    assert prefix.render() == picture("""
        prefix cache, 48 B stored
        └── [0, 6)  1 2 -1 -1 -1 4  48 B host, used 1x; no hit ends inside of [2, 5)
        """)


def test_marks_in_a_picture():
    server = drawn("recurrent")
    server.prefix.trim(900)
    words = "".join(ET.fromstring(server.prefix.render(svg=True)).itertext()).replace("\xa0", " ")
    for shown in (
        "✗ [6, 8)  70 71  evicted by lru at 17 s",
        "✗ evicted: computed again",
        "◐ [0, 6)",
        "◐ stored, and requests can go on",
    ):
        assert shown in words
    assert "○" not in words
