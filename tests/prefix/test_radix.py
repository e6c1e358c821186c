"""The radix tree against a dict of tuples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.prefix.radix import RadixTree, as_tokens

IDS = st.lists(st.sampled_from([0, 1, 2, 2**31 - 1, -5]), max_size=12)


def path(node):
    ids = []
    while node is not None:
        ids = np.frombuffer(node.edge, "<i4").tolist() + ids
        node = node.parent
    return ids


def check(tree, oracle):
    """Every value is where it should be, and no node is there for nothing."""
    found = {}
    for node in tree.root.below():
        assert node.depth == len(path(node))
        for first, child in node.children.items():
            assert (child.parent, child.first) == (node, first)
        if node.value is not None:
            found[tuple(path(node))] = node.value
        else:
            assert node is tree.root or len(node.children) > 1, "a node for nothing"
    assert found == oracle


def common(one, two):
    same = [a == b for a, b in zip(one, two, strict=False)]
    return same.index(False) if False in same else len(same)


@given(st.lists(st.tuples(st.sampled_from("iirm"), IDS), max_size=40))
def test_any_operations(operations):
    tree, oracle = RadixTree(), {}
    for number, (kind, ids) in enumerate(operations):
        tokens = np.array(ids, np.int32)
        if kind == "i" and ids:
            tree.insert(tokens).value = oracle[tuple(ids)] = number + 1
        elif kind == "r" and tuple(ids) in oracle:
            del oracle[tuple(ids)]
            tree.remove(tree.match(tokens).node)
        else:
            length, node, inside = tree.match(tokens)
            assert length == max((common(ids, other) for other in oracle), default=0)
            assert path(node) == ids[: node.depth]
            assert node.depth <= length
            if inside is None:
                assert node.depth == length
            else:
                assert inside.parent is node
                assert path(inside)[:length] == ids[:length]
                assert length < inside.depth
        check(tree, oracle)


def test_strides_and_byte_orders():
    tree, ids = RadixTree(), np.arange(20, dtype=np.int32)
    tree.insert(ids[::2]).value = 1
    assert tree.match(np.arange(0, 20, 2, dtype=np.int32)).length == 10
    assert tree.match(as_tokens(np.arange(0, 20, 2, dtype=">i8"))).length == 10


def test_what_lies_behind_is_not_looked_at():
    """A query that leaves the tree early costs the same, however long it is."""

    class Watched(np.ndarray):
        read = 0

        def tobytes(self, *args):
            Watched.read += self.size
            return super().tobytes(*args)

    tree, ids = RadixTree(), np.arange(1000, dtype=np.int32)
    tree.insert(ids[:500]).value = 1
    tree.insert(np.concatenate([ids[:200], ids[600:]])).value = 2
    query = np.concatenate([ids[:300], np.zeros(100_000, np.int32)]).view(Watched)
    assert tree.match(query).length == 300
    assert Watched.read == 500


@pytest.mark.parametrize("bad", [[[1]], [1.5], [True], "text", [2**31], [-(2**40)]])
def test_what_is_no_token(bad):
    with pytest.raises(ValueError, match="token ids are"):
        as_tokens(bad)


def test_int32_is_not_copied():
    ids = np.arange(4, dtype=np.int32)
    assert as_tokens(ids) is ids
    assert as_tokens([1, 2]).dtype == np.int32
