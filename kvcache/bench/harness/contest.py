"""Contestants of a benchmark, and their common case.

A contestant is two loops. `run` takes the given number of steps and nothing else, so that a
write of less than a microsecond is not drowned by the clock or by a call to reach it;
`rewind` goes back as many steps, untimed, so that each block of steps starts from the same
history.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, TypeVar

import numpy as np

from kvcache.backends import Backend
from kvcache.backends.arrays import NativeArray

RAW = "raw"
"""Name of the framework's own calls, which every cache is compared with."""

Loop: TypeAlias = Callable[[int], None]
"""A number of steps, taken one after the other."""


class UnavailableError(Exception):
    """A contestant cannot take part; the message gives the reason."""


def _no_rewind(steps: int) -> None:
    """Do nothing: the loop starts from the same slot each time."""


@dataclass(frozen=True)
class Contestant:
    """Two loops and a name. run: is timed. rewind: goes back as many steps before, untimed."""

    name: str
    run: Loop
    rewind: Loop = _no_rewind


@dataclass(frozen=True)
class Case:
    """Backend, dtype and shape of the arrays of one comparison, the same for every contestant.

    Keys and values are ``[batch, heads, tokens, head_dim]``; a step writes the next token of each
    row of the batch.
    """

    backend: Backend
    dtype: str
    tokens: int
    batch: int
    heads: int
    head_dim: int

    longest_block: ClassVar[int] = 64
    """Most steps that a block may have, whatever `tokens`."""

    @property
    def max_steps(self) -> int:
        """Steps of the longest block: a quarter of the tokens where few are held."""
        return max(1, min(self.longest_block, self.tokens // 4))

    def history(self) -> tuple[NativeArray, NativeArray]:
        """Return keys and values of all tokens; new ones, because a contestant may adopt them."""
        shape = self.batch, self.heads, self.tokens, self.head_dim
        # Zeros: the time of a write does not depend on the values that it replaces.
        alloc = self.backend.alloc
        return alloc(shape, self.dtype), alloc(shape, self.dtype)

    def token(self) -> NativeArray:
        """Return keys or values of one step, ``[batch, heads, 1, head_dim]``."""
        return self.ones((self.batch, self.heads, 1, self.head_dim))

    def ones(self, shape: tuple[int, ...]) -> NativeArray:
        """Return a new array of ones, of the dtype of this case."""
        return self.backend.from_host(np.ones(shape, np.float32), self.dtype)


AnyCase = TypeVar("AnyCase", bound=Case)
Factories: TypeAlias = Mapping[str, Callable[[AnyCase], Contestant]]
"""Functions by name of a contestant: each makes that contestant in a case.

They raise UnavailableError where the contestant cannot take part.
"""
