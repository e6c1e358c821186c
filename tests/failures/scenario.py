"""The parts of a scenario: a world with caches in some state, and one call that changes it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvcache import Backend

from .observation import attempt, look_at, look_at_snapshot


@dataclass
class Place:
    """Where a scenario runs. other: a second backend, for copies. directory: for files."""

    backend: Backend
    other: Backend
    directory: Path

    @property
    def backends(self):
        return [self.backend, self.other]


class World:
    """Caches in some state, and whatever a user keeps besides them.

    snapshots: by name, open. result: of the call under test, once it has returned.
    """

    def __init__(self, place):
        self.place, self.backend = place, place.backend
        self.snapshots = {}
        self.result = None
        self.given = None
        self._stamps = itertools.count(1)

    def lose(self):
        """Forget the result of the call, as a caller does that is interrupted as it returns."""
        self.result = None

    def array(self, host, dtype="float32"):
        return self.backend.from_host(np.asarray(host, np.float32), dtype)

    def stamps(self, count):
        """Return numbers that no other token has."""
        return [next(self._stamps) for _ in range(count)]

    def look(self):
        """Observe everything, changing nothing."""
        results = self.result if isinstance(self.result, tuple) else (self.result,)
        files = self.place.directory.iterdir()
        return {
            **self.look_at_caches(),
            "snapshots": {n: attempt(look_at_snapshot, s) for n, s in self.snapshots.items()},
            "orphans": self.orphans(),
            "result": [attempt(look_at, result) for result in results],
            "files": sorted((path.name, path.stat().st_size) for path in files),
        }

    def look_at_caches(self):
        """Observe the caches of this world."""
        raise NotImplementedError

    def orphans(self):
        """Count the rows that are pinned for nobody."""
        return 0

    def known_rows(self):
        """Return the rows of all snapshots in the hands of the user."""
        results = self.result if isinstance(self.result, tuple) else (self.result,)
        kept = [*self.snapshots.values(), *results]
        return [part.rows for thing in kept for part in getattr(thing, "parts", ())]


def nothing(world):
    """Do nothing."""


@dataclass(frozen=True)
class Act:
    """One public call.

    run: the call itself. prepare: whatever it needs, made before it.
    finish: the rest of the pass that the call is part of.
    instead: call that a failure may turn into, where the caller has no second chance.
    resource: True if its result has to be closed, and is lost with an interrupt as it returns.
    silent: True if no difference can be seen afterwards.
    """

    name: str
    run: Callable[[World], object]
    prepare: Callable[[World], object] = nothing
    finish: Callable[[World], object] = nothing
    instead: Callable[[World], object] | None = None
    resource: bool = False
    silent: bool = False


@dataclass(frozen=True)
class Scenario:
    """One call in one state, and what may come later. build: makes the state."""

    state: str
    build: Callable[[Place], World]
    act: Act
    laters: tuple[Callable[[World], object], ...]
    in_pass: bool = field(default=False)

    def __str__(self):
        return f"{self.state}-{self.act.name}".replace(" ", "_")

    def start(self, place):
        """Return a world in which the call comes next."""
        for path in place.directory.iterdir():
            path.unlink()
        world = self.build(place)
        self.act.prepare(world)
        return world

    def complete(self, world):
        """Make the call, and finish the pass that it is part of."""
        world.result = self.act.run(world)
        self.act.finish(world)
