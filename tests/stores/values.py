"""Values that tell by themselves which key they belong to, so that a wrong byte shows."""

import hashlib

from kvcache.stores import Hit, Item, Label

LABEL = Label(b"l" * 32, b"p" * 32, 3, 5)


def key_of(number):
    return hashlib.sha256(f"value {number}".encode()).digest()


def value_of(number, nbytes):
    return (key_of(number) * (nbytes // 32 + 1))[:nbytes]


def item_of(number, nbytes=1000):
    value = value_of(number, nbytes)
    return Item(key_of(number), [value[:10], value[10:]], LABEL)


def is_right(outcome, number):
    """Whether an outcome is a whole value of a number, of any length."""
    return isinstance(outcome, Hit) and bytes(outcome.value) == value_of(
        number, outcome.value.nbytes
    )
