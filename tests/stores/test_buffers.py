"""Buffers: memory is used again when nobody refers to it, and not before."""

import gc
import threading

import numpy as np
import pytest

from kvcache.stores.buffers import buffer_of

NBYTES = 300_001


def address_of(buffer):
    return np.frombuffer(buffer, np.uint8).ctypes.data


@pytest.mark.parametrize("nbytes", [0, 1, 1000, 1 << 16, NBYTES, 1 << 22])
def test_a_buffer_is_writable_bytes(nbytes):
    buffer = buffer_of(nbytes)
    assert (buffer.nbytes, buffer.format, buffer.readonly) == (nbytes, "B", False)
    buffer[:] = bytes(nbytes)
    assert bytes(buffer) == bytes(nbytes)


def test_large_buffers_are_aligned():
    assert [address_of(buffer_of(nbytes)) % 64 for nbytes in (1 << 16, NBYTES, 1 << 22)] == [0] * 3


@pytest.mark.parametrize(
    "refer",
    [
        lambda buffer: buffer[100:200].toreadonly(),
        lambda buffer: np.frombuffer(buffer, np.uint8)[::3],
        lambda buffer: np.frombuffer(buffer[8:], np.float64, 10).reshape(2, 5).T,
    ],
)
def test_memory_is_used_again_when_the_last_reference_is_gone(refer):
    buffer = buffer_of(NBYTES)
    address = address_of(buffer)
    kept = refer(buffer)
    del buffer
    others = [buffer_of(NBYTES) for _ in range(3)]
    assert address not in map(address_of, others)
    del kept
    gc.collect()
    freed = [np.empty(NBYTES, np.uint8) for _ in range(20)]  # what the heap would give again
    assert address_of(buffer_of(NBYTES)) == address
    freed.clear()


def test_unused_memory_has_a_limit():
    buffers = [buffer_of(1 << 22) for _ in range(40)]
    addresses = set(map(address_of, buffers))
    buffers.clear()
    again = [buffer_of(1 << 22) for _ in range(15)]
    assert addresses.issuperset(map(address_of, again))
    # Blocks of another size take the place of those that are not asked for any more.
    again.clear()
    large = buffer_of(40 << 20)
    address = address_of(large)
    del large
    assert address_of(buffer_of(40 << 20)) == address
    too_large = buffer_of(80 << 20)
    del too_large
    assert address_of(buffer_of(40 << 20)) == address


def test_threads_share_no_buffer():
    wrong = []

    def work(number):
        random = np.random.default_rng(number)
        for _ in range(300):
            held = [buffer_of(NBYTES) for _ in range(random.integers(1, 4))]
            for place, buffer in enumerate(held):
                np.frombuffer(buffer, np.uint8)[:64] = number * 16 + place
            for place, buffer in enumerate(held):
                if set(buffer[:64]) != {number * 16 + place}:
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
