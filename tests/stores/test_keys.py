"""Chained keys: equal for equal content, different for everything else."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.stores.keys import KeyChain, Namespace

MODEL = Namespace(model="tiny")


def chain_of(tokens, media=None, page_tokens=4, namespace=MODEL):
    chain = KeyChain(namespace, page_tokens)
    chain.extend(tokens, media)
    return chain


def oracle(namespace, tokens, page_tokens):
    """Page keys by the words of the module, without media."""
    digest = hashlib.sha256(b"kvcache namespace 1")
    for text in (namespace.model, namespace.dtype, namespace.layout):
        digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    for text in (namespace.rope, namespace.adapter, namespace.salt):
        digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    key, keys = digest.digest(), []
    for start in range(0, len(tokens) - page_tokens + 1, page_tokens):
        ids = np.array(tokens[start : start + page_tokens], "<i4").tobytes()
        number, none = page_tokens.to_bytes(8, "little"), bytes(8)
        key = hashlib.sha256(b"kvcache page" + key + number + ids + none).digest()
        keys.append(key)
    return keys


@given(st.lists(st.integers(0, 2**31 - 1), max_size=20), st.integers(1, 6), st.text(), st.text())
def test_keys_are_those_of_the_recipe(tokens, page_tokens, model, salt):
    namespace = Namespace(model=model.encode(errors="ignore").decode(), dtype="float32", salt="s")
    assert list(chain_of(tokens, None, page_tokens, namespace).page_keys) == oracle(
        namespace, tokens, page_tokens
    )


def test_keys_stay_the_same():
    """Stores outlive versions: a change of these is a change of the format."""
    chain = chain_of(range(10), {(5, 7): b"image"})
    assert [key.hex()[:16] for key in chain.page_keys] == ["aaa3f89c8dd0a917", "b1ef00930b9c667a"]
    assert chain.state_key(10).hex()[:16] == "59603f9db43d7d12"


@given(
    st.lists(st.integers(0, 100), min_size=12, max_size=12),
    st.lists(st.integers(0, 12), max_size=4),
)
def test_a_chain_grows_as_it_likes(tokens, cuts):
    """Keys do not depend on the pieces that tokens come in."""
    grown = KeyChain(MODEL, 3)
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 12], strict=True):
        grown.extend(tokens[start:stop])
    whole = chain_of(tokens, page_tokens=3)
    assert grown.page_keys == whole.page_keys
    assert [grown.state_key(position) for position in range(13)] == [
        whole.state_key(position) for position in range(13)
    ]


def test_every_token_before_a_page_is_in_its_key():
    keys = chain_of(range(12)).page_keys
    for changed in range(12):
        tokens = [token + 100 * (number == changed) for number, token in enumerate(range(12))]
        others = chain_of(tokens).page_keys
        same = [key == other for key, other in zip(keys, others, strict=True)]
        assert same == [4 * (page + 1) <= changed for page in range(3)]


def test_all_keys_of_a_sequence_differ():
    chain = chain_of([7] * 20)
    states = [chain.state_key(position) for position in range(21)]
    assert len({*chain.page_keys, *states, MODEL.seed}) == 5 + 21 + 1


@pytest.mark.parametrize("field", ["model", "dtype", "layout", "rope", "adapter", "salt"])
def test_every_field_of_a_namespace_counts(field):
    one, two = (Namespace(**{"model": "m", field: text}) for text in ("a", "b"))
    assert one.seed != two.seed
    assert (
        chain_of(range(4), namespace=one).page_keys != chain_of(range(4), namespace=two).page_keys
    )


def test_fields_do_not_run_together():
    assert Namespace("ab", "").seed != Namespace("a", "b").seed
    assert Namespace("", "a").seed != Namespace("a", "").seed


def test_media_are_in_the_keys_of_their_pages_and_all_behind():
    media = {(3, 6): b"one"}
    one, two = chain_of(range(12), media), chain_of(range(12), {(3, 6): b"two"})
    assert one.page_keys[0] != two.page_keys[0]
    late_one, late_two = chain_of(range(12), {(5, 6): "one"}), chain_of(range(12), {(5, 6): "two"})
    assert late_one.page_keys[0] == late_two.page_keys[0]
    assert late_one.page_keys[1:] != late_two.page_keys[1:]
    assert chain_of(range(12), {(5, 6): b"one"}).page_keys == late_one.page_keys
    assert one.state_key(3) == two.state_key(3)  # behind it, nothing has been seen
    assert one.state_key(4) != two.state_key(4)


def test_the_place_of_a_medium_counts():
    tokens = [0] * 12
    places = [(4, 6), (5, 6), (4, 5), (6, 7), (4, 9)]
    keys = {chain_of(tokens, {place: b"image"}).page_keys[1] for place in places}
    assert len(keys) == len(places)


def test_a_medium_may_end_in_a_later_piece():
    whole = chain_of(range(12), {(2, 9): b"image"})
    pieces = KeyChain(MODEL, 4)
    pieces.extend(range(5), {(2, 9): b"image"})
    pieces.extend(range(5, 12))
    assert pieces.page_keys == whole.page_keys


def test_placeholders_may_be_negative():
    chain = KeyChain(MODEL, 4)
    chain.extend([1, -7, -7], {(1, 5): b"image"})
    chain.extend([-7, -7, 2])
    assert len(chain) == 6
    with pytest.raises(ValueError, match=r"token ids are >= 0 where no media are; got -7"):
        chain.extend([-7])


def test_parents():
    chain = chain_of(range(9))
    assert [chain.parent_of(position) for position in (0, 3, 4, 8, 9)] == [
        MODEL.seed,
        MODEL.seed,
        chain.page_keys[0],
        chain.page_keys[1],
        chain.page_keys[1],
    ]


@pytest.mark.parametrize(
    ("tokens", "media", "error", "message"),
    [
        ([[1]], None, ValueError, "token ids are lists of integers"),
        ([0.5], None, ValueError, "token ids are lists of integers"),
        ([2**31], None, ValueError, "token ids are int32"),
        ([1, -1], None, ValueError, "token ids are >= 0 where no media are; got -1"),
        ([1, 2], {(0, 0): b"x"}, ValueError, r"media begin in the tokens \[0, 2\)"),
        ([1, 2], {(2, 3): b"x"}, ValueError, r"media begin in the tokens \[0, 2\)"),
        ([1, 2], {(0, 2): b"x", (1, 2): b"y"}, ValueError, "one behind the other"),
        ([1, 2], {(0, 2): b""}, ValueError, "a digest tells a medium from all others"),
        ([1, 2], {(0, 2): 5}, TypeError, "a digest is bytes or str; got 5"),
    ],
)
def test_what_is_refused_changes_nothing(tokens, media, error, message):
    chain = KeyChain(MODEL, 1)
    with pytest.raises(error, match=message):
        chain.extend(tokens, media)
    assert len(chain) == 0
    assert chain.page_keys == ()


def test_wrong_positions_and_names():
    chain = chain_of(range(5))
    for position in (-1, 6):
        with pytest.raises(ValueError, match=r"keys are of positions 0 to 5"):
            chain.state_key(position)
    with pytest.raises(ValueError, match="page_tokens must be >= 1"):
        KeyChain(MODEL, 0)
    with pytest.raises(TypeError, match="fields of a namespace are str; got 5 for rope"):
        Namespace("m", rope=5)
