"""Contests on backends and dtypes: who takes part, and who cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Protocol, TypeAlias, TypeVar

from kvcache.backends import HOST_DTYPES, Backend
from kvcache.errors import DTypeError

from .contest import Contestant, Framework, UnavailableError, framework_of
from .report import Skipped
from .timing import Blocks, interleave


class Scene(Protocol):
    """What all contestants have in common in one place."""

    @property
    def backend(self) -> Backend:
        """Whose arrays they handle."""

    @property
    def dtype(self) -> str:
        """Of keys and values."""

    @property
    def max_steps(self) -> int:
        """Longest block of steps."""


S = TypeVar("S", bound=Scene)
T = TypeVar("T")
Factories: TypeAlias = Mapping[str, Callable[[S], Contestant]]


def check_dtypes(dtypes: Sequence[str]) -> None:
    """Raise DTypeError unless kvcache has a name for all of these."""
    for dtype in dtypes:
        if dtype not in HOST_DTYPES:
            raise DTypeError(f"a dtype is one of {', '.join(HOST_DTYPES)}; got {dtype!r}.")


def compare(
    scenes: Sequence[S],
    factories: Callable[[Framework], Factories[S]],
    record: Callable[[S, str, Blocks], T],
    rounds: int,
    tick: Callable[[], None],
) -> tuple[list[T], list[Skipped]]:
    """Time everyone on one backend and dtype, in every scene; who is missing, and why.

    factories: all contestants by name. record: what to note of one of them in a scene.
    """
    backend, dtype = scenes[0].backend, scenes[0].dtype
    if dtype not in backend.dtypes:
        for _ in range(rounds + 1):
            tick()
        return [], [Skipped(backend.spec, dtype, "", f"{backend.name} has no {dtype}")]
    framework = framework_of(backend)
    with framework.scope():
        entries, missing = _entries(scenes, factories(framework))
        contestants = [(entry, scene.max_steps) for scene, entry in entries]
        found = interleave(contestants, rounds, backend.sync, tick)
    timings = [
        record(scene, entry.name, blocks)
        for (scene, entry), blocks in zip(entries, found, strict=True)
    ]
    skipped = [Skipped(backend.spec, dtype, name, reason) for name, reason in missing.items()]
    return timings, skipped


def _entries(
    scenes: Sequence[S], factories: Factories[S]
) -> tuple[list[tuple[S, Contestant]], dict[str, str]]:
    """Those who take part in every scene, and the reasons of the others."""
    entries: list[tuple[S, Contestant]] = []
    missing: dict[str, str] = {}
    for scene, (name, make) in product(scenes, factories.items()):
        try:
            entries.append((scene, make(scene)))
        except UnavailableError as error:
            missing[name] = str(error)
    return entries, missing
