"""Calls whose result Ctrl-C cannot lose."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def keeping_result(program: Callable[P, R]) -> Callable[P, R]:
    """Return `program`, which consumes arguments, such that Ctrl-C cannot lose its result.

    Python runs signal handlers when a call returns, before its result is assigned. Raised there,
    a KeyboardInterrupt would leave the caller with nothing but the consumed buffer. An iterator is
    unpacked by one instruction, after which no handler runs; nor does one when a function written
    in Python returns. Callers store the result in the statement of the call.
    """

    def call(*arguments: P.args, **options: P.kwargs) -> R:
        run = partial(program, **options) if options else program
        # One line, because debuggers interrupt between lines.
        return [*map(run, *zip(arguments, strict=True))][0]  # noqa: RUF015 - next() is a call

    return call
