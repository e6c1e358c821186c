"""A slow model of a recurrent layer's cache: the list of the states that it has."""

from dataclasses import dataclass, field

import numpy as np

from kvcache.backends import HOST_DTYPES
from kvcache.testing.coded import coded, same

SHAPES = (2, 3, 1, 4), (2, 1, 1, 5)
"""Of the two arrays of a state, with an axis to cut away."""


def host_state(stamp, dtypes=("float32", "bfloat16")):
    """The arrays of the state called `stamp`: ``[2, 3, 4]`` and ``[2, 5]``, of several dtypes."""
    matrix, last = (coded(shape, dtype, stamp) for shape, dtype in zip(SHAPES, dtypes, strict=True))
    return matrix[:, :, 0], last[:, 0, 0]


def state(backend, stamp, dtypes=("float32", "bfloat16")):
    return tuple(map(backend.from_host, host_state(stamp, dtypes)))


def state_bytes(dtypes):
    return 2 * 3 * 4 * HOST_DTYPES[dtypes[0]].itemsize + 2 * 5 * HOST_DTYPES[dtypes[1]].itemsize


def dtypes_of(backend):
    return ("float32", "bfloat16" if "bfloat16" in backend.dtypes else "int8")


@dataclass
class StateOracle:
    """All states by position, and how the cache came by them.

    points: scheduled positions. mark: offset at an open checkpoint. recorded: inside of an update
    that was announced, of so many tokens `coming`.
    """

    offset: int = 0
    held: dict[int, int] = field(default_factory=dict)
    points: set[int] = field(default_factory=set)
    mark: int | None = None
    coming: int = 0
    recorded: dict[int, int] = field(default_factory=dict)

    def cuts(self, tokens):
        inside = range(self.offset + 1, self.offset + tokens)
        return [p for p in inside if p in self.points or self.mark is not None]

    def announce(self, tokens):
        self.coming, self.recorded = tokens, {}

    def advance(self, tokens, stamp):
        if self.offset not in self.points and self.mark is None:
            self.held.pop(self.offset, None)
        if self.coming == tokens:
            self.held |= self.recorded
        self.offset += tokens
        self.held[self.offset] = stamp
        self.announce(0)

    def schedule(self, positions):
        self.points |= {p for p in positions if p >= max(1, self.offset)}

    def checkpoint(self):
        self._drop_drafts()
        self.mark = self.offset

    def can_go(self, position):
        return 0 <= position <= self.offset and (position == 0 or position in self.held)

    def go(self, position):
        self.held = {p: stamp for p, stamp in self.held.items() if p <= position}
        self.offset, self.mark = position, None
        self._drop_drafts()
        self.announce(0)

    def _drop_drafts(self):
        self.held = {p: s for p, s in self.held.items() if p in {*self.points, self.offset}}

    def copied(self):
        """The oracle of a copy, or of what a file brings back."""
        kept = {p: s for p, s in self.held.items() if p in self.points or p == self.offset}
        return StateOracle(self.offset, kept, {p for p in kept if p < self.offset})

    def snapshot(self, start, stop):
        """The states in a snapshot of ``[start, stop)``, by position."""
        return {
            p: s
            for p, s in self.held.items()
            if start < p <= stop and (p in self.points or p == stop)
        }


def check_state(cache, oracle, dtypes, pinned=()):
    """Everything that can be seen agrees. pinned: stamps of the states in resident snapshots."""
    assert cache.offset == oracle.offset
    assert cache.kept == tuple(sorted(oracle.held))
    assert [cache.can_trim(oracle.offset - p) for p in range(oracle.offset + 1)] == [
        oracle.can_go(p) for p in range(oracle.offset + 1)
    ]
    states = {*oracle.held.values(), *oracle.recorded.values(), *pinned}
    assert cache.nbytes == len(states) * state_bytes(dtypes)
    if not oracle.offset:
        assert cache.state == ()
        return
    assert cache.dtype == dtypes
    check_arrays(cache.backend, cache.state, oracle.held[oracle.offset], dtypes)


def check_arrays(backend, arrays, stamp, dtypes):
    for array, expected in zip(arrays, host_state(stamp, dtypes), strict=True):
        same(backend.to_host(array), expected)


def host_arrays(backend, arrays):
    return [np.asarray(backend.to_host(array)) for array in arrays]
