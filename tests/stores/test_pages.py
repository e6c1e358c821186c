"""Pages: every kind of layer there and back, and nothing that is not a page."""

import hashlib
import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.errors import PageError
from kvcache.snapshots.archive import Record
from kvcache.storage.arrays import NamedArray
from kvcache.stores import Hit, Label, MemoryStore
from kvcache.stores.pages import Page, decode_page, encode_page
from kvcache.stores.sealing import Seal

KEY, PARENT = b"k" * 32, b"p" * 32
HEADER = struct.Struct("<8sHHI")
SEALS = {"plain": None, "sealed": Seal(bytes(range(32)))}


@pytest.fixture(params=SEALS)
def seal(request):
    return SEALS[request.param]


def array(name, shape, dtype, axis=-2):
    """Numbers that tell their places."""
    return NamedArray(name, (np.arange(np.prod(shape)) % 100).reshape(shape).astype(dtype), axis)


def positions(*numbers):
    return np.array(numbers, np.int32)


def full():
    """Keys and values of three layers, of two forms, all five positions."""
    dtype = ml_dtypes.bfloat16
    rows = {
        layer: (array("keys", (heads, 5, 8), dtype), array("values", (heads, 5, 4), dtype))
        for layer, heads in ((0, 2), (1, 1), (2, 2))
    }
    return Record("causal", (None, None, 0), "bfloat16", positions(10, 11, 12, 13, 14), rows)


def window():
    """Latent keys of a window with a sink: only some of the positions."""
    rows = {7: (array("latent", (2, 6), "f4", 0),)}
    return Record("rotating", (4, None, 1), "float32", positions(10, 14), rows)


def states():
    """Recurrent states of two dtypes, and an array without a token axis."""
    rows = {
        layer: (
            array("conv", (1, 3, 4), np.float16, 0),
            array("state", (2, 1, 2, 2), "f4", -3),
            array("scale", (7,), "i1", None),
        )
        for layer in (5, 3)
    }
    return Record("state", (1, None, 0), ("float16", "float32", "int8"), positions(14), rows)


def nothing():
    return Record("rotating", (2, None, 0), "float32", positions(), {})


def frames():
    """Encoder output: several rows of one position."""
    rows = {0: (array("keys", (3, 1, 2), "f4", 0),)}
    return Record("encoder", (None, None, 0), "float32", positions(12, 12, 12), rows)


PAGES = {
    "full": [full],
    "window": [window],
    "states": [states],
    "hybrid": [full, states, nothing, window, frames],
    "empty": [],
}


def page_of(*makers):
    return Page(10, 15, tuple(maker() for maker in makers))


def stored(page, seal=None):
    """What a store gives for a page."""
    with MemoryStore() as store:
        store.put([encode_page(page, KEY, PARENT, seal)])
        [hit] = store.get([KEY])
    return hit


def same(page, other):
    """Whether two pages are alike in everything, bit for bit."""
    if (page.start, page.stop, page.layout) != (other.start, other.stop, other.layout):
        return False
    return all(
        one[:3] == two[:3]
        and np.array_equal(one.positions, two.positions)
        and sorted(one.layers) == list(two.layers)
        and all(
            a.name == b.name
            and a.token_axis == b.token_axis
            and a.data.dtype == b.data.dtype
            and a.data.shape == b.data.shape
            and a.data.tobytes() == b.data.tobytes()
            for layer in one.layers
            for a, b in zip(one.layers[layer], two.layers[layer], strict=True)
        )
        for one, two in zip(page.parts, other.parts, strict=True)
    )


@pytest.mark.parametrize("name", PAGES)
def test_there_and_back(name, seal):
    page = page_of(*PAGES[name])
    hit = stored(page, seal)
    assert hit.label == Label(page.layout_digest, PARENT, 10, 15)
    back = decode_page(hit, KEY, seal=seal, layout=page.layout_digest)
    assert same(page, back)
    assert page.nbytes == back.nbytes


def test_decoded_arrays_are_aligned_views():
    hit = stored(page_of(full, states))
    for part in decode_page(hit, KEY).parts:
        for arrays in part.layers.values():
            for decoded in arrays:
                assert not decoded.data.flags.writeable
                assert decoded.data.ctypes.data % 16 == 0
                assert np.shares_memory(decoded.data, np.frombuffer(hit.value, np.uint8))


def test_arrays_are_not_copied_to_be_stored():
    page = page_of(full)
    buffers = encode_page(page, KEY, PARENT).buffers
    for arrays in page.parts[0].layers.values():
        for own in arrays:
            assert any(
                np.shares_memory(own.data, np.frombuffer(buffer, np.uint8))
                for buffer in buffers
                if len(buffer)
            )


def test_layers_that_are_alike_are_described_once():
    described = json.loads(page_of(full).layout)
    assert [group["numbers"] for group in described[0]["layers"]] == [[0, 2], [1]]


def test_the_layout_says_nothing_of_the_number_of_tokens():
    short = full()._replace(
        positions=positions(10, 11),
        layers={n: tuple(a.take(slice(2)) for a in rows) for n, rows in full().layers.items()},
    )
    assert Page(10, 12, (short,)).layout == page_of(full).layout
    assert page_of(window).layout != page_of(full).layout


def refused(hit, seal=None, **options):
    """Whether a value is refused by name. Anything else raised fails the test."""
    try:
        decode_page(hit, KEY, seal=seal, **options)
    except PageError:
        return True
    return False


def test_truncated(seal):
    hit = stored(page_of(*PAGES["hybrid"]), seal)
    for stop in range(hit.value.nbytes):
        assert refused(Hit(hit.value[:stop], hit.label), seal)
    assert refused(Hit(memoryview(bytes(hit.value) + b"\0"), hit.label), seal)


def test_every_bit_of_a_sealed_page_counts():
    seal = SEALS["sealed"]
    hit = stored(page_of(states), seal)
    for place in range(hit.value.nbytes):
        changed = bytearray(hit.value)
        changed[place] ^= 1
        assert refused(Hit(memoryview(changed), hit.label), seal)


def test_a_sealed_page_is_one_of_its_key_and_label():
    seal = SEALS["sealed"]
    hit = stored(page_of(states), seal)
    assert not refused(hit, seal)
    for changed in (
        hit.label._replace(start=9),
        hit.label._replace(stop=16),
        hit.label._replace(parent=bytes(32)),
        hit.label._replace(layout=bytes(32)),
    ):
        assert refused(Hit(hit.value, changed), seal)
    with pytest.raises(PageError, match="sealed with another secret, or changed since"):
        decode_page(hit, b"o" * 32, seal=seal)
    with pytest.raises(PageError, match="sealed with another secret, or changed since"):
        decode_page(hit, KEY, seal=Seal(bytes(32)))


def test_a_sealed_page_shows_nothing():
    page = page_of(full)
    value = bytes(stored(page, SEALS["sealed"]).value)
    assert b"keys" not in value
    assert page.parts[0].layers[0][0].data.tobytes()[:32] not in value
    assert value != bytes(stored(page, SEALS["sealed"]).value)  # a nonce each


def test_a_page_is_sealed_or_not():
    page = page_of(states)
    with pytest.raises(PageError, match="pages are sealed here; got one that is plain"):
        decode_page(stored(page), KEY, seal=SEALS["sealed"])
    with pytest.raises(PageError, match="pages are plain here; got one that is sealed"):
        decode_page(stored(page, SEALS["sealed"]), KEY)


def test_another_layout():
    hit = stored(page_of(states))
    with pytest.raises(PageError, match="the layout of the page is"):
        decode_page(hit, KEY, layout=page_of(full).layout_digest)
    assert refused(Hit(hit.value, hit.label._replace(layout=bytes(32))))


@pytest.mark.parametrize("place", [0, 8, 10])
def test_foreign_and_newer(place):
    hit = stored(page_of(states))
    changed = bytearray(hit.value)
    changed[place] += 2
    with pytest.raises(PageError, match="pages of version 1 are read"):
        decode_page(Hit(memoryview(changed), hit.label), KEY)


@pytest.mark.parametrize(
    "changed", [positions(9), positions(15), positions(12, 11), positions(12, 12), positions(-1)]
)
def test_positions_out_of_place(changed):
    rows = {0: (array("latent", (changed.size, 6), "f4", 0),)}
    page = Page(10, 15, (Record("causal", (None, None, 0), "float32", changed, rows),))
    with pytest.raises(PageError, match=r"positions of a page ascend within \[10, 15\)"):
        decode_page(stored(page), KEY)


# Forged: everything fits the checksums, and is made to do harm.


def forged(layout, counts=(), rest=b""):
    """A value with a layout of anybody's, under a label that fits."""
    text = layout if isinstance(layout, bytes) else json.dumps(layout).encode()
    body = text + np.array(counts, "<u4").tobytes() + rest
    value = HEADER.pack(b"KVCPAGE\0", 1, 0, len(text)) + body
    return Hit(memoryview(value), Label(hashlib.sha256(text).digest(), PARENT, 10, 15))


def layout_with(numbers=(0,), kind="causal", visibility=(None, None, 0), **changed):
    described = {"name": "keys", "axis": 0, "dtype": "float32", "sizes": [2]} | changed
    layers = [{"numbers": [*numbers], "arrays": [described]}]
    return [{"kind": kind, "visibility": visibility, "dtype": "float32", "layers": layers}]


def test_what_the_forger_begins_with_is_a_page():
    body = positions(12).tobytes()
    size = HEADER.size + len(json.dumps(layout_with())) + 4 + len(body)
    hit = forged(layout_with(), [1], body + bytes(-size % 64) + bytes(8))
    assert decode_page(hit, KEY).parts[0].layers[0][0].data.shape == (1, 2)


@pytest.mark.parametrize(
    ("layout", "counts"),
    [
        (b"", []),
        (b"nonsense", []),
        (b"[" * 100_000, []),
        (b"1" * 10_000, []),
        ({}, []),
        ([[]], [0]),
        (layout_with(), []),
        (layout_with(), [2**32 - 1]),
        (layout_with(sizes=[2**31 - 1] * 8), [0]),
        (layout_with(sizes=[2**31 - 1] * 8, axis=None), [0]),
        (layout_with(sizes=[2] * 16), [0]),
        (layout_with(sizes=[-1]), [0]),
        (layout_with(sizes=[2**64]), [0]),
        (layout_with(sizes=[True]), [0]),
        (layout_with(axis=7), [0]),
        (layout_with(axis=-3), [0]),
        (layout_with(axis="0"), [0]),
        (layout_with(dtype="object"), [0]),
        (layout_with(dtype=["float32"]), [0]),
        (layout_with(name=None), [0]),
        (layout_with(numbers=[0, 0]), [0]),
        (layout_with(numbers=[-1]), [0]),
        (layout_with(numbers=[0.5]), [0]),
        (layout_with(numbers=range(70_000), sizes=[0]), [0]),
        (layout_with(kind=5), [0]),
        (layout_with(visibility=[None]), [0]),
        (layout_with(visibility=[None, 0, 0]), [0]),
    ],
)
def test_forged_layouts(layout, counts):
    assert refused(forged(layout, counts))


def test_layers_without_arrays_and_many_of_them():
    layout = layout_with()
    layout[0]["layers"] = [{"numbers": [0], "arrays": []}]
    assert refused(forged(layout, [0]))
    layout[0]["layers"] = [
        {
            "numbers": [*range(1000)],
            "arrays": layout_with(sizes=[0])[0]["layers"][0]["arrays"] * 1000,
        }
    ]
    assert refused(forged(layout, [0]))


@given(st.data())
def test_any_change_of_a_layout_is_a_page_or_refused(data):
    """With a label that fits: no exception but ours, and never more bytes than came."""
    hit = stored(page_of(states, window))
    _, _, _, length = HEADER.unpack_from(hit.value)
    text = bytearray(hit.value[HEADER.size : HEADER.size + length])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, length - 1))
        text[place] = data.draw(st.sampled_from(b'0123456789[]{},:-"ntfe '))
    value = bytes(hit.value[: HEADER.size]) + bytes(text) + bytes(hit.value[HEADER.size + length :])
    label = hit.label._replace(layout=hashlib.sha256(text).digest())
    try:
        page = decode_page(Hit(memoryview(value), label), KEY)
    except PageError:
        return
    assert page.nbytes <= len(value)


def test_seals_are_refused_by_name():
    with pytest.raises(TypeError, match="a secret is bytes; got str"):
        Seal("0" * 32)
    with pytest.raises(ValueError, match=r"a secret has 32 bytes; got 5\. Use os.urandom\(32\)"):
        Seal(b"12345")
    assert repr(SEALS["sealed"]) == "<Seal>"
