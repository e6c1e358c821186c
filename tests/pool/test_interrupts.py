"""Ctrl-C held back in blocks within blocks."""

import signal

import pytest

from kvcache._interrupts import uninterrupted


def interrupted_twice(seen):
    """Two signals, in blocks of their own, within one block."""
    with uninterrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            seen.append("inner")
        seen.append("between")
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        seen.append("outer")


def test_ctrl_c_comes_once_and_at_the_end_of_the_outer_block():
    handler, seen = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt):
        interrupted_twice(seen)
    assert seen == ["inner", "between", "outer"]
    assert signal.getsignal(signal.SIGINT) is handler
