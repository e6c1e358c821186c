"""Values that tell by themselves which key they belong to, so that a wrong byte shows."""

import hashlib

import numpy as np

from kvcache.snapshots.archive import Record
from kvcache.storage.arrays import NamedArray
from kvcache.stores import Hit, Item, Label, Page, encode_page

LABEL = Label(b"l" * 32, b"p" * 32, 3, 5)


def key_of(number):
    return hashlib.sha256(f"value {number}".encode()).digest()


def value_of(number, nbytes):
    return (key_of(number) * (nbytes // 32 + 1))[:nbytes]


def item_of(number, nbytes=1000):
    value = value_of(number, nbytes)
    return Item(key_of(number), [value[:10], value[10:]], LABEL)


def page_item(number, tokens=4, seal=None):
    """Return a page without one before it, as an item."""
    data = np.arange(tokens * 4, dtype=np.float32).reshape(1, tokens, 4)
    part = Record(
        "causal",
        (None, None, 0),
        "float32",
        np.arange(tokens, dtype=np.int32),
        {0: (NamedArray("keys", data),)},
    )
    return encode_page(Page(0, tokens, (part,)), key_of(number), bytes(32), seal=seal)


def is_right(outcome, number):
    """Whether an outcome is a whole value of a number, of any length."""
    return isinstance(outcome, Hit) and bytes(outcome.value) == value_of(
        number, outcome.value.nbytes
    )
