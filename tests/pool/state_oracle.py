"""A slow model of a recurrent pool: for every sequence the list of the states that it has."""

from dataclasses import dataclass, field

import numpy as np

from kvcache.backends import HOST_DTYPES
from kvcache.testing.coded import coded, same

LAYERS = 2
SHAPES = ((3, 4), (5,)), ((2,),)
"""By layer, of the arrays of one state."""


def dtypes_of(backend):
    """By layer, of the arrays."""
    other = "bfloat16" if "bfloat16" in backend.dtypes else "int8"
    return ("float32", other), ("int32",)


def host_state(backend, layer, stamp):
    """The arrays of the state called `stamp`, ``[1, ...]``; equal in no other state or layer."""
    pairs = zip(SHAPES[layer], dtypes_of(backend)[layer], strict=True)
    return [
        coded((1, 1, 1, int(np.prod(shape))), dtype, 1000 * layer + stamp).reshape(1, *shape)
        for shape, dtype in pairs
    ]


def states(backend, layer, stamps):
    """Several states, ``[stamps, ...]``."""
    columns = zip(*(host_state(backend, layer, stamp) for stamp in stamps), strict=True)
    return [backend.from_host(np.concatenate(column)) for column in columns]


def state_bytes(backend):
    """Bytes of one state in all layers."""
    return sum(
        int(np.prod(shape)) * HOST_DTYPES[dtype].itemsize
        for layer in range(LAYERS)
        for shape, dtype in zip(SHAPES[layer], dtypes_of(backend)[layer], strict=True)
    )


@dataclass
class PoolOracle:
    """By sequence: the stamps of the states by position, and the positions scheduled.

    marks: where a draft begins, if one does. drafted: positions of its states, of which some may be
    resume points as well.
    """

    held: list[dict[int, int]]
    points: list[set[int]] = field(default_factory=list)
    marks: list[int | None] = field(default_factory=list)
    drafted: list[set[int]] = field(default_factory=list)

    def __post_init__(self):
        self.points = [set() for _ in self.held]
        self.marks = [None for _ in self.held]
        self.drafted = [set() for _ in self.held]

    def end(self, sequence):
        return max(self.held[sequence], default=0)

    def cuts(self, sequence, tokens):
        end = self.end(sequence)
        draft = self.marks[sequence] == end
        return tuple(p for p in range(end + 1, end + tokens) if draft or p in self.points[sequence])

    def store(self, sequence, tokens, stamp, recorded):
        end = self.end(sequence)
        if self.marks[sequence] == end:
            self.drafted[sequence] |= {end, *recorded, end + tokens}
        else:
            self.drafted[sequence].add(end)
            self.forget_draft(sequence)
        self.held[sequence] |= recorded
        self.held[sequence][end + tokens] = stamp

    def checkpoint(self, sequence):
        end = self.end(sequence)
        self.drafted[sequence].discard(end)
        self.forget_draft(sequence)
        self.marks[sequence] = end

    def forget_draft(self, sequence):
        """Forget the states of a draft, but for those at resume points."""
        for position in self.drafted[sequence] - self.points[sequence]:
            self.held[sequence].pop(position, None)
        self.marks[sequence], self.drafted[sequence] = None, set()

    def lasting(self, sequence, stop):
        """The states up to `stop`, those of a draft left out before that or the end."""
        drafted = self.drafted[sequence] - self.points[sequence] - {stop, self.end(sequence)}
        return {p: s for p, s in self.held[sequence].items() if p <= stop and p not in drafted}

    def schedule(self, sequence, positions):
        self.points[sequence] |= {p for p in positions if p >= max(1, self.end(sequence))}

    def can_go(self, sequence, position):
        return position == 0 or position >= self.end(sequence) or position in self.held[sequence]

    def copy(self, source, target, length):
        end, points = self.end(source), self.points[source]
        held = self.lasting(source, length)
        kept = {p for p in held if p != end and (p in points or p not in self.drafted[source])}
        self.held[target] = held
        self.points[target] = kept | {p for p in points if p <= length} if held else set()
        self.marks[target], self.drafted[target] = None, set()

    def snapshot(self, sequence, start, stop):
        return {p: s for p, s in self.lasting(sequence, stop).items() if start < p}

    def restore(self, sequence, position, stamp):
        self.held[sequence], self.points[sequence] = {position: stamp}, set()
        self.marks[sequence], self.drafted[sequence] = None, set()


def rows_of(backend, snapshot):
    """The stamps in a snapshot by position, found by their content; all layers have to agree."""
    [part] = snapshot.parts
    content = part.rows.content()
    return {
        int(position) + 1: [
            [np.array(array.data[row]) for array in content.get(layer, ())]
            for layer in range(LAYERS)
        ]
        for row, position in enumerate(part.rows.positions)
    }


def check_rows(backend, snapshot, stamps):
    """A snapshot has just the states called `stamps`, by position."""
    rows = rows_of(backend, snapshot)
    assert sorted(rows) == sorted(stamps)
    for position, stamp in stamps.items():
        for layer in range(LAYERS):
            expected = host_state(backend, layer, stamp)
            for got, wanted in zip(rows[position][layer], expected, strict=True):
                same(got, wanted)


def check_states(backend, got, layer, stamps):
    """What a layer was given is the states called `stamps`, or zeros for None."""
    if not any(stamps):
        assert got is None
        return
    for number, array in enumerate(got):
        host = backend.to_host(array)
        assert len(host) == len(stamps)
        for row, stamp in enumerate(stamps):
            expected = host_state(backend, layer, stamp or 1)[number]
            same(host[row : row + 1], expected if stamp else np.zeros_like(expected))
