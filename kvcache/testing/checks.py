"""The list of checks, and the way to write one: ``check(backend, dtype)`` raises or returns.

Nothing here needs pytest, so that the suite runs on a user's hardware from the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from kvcache.backends import HOST_DTYPES, Backend
from kvcache.errors import KVCacheError

CheckFunction: TypeAlias = Callable[[Backend, str], None]
"""Raises, whatever it may be, unless the backend keeps a rule for the dtype of that name."""


@dataclass(frozen=True)
class Check:
    """One rule of the contract, for one dtype."""

    name: str
    dtype: str
    run: CheckFunction

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}"


_CHECKS: list[CheckFunction] = []


def check(function: CheckFunction) -> CheckFunction:
    """Add `function` to the suite; its name is the name of the rule, its docstring the rule."""
    _CHECKS.append(function)
    return function


def all_checks() -> Iterator[Check]:
    """Yield every check imported so far, for every dtype of kvcache."""
    for function in _CHECKS:
        for dtype in HOST_DTYPES:
            yield Check(function.__name__, dtype, function)


@contextmanager
def refuses(error: type[KVCacheError], *words: str) -> Iterator[None]:
    """Raise AssertionError unless the block raises `error` with all `words` in its message."""
    try:
        yield
    except error as caught:
        missing = [word for word in words if word not in str(caught)]
        if missing:
            raise AssertionError(f"message lacks {missing}: {caught}") from caught
    else:
        raise AssertionError(f"{error.__name__} was not raised")
