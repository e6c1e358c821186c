"""Ctrl-C held back in blocks within blocks."""

import signal

import pytest

from kvcache._interrupts import uninterrupted


def test_ctrl_c_comes_once_and_at_the_end_of_the_outer_block():
    handler, seen = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            seen.append("inner")
        seen.append("between")
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        seen.append("outer")
    assert seen == ["inner", "between", "outer"]
    assert signal.getsignal(signal.SIGINT) is handler
