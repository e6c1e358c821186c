"""Contestants: the stores, and beside each the ceiling that the machine sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

from kvcache.bench.harness.contest import Contestant, UnavailableError
from kvcache.errors import StoreError
from kvcache.stores import FileStore, Hit, MemoryStore, Store, Stored, open_store
from kvcache.stores.frames import OVERHEAD

from .case import (
    FILE_STORE,
    FRESH,
    FULL_FILE_STORE,
    GET,
    MEMORY_STORE,
    PUT,
    REDIS_STORE,
    VALKEY_STORE,
    StoreCase,
)
from .ceilings import FileWrites, IncomingStream, OutgoingStream, Stream, file_reads, memcpy
from .server import running_server

PROGRAMS = {REDIS_STORE: "redis-server", VALKEY_STORE: "valkey-server"}
_ROOM = 4
"""Values that a full store has room for."""
_SERVER_NBYTES = 16 << 20
"""Memory of a server beside its values."""


class Entrants:
    """The contestants of one case. What they need (a server, connections) ends with `stack`."""

    def __init__(self, case: StoreCase, stack: ExitStack) -> None:
        self._case, self._stack = case, stack
        self.missing: dict[str, str] = {}

    def all(self) -> Iterator[tuple[str, Contestant]]:
        """Yield each contestant with its operation; the absent are in `missing`, with reasons."""
        case = self._case
        copy = memcpy(case)
        yield PUT, copy
        yield GET, copy
        yield PUT, FileWrites(case).contestant()
        yield GET, file_reads(case)
        streams: list[tuple[str, Stream]] = [(GET, IncomingStream(case))]
        streams += [(PUT, OutgoingStream(case, fresh)) for fresh in (False, True)]
        for operation, stream in streams:
            self._stack.callback(stream.close)
            yield operation, stream.contestant()
        files = FileStore(case.directory / "store")
        for name, store in ((MEMORY_STORE, MemoryStore()), (FILE_STORE, files)):
            self._stack.enter_context(store)
            yield PUT, Puts(name, store, case).contestant()
            yield GET, gets(name, store, case)
        full = FileStore(case.directory / "full", budget=_ROOM * (case.nbytes + OVERHEAD))
        yield PUT, evicting_puts(FULL_FILE_STORE, self._stack.enter_context(full), case)
        for name, program in PROGRAMS.items():
            try:
                full_server = self._store_on(program, _ROOM * case.nbytes + _SERVER_NBYTES)
                server = self._store_on(program)
            except UnavailableError as error:
                self.missing[name] = str(error)
            else:
                yield PUT, evicting_puts(name, full_server, case)
                yield GET, gets(name, server, case)
                yield PUT, FreshPuts(FRESH[name], program, case, self._stack).contestant()

    def _store_on(self, program: str, budget: int = 0) -> Store:
        return self._stack.enter_context(running_store(program, self._case.directory, budget))


@contextmanager
def running_store(program: str, directory: Path, budget: int = 0) -> Iterator[Store]:
    """Start a server, and give a store on it. Both end with the block.

    budget: as of :func:`running_server`.

    Raises: UnavailableError.
    """
    with running_server(program, directory, budget) as url, _opened(url) as store:
        yield store


def _opened(url: str) -> Store:
    try:
        return open_store(url)
    except StoreError as error:
        raise UnavailableError(str(error).rstrip(".")) from error


class Puts:
    """Puts of one value under new keys, each of which the rewind deletes."""

    def __init__(self, name: str, store: Store, case: StoreCase) -> None:
        self._name, self._store = name, store
        self._items = islice(case.items(), 1, None)  # the first is for those who get
        self._stored: list[bytes] = []

    def contestant(self) -> Contestant:
        """Return these puts as a contestant."""
        return Contestant(self._name, self.run, self.rewind)

    def run(self, steps: int) -> None:
        """Put as many values."""
        for item in islice(self._items, steps):
            [outcome] = self._store.put([item])
            _check(outcome, Stored)
            self._stored.append(item.key)

    def rewind(self, _: int) -> None:
        """Delete all values."""
        self._store.delete(self._stored)
        self._stored = []


class FreshPuts(Puts):
    """Puts to a server that was just started, and has to ask its system for memory.

    Not one that was emptied, whose allocator may have kept the memory.
    """

    def __init__(self, name: str, program: str, case: StoreCase, stack: ExitStack) -> None:
        self._start = partial(running_store, program, case.directory)
        self._running = stack.enter_context(ExitStack())
        super().__init__(name, self._running.enter_context(self._start()), case)

    def rewind(self, _: int) -> None:
        self._running.close()
        self._store = self._running.enter_context(self._start())


def evicting_puts(name: str, store: Store, case: StoreCase) -> Contestant:
    """Return puts of one value under new keys into a full store, each of which evicts another."""
    items = case.items()

    def run(steps: int) -> None:
        for item in islice(items, steps):
            [outcome] = store.put([item])
            _check(outcome, Stored)

    run(_ROOM)
    return Contestant(name, run)


def gets(name: str, store: Store, case: StoreCase) -> Contestant:
    """Return reads of one value."""
    item = next(case.items())
    [outcome] = store.put([item])
    _check(outcome, Stored)

    def run(steps: int) -> None:
        for _ in range(steps):
            [outcome] = store.get([item.key])
            _check(outcome, Hit)

    return Contestant(name, run)


def _check(outcome: object, wanted: type) -> None:
    """Refuse to time anything else, such as the time that a full disk takes to say so."""
    if not isinstance(outcome, wanted):
        raise StoreError(f"the benchmark cannot go on: {outcome}.")
