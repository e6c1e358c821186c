"""The columns of a ring: how many, in which order, and where they lie; room made beforehand."""

import numpy as np
import pytest

from kvcache import KVCache, RotatingKVCache, TrimError
from kvcache.storage.lengths import round_up

from .oracle import SHAPE, Oracle, Token, check_columns, host_rows, rows

RINGS = [(1, 0), (5, 0), (5, 2), (5, 4), (8, 3)]
UPDATES = (1, 1, 3, 1, 9, 1, 1, 1, 2, 1, 1, 1, 1, 1, 20, 1, 1)
rings = pytest.mark.parametrize(("size", "keep"), RINGS)


def update(cache, tokens):
    backend, stamp = cache.backend, cache.offset
    return cache.update(
        backend.from_host(SHAPE.keys(tokens, stamp)), backend.from_host(SHAPE.values(tokens, stamp))
    )


class Counting:
    """A backend that counts its calls of some hooks."""

    def __init__(self, backend, *hooks):
        self.backend = type(backend)(backend.device)
        self.calls = 0
        for name in hooks:
            setattr(self.backend, name, self._counted(getattr(self.backend, name)))

    def _counted(self, hook):
        def call(*arguments, **options):
            self.calls += 1
            return hook(*arguments, **options)

        return call


def views(backend):
    """A backend whose slices are views, of any length."""
    if not backend.slices_are_views or backend.config.padding > 1:
        pytest.skip(f"{backend.name} returns whole buffers")
    return backend


# Columns.


@rings
def test_there_are_as_many_columns_as_the_queries_need(backend, size, keep):
    """Also in what is returned, where slices are views, and once tokens were dropped."""
    cache = RotatingKVCache(size, keep, backend, step=2)
    for tokens in UPDATES:
        dropped = cache.offset >= size
        keys, values = update(cache, tokens)
        shown = np.count_nonzero(cache.positions >= 0)
        assert cache.positions.size == keys.shape[2] == values.shape[2]
        if dropped:
            assert shown == size - 1 + tokens
            if backend.slices_are_views:
                assert keys.shape[2] == round_up(shown, backend.config.padding)
        else:
            assert shown == cache.offset


@rings
def test_columns_ascend(backend, size, keep):
    cache = RotatingKVCache(size, keep, backend, step=2)
    for tokens in UPDATES:
        update(cache, tokens)
        for one in (cache, cache.copy()):
            shown = one.positions[one.positions >= 0]
            assert (np.diff(shown) > 0).all()
        np.testing.assert_array_equal(shown, cache.state_positions)
        np.testing.assert_array_equal(shown, one.state_positions)
        assert cache.state_positions.size == cache.len == cache.state[0].shape[2]
        assert cache.state_positions[-1] == cache.offset - 1


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("keep", [0, 2])
def test_a_decode_step_copies_no_window(backend, keep, layout):
    """What is returned lies in the buffers."""
    if backend.name != "numpy":
        pytest.skip("memory can be compared on NumPy")
    cache, others = RotatingKVCache(8, keep, backend, layout=layout), 0
    before = [np.zeros(1)] * 2
    for tokens in (11, *[1] * 48):
        one = np.ones((1, 2, tokens, 3) if layout == "bhtd" else (1, tokens, 2, 3), np.float32)
        returned = cache.update(one * cache.offset, one * cache.offset)
        pairs = zip(returned, before, strict=True)
        others += sum(not np.shares_memory(array, earlier) for array, earlier in pairs)
        before = returned
    assert others <= 2 * (2 + 48 // (8 - keep)), "keys and values, once per window"


@pytest.mark.parametrize("keep", [0, 3])
def test_tokens_move_once_per_window(backend, keep):
    window, steps = 32, 320
    counting = Counting(views(backend), "alloc", "concat")
    cache = RotatingKVCache(window + keep, keep, counting.backend, step=1)
    update(cache, window + keep)
    update(cache, 1)
    counting.calls, growths, nbytes = 0, cache.growths, cache.nbytes
    for _ in range(steps):
        update(cache, 1)
    assert counting.calls == 2 * steps // window, "keys and values, once per window"
    assert (cache.growths, cache.nbytes) == (growths, nbytes)


# Slack.


def push(cache, oracle, tokens, stamp=0):
    """Update both, and compare what the queries see; the cache holds more than the oracle says."""
    backend, shape, start = cache.backend, SHAPE, oracle.offset + stamp
    keys, values = shape.keys(tokens, start), shape.values(tokens, start)
    columns = cache.update(backend.from_host(keys), backend.from_host(values))
    oracle.tokens += map(Token, rows(keys), rows(values))
    check_columns(cache, oracle, host_rows(backend, columns), tokens)


@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize("offset", [5, 9, 12, 13, 23])
def test_slack_is_trimmed_past_the_wrap(backend, keep, offset):
    for tokens in (1, 2, 3):
        cache, oracle = RotatingKVCache(5, keep, backend, step=4, slack=3), Oracle(5, keep)
        for count in (4, *[1] * (offset - 4)):
            push(cache, oracle, count)
        assert cache.can_trim(tokens)
        cache.trim(tokens)
        oracle.cut(offset - tokens)
        for count in (1, 2, 7, 1):
            push(cache, oracle, count, stamp=1000)


def test_more_than_slack_cannot_be_trimmed(backend):
    cache, oracle = RotatingKVCache(5, 1, backend, step=4, slack=3), Oracle(5, 1)
    for tokens in (6, *[1] * 9):
        push(cache, oracle, tokens)
    assert [tokens for tokens in range(16) if cache.can_trim(tokens)] == [0, 1, 2, 3]
    with pytest.raises(TrimError, match="cannot trim once tokens were displaced: 15 came, it hold"):
        cache.trim(4)
    cache.trim(2)
    assert [tokens for tokens in range(14) if cache.can_trim(tokens)] == [0, 1]


# Room.


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_a_prompt_that_fills_the_buffers_moves_nothing_at_the_next_token(backend, layout):
    for step, prompt in ((4, 4), (4, 8), (256, 256), (64, 192)):
        cache = KVCache(backend, step=step, layout=layout)
        for tokens in (prompt, 1):
            shape = (1, 2, tokens, 2) if layout == "bhtd" else (1, tokens, 2, 2)
            ones = backend.from_host(np.ones(shape, np.float32))
            cache.update(ones, ones)
        assert cache.growths == 0


ROOMY = {
    "growing": lambda backend, **options: KVCache(backend, step=4, **options),
    "ring": lambda backend, **options: RotatingKVCache(80, 0, backend, step=4, **options),
    "sinks": lambda backend, **options: RotatingKVCache(80, 3, backend, step=4, **options),
}


@pytest.mark.parametrize("kind", ROOMY)
@pytest.mark.parametrize("prompt", [1, 10, 60])
def test_nothing_moves_up_to_the_capacity(backend, kind, prompt):
    counting = Counting(backend, "alloc")
    cache = ROOMY[kind](counting.backend, capacity=60)
    update(cache, prompt)
    counting.calls, nbytes = 0, cache.nbytes
    while cache.offset < 60:
        update(cache, 1)
    assert (counting.calls, cache.growths, cache.nbytes) == (0, 0, nbytes)
    assert cache.copy().options["capacity"] == 60


@pytest.mark.parametrize("kind", ROOMY)
@pytest.mark.parametrize("prompt", [0, 5, 30])
def test_nothing_moves_up_to_the_reserved_number(backend, kind, prompt):
    counting = Counting(backend, "alloc")
    cache = ROOMY[kind](counting.backend)
    if prompt:
        update(cache, prompt)
    cache.reserve(40)
    update(cache, 1)
    counting.calls, growths, nbytes = 0, cache.growths, cache.nbytes
    while cache.offset < prompt + 40:
        update(cache, 1)
    assert (counting.calls, cache.growths, cache.nbytes) == (0, growths, nbytes)


def test_a_ring_makes_no_more_room_than_it_needs(backend):
    small, large = (RotatingKVCache(8, 2, backend, capacity=c) for c in (0, 10_000))
    for cache in (small, large):
        for tokens in (3, *[1] * 30):
            update(cache, tokens)
        cache.reserve(10_000)
    assert small.nbytes == large.nbytes


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (-1, ValueError, r"tokens must be 0 to 2\*\*31 - 1; got -1\."),
        (2**31, ValueError, r"tokens must be 0 to 2\*\*31 - 1; got 2147483648\."),
        (1.5, TypeError, r"tokens must be an integer; got 1\.5"),
    ],
)
def test_room_that_cannot_be_made(backend, tokens, error, message):
    cache = KVCache(backend)
    with pytest.raises(error, match=message):
        cache.reserve(tokens)
    with pytest.raises(error, match=message.replace("tokens", "capacity")):
        KVCache(backend, capacity=tokens)
