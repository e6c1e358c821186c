"""What a prefix cache tells others: events, drawings, metrics."""

import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcache
from kvcache import BackendNotAvailableError
from kvcache.prefix import AllBlocksCleared, BlockRemoved, BlockStored
from kvcache.prefix.radix import RadixTree
from kvcache.prefix.render import render
from kvcache.prefix.spans import Span

from .block_names import hashes
from .served import Pool, Server

NUMPY = kvcache.get_backend("numpy")
LONG = list(range(100, 140))


def server_of(*parts, namespace="", **options):
    model = Pool(NUMPY, *(parts or [{}]), capacity=90, max_batch=90)
    return Server(model, namespace=namespace, **options)


def run(server, ids, salt=""):
    """A session in one pass, which nobody looks at."""
    with server.prefix.session(ids, salt=salt) as session:
        part = session.sequence, ids, session.matched, len(ids)
        server.model.run_all([part], check=False)
    return session.matched


class Follower:
    """The hashes of the blocks that are stored, as a router knows them."""

    def __init__(self, prefix):
        self.blocks, self.events = set(), []
        self.leave = prefix.events.subscribe(self.take)

    def take(self, event):
        self.events.append(event)
        if isinstance(event, BlockStored):
            assert not self.blocks.intersection(event.block_hashes)
            assert event.medium == "GPU"  # of a pool
            self.blocks.update(event.block_hashes)
        elif isinstance(event, BlockRemoved):
            assert self.blocks.issuperset(event.block_hashes)
            assert event.medium == "GPU"
            self.blocks.difference_update(event.block_hashes)
        else:
            self.blocks = set()


def blocks_in(prefix):
    """Blocks whose last token is in a span that is stored."""
    found = set()
    for salt, tree in prefix._trees.items():
        for node in tree.root.below():
            if node.value is not None and node.value.payload is not None:
                ids = np.concatenate([np.frombuffer(s.node.edge, "<i4") for s in node.value.path])
                for number, name in enumerate(hashes(ids, salt)):
                    if node.value.start < 16 * (number + 1) <= node.value.stop:
                        found.add(name)
    return found


@settings(max_examples=30)
@given(
    st.sampled_from([[{}], [{"window": 3}], [{"window": 3}, {}]]),
    st.sampled_from([None, 0, 1_000, 2_500]),
    st.lists(
        st.tuples(
            st.integers(0, 7),
            st.integers(0, 80),
            st.integers(0, 40),
            st.sampled_from(["", "", "me"]),
            st.sampled_from(["", "", "", "open", "clear"]),
        ),
        max_size=14,
    ),
)
def test_who_replays_the_events_knows_what_is_stored(parts, budget, turns):
    server, asked = server_of(*parts, budget=budget), [[]]
    follower, waiting = Follower(server.prefix), []
    for number, (base, cut, new, salt, then) in enumerate(turns):
        ids = [*asked[base % len(asked)][:cut], *range(number * 100, number * 100 + new)][:88] or [
            1
        ]
        asked.append(ids)
        run(server, ids, salt)
        if then == "open" and not waiting:
            waiting.append(server.prefix.session(ids, salt=salt))
        elif then == "clear":
            server.prefix.clear()
        assert follower.blocks == blocks_in(server.prefix)
    for session in waiting:
        session.__exit__(None, None, None)
    server.prefix.clear()
    assert follower.blocks == blocks_in(server.prefix) == set()


def test_events_are_as_vllm_tells_them():
    server = server_of()
    follower = Follower(server.prefix)
    run(server, LONG)
    run(server, [*LONG[:20], *range(30)])
    run(server, LONG[:15])
    run(server, [*LONG[:37], *range(20)])
    first, second, third = follower.events
    mine, others = hashes(LONG), hashes([*LONG[:20], *range(30)])
    assert first == BlockStored(mine, None, LONG[:32], 16, lora_id=None, medium="GPU")
    assert second == BlockStored(others[1:], mine[0], [*LONG[16:20], *range(28)], 16)
    fourth = hashes([*LONG[:37], *range(20)])[2:]
    assert third == BlockStored(fourth, mine[1], [*LONG[32:37], *range(11)], 16)
    server.prefix.clear()
    *removed, cleared = follower.events[3:]
    assert sorted(name for event in removed for name in event.block_hashes) == sorted(
        {*mine, *others, *fourth}
    )
    assert cleared == AllBlocksCleared()
    for event in (first, second, third):
        assert len(event.token_ids) == event.block_size * len(event.block_hashes)


def test_models_and_tenants_have_other_hashes():
    names = set()
    for namespace in ("", "llama"):
        for salt in ("", "me"):
            server = server_of(namespace=namespace)
            follower = Follower(server.prefix)
            run(server, LONG, salt)
            assert follower.blocks == set(hashes(LONG, salt, namespace))
            names |= follower.blocks
    assert len(names) == 8


def test_what_a_session_uses_is_not_said_to_be_cleared():
    server = server_of()
    follower = Follower(server.prefix)
    run(server, LONG)
    with server.prefix.session([*LONG[:33], 7]) as session:
        server.prefix.clear()
        assert session.matched == 33
        assert follower.blocks == set(hashes(LONG))
        server.model.run_all([(session.sequence, [*LONG[:33], 7], 33, 34)], check=False)
    assert follower.blocks == blocks_in(server.prefix)


def test_who_leaves_hears_no_more():
    server = server_of()
    one, two = Follower(server.prefix), Follower(server.prefix)
    one.leave()
    run(server, LONG)
    assert not one.events
    assert two.events


def test_a_subscriber_that_raises_stops_nothing_and_is_logged(caplog):
    server = server_of(budget=1_000)
    leave = server.prefix.events.subscribe(lambda event: 1 / 0)
    follower = Follower(server.prefix)
    for first in range(5):
        run(server, [first, *LONG])
        assert server.prefix.stats.nbytes <= 1_000
        assert follower.blocks == blocks_in(server.prefix)
    assert server.prefix.stats.active == server.prefix.stats.pinned == 0
    assert server.prefix.stats.evictions
    assert {record.name for record in caplog.records} == {"kvcache.prefix"}
    assert len(caplog.records) == len(follower.events)
    assert "ZeroDivisionError" in caplog.text
    leave()
    leave()  # as often as one likes
    server.prefix.clear()
    assert follower.blocks == set()
    assert "AllBlocksCleared" not in caplog.text


def test_a_subscriber_may_call_the_prefix_cache():
    """It hears of a change when that is complete, and of its own changes after it."""
    server = server_of(budget=1_000)
    prefix, seen = server.prefix, []

    def reset(event):
        seen.append((type(event).__name__, prefix.stats.nbytes <= 1_000))
        prefix.clear()

    prefix.events.subscribe(reset)
    follower = Follower(prefix)
    for first in range(4):
        run(server, [first, *LONG])
        assert prefix.stats.spans == 0
        assert follower.blocks == set()
    assert seen[:3] == [("BlockStored", True), ("BlockRemoved", True), ("AllBlocksCleared", True)]
    assert [type(event).__name__ for event in follower.events] == [name for name, _ in seen]
    assert run(server, LONG) == 0


def test_a_subscriber_may_begin_and_end_sessions():
    server = server_of()
    ids = list(range(50))

    def ask(event):
        if event.token_ids[:2] != ids[:2]:
            run(server, ids)

    server.prefix.events.subscribe(ask)
    follower = Follower(server.prefix)
    run(server, LONG)
    assert follower.blocks == set(hashes(LONG)) | set(hashes(ids))
    assert run(server, ids) == len(ids) - 1


# Media.


def last_stored(*digests, at=(0, 16), ids=(7,) * 16 + tuple(range(32))):
    """The event of the last of some requests with an image each, on a server of its own."""
    server = server_of(namespace="m")
    follower = Follower(server.prefix)
    for digest in digests:
        with server.prefix.session(list(ids), media={at: digest}) as session:
            part = session.sequence, list(ids), session.matched, len(ids)
            server.model.run_all([part], check=False)
    return follower.events[-1]


def test_hashes_tell_images_apart_and_are_the_same_everywhere():
    event = last_stored("a cat")
    assert event == last_stored("a cat") == last_stored(b"a cat")
    assert event == last_stored("a dog", "a bird", "a cat"), "whatever came before"
    for other in (last_stored("a dog"), last_stored("a cat", at=(1, 16))):
        assert not set(event.block_hashes) & set(other.block_hashes)
    later = last_stored("a cat", at=(20, 24))
    assert later.block_hashes[0] == hashes([7] * 16, namespace="m")[0]
    assert later.block_hashes[1] != last_stored("a cat", at=(21, 25)).block_hashes[1]


def test_an_image_in_an_event_has_the_ids_of_the_prompt():
    ids = (*range(50, 62), *[9, 9, 9, 8] * 6, *range(12))
    for at in ((12, 36), (12, 16), (14, 33)):
        assert last_stored("a cat", at=at, ids=ids).token_ids == list(ids)


def test_an_image_that_is_split_keeps_its_hashes():
    """By a prompt that is the same up to the middle of it, and by another part of it evicted."""
    server = server_of()
    follower, ids = Follower(server.prefix), [*range(10), *[9] * 30, *range(20)]
    for at, whole in (((10, 40), ids), ((10, 40), [*ids[:40], 5, 6]), ((10, 40), [*ids[:50], 1])):
        with server.prefix.session(whole, media={at: "a cat"}) as session:
            part = session.sequence, whole, session.matched, len(whole)
            server.model.run_all([part], check=False)
    server.prefix._index.budget, server.prefix._index._grain = 16 * 20, 1
    run(server, [1])
    assert len(follower.blocks) < 3
    assert follower.blocks
    server.prefix.clear()
    assert follower.blocks == set()


# Drawings.


@pytest.fixture
def drawn():
    pytest.importorskip("rich")
    server = server_of()
    run(server, LONG)
    run(server, [*LONG[:30], 1, 2, 3], salt="")
    run(server, [5, 6, 7], salt="me")
    server.open_session = server.prefix.session([*LONG[:30], 1, 2, 3])
    return server


def test_a_tree_as_text(drawn):
    text = drawn.prefix.render()
    spans = drawn.prefix._index.kept
    assert len(spans) == 4
    for span in spans:
        assert f"[{span.start}, {span.stop})" in text
    assert "salt 'me'" in text
    assert "5 6 7" in text
    assert "100 101 102 103 104 … 128 129" in text
    assert f"{drawn.prefix.stats.nbytes} B stored" in text
    assert "[0, 30)  100 101 102 103 104 … 128 129  480 B resident, used 3x, in use by 1" in text
    assert "evicted" not in text
    drawn.prefix._index.budget = 0
    run(drawn, [9])
    text = drawn.prefix.render(width=70)
    assert text.count("evicted by lru") == 3
    assert max(map(len, text.splitlines())) <= 70


@pytest.mark.parametrize("svg", [False, True])
def test_a_conversation_of_a_thousand_turns(svg):
    """A path longer than Python recurses and than a line is wide: every span is on a line."""
    pytest.importorskip("rich")
    turns, tree = sys.getrecursionlimit() + 200, RadixTree()
    for turn in range(1, turns + 1):
        node = tree.insert(np.arange(turn, dtype=np.int32))
        node.value = Span(tree, node)
    drawing = render({"": tree}, 0, "lru", None, svg, 80)
    if svg:
        drawing = "".join(ET.fromstring(drawing).itertext()).replace("\xa0", " ")
    for turn in range(turns):
        assert f"[{turn}, {turn + 1})  {turn}  not stored" in drawing


def test_deep_spans_stand_in_the_order_of_their_tokens():
    pytest.importorskip("rich")
    server = server_of()
    for ids in ([1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9], [7]):
        run(server, ids)
    lines = server.prefix.render(width=80).splitlines()[1:]
    assert [line.split("  ")[-2] for line in lines] == ["1", "2", "3", "4", "5", "9", "7"]
    narrow = server.prefix.render(width=20).splitlines()
    starts = [line.index("[") for line in narrow if "[" in line]
    assert starts == [4, 8, 8, 8, 8, 8, 4]  # two levels


def test_salts_and_texts_are_no_markup():
    pytest.importorskip("rich")
    server = server_of()
    run(server, [1, 2], salt="[red]team[/red] :smile:")
    run(server, [3], salt="[/]")
    text = server.prefix.render(decode=lambda ids: f"[blink]{ids}[/] :smile:")
    for shown in ("salt '[red]team[/red] :smile:'", "salt '[/]'", "'[blink][1, 2][/] :smile:'"):
        assert shown in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": 19}, ValueError, "20 to 10,000 columns wide; got 19"),
        ({"width": 10**9}, ValueError, "20 to 10,000 columns wide; got 1000000000"),
        ({"width": "80"}, TypeError, "width must be an integer; got '80'"),
        ({"decode": "utf-8"}, TypeError, "decode is a function .* got 'utf-8'"),
    ],
)
def test_what_cannot_be_drawn(options, error, message):
    pytest.importorskip("rich")
    with pytest.raises(error, match=message):
        server_of().prefix.render(**options)


@pytest.mark.parametrize("callback", [None, "print", 3])
def test_subscribers_are_functions(callback):
    with pytest.raises(TypeError, match="a subscriber is a function of one event; got"):
        server_of().prefix.events.subscribe(callback)


def test_what_is_in_host_memory_is_drawn_as_such(drawn):
    for span in drawn.prefix._index.kept:
        span.payload.snapshot.to_host()
    assert "resident" not in drawn.prefix.render()
    assert "480 B host" in drawn.prefix.render()


def test_a_tree_with_text_instead_of_ids(drawn):
    def decode(ids):
        return "".join(chr(each) for each in ids)

    assert repr(decode([105, 106])[:1])[1] in drawn.prefix.render(decode=decode)
    assert "'defgh" in drawn.prefix.render(decode=decode)
    ids = [1, 2, 3, 4, 5, 6]
    with drawn.prefix.session(ids, media={(0, 2): "a cat"}) as session:
        drawn.model.run_all([(session.sequence, ids, 0, 6)], check=False)
    assert "-1 -1 3 4 5 6" in drawn.prefix.render(decode=decode)


def test_a_tree_as_a_picture(drawn):
    root = ET.fromstring(drawn.prefix.render(svg=True))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = "".join(root.itertext()).replace("\xa0", " ")
    assert "[0, 30)" in words
    assert "kvcache.PrefixCache" in words


def test_an_empty_tree():
    pytest.importorskip("rich")
    assert server_of().prefix.render().strip() == "prefix cache, 0 B stored"


def test_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(BackendNotAvailableError, match=r"needs rich.*pip install 'kvcache\[cli\]'"):
        server_of().prefix.render()
