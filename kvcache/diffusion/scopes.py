"""Scopes: the part of a network to be skipped and predicted.

The whole network needs no scope: :meth:`DiffusionCache.run` takes it as it is. Branches do not
either: apply several sites in one step. A range of blocks takes a little more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar, cast

from kvcache.backends import Array
from kvcache.errors import DiffusionCacheError

from .history import bundle, copied

States = TypeVar("States")
"""An array, or a tuple of them."""

Block: TypeAlias = Callable[[States], States]
"""One block of a network: an array, or a tuple of them, to the same."""


class Runner(Protocol):
    """A DiffusionCache, a TracedCache, or a Recorder in place of a cache."""

    @property
    def run(self) -> Callable[..., object]:
        """See :meth:`DiffusionCache.run`."""


@dataclass(frozen=True)
class BlockRange:
    """The blocks of a transformer, but for some at either end, computed in every step.

    The first ones tell how much has changed: what they add to the first array they are given is
    the signal, unless another one is given. The last ones correct what was predicted.
    ``BlockRange(1)`` is what the First Block Cache does, ``BlockRange(n, m)`` the FnBm of DBCache
    (cache-dit).
    """

    first: int = 1
    last: int = 0

    def __post_init__(self) -> None:
        if self.first < 0 or self.last < 0:
            raise DiffusionCacheError(
                f"blocks count from 0; got first {self.first}, last {self.last}."
            )

    def run(
        self,
        cache: Runner,
        step: int | Array,
        x: States,
        blocks: Sequence[Block[States]],
        **options: object,
    ) -> States:
        """Return the result of all `blocks` for `x`, or a prediction of it.

        x: an array or a tuple of them, [B, tokens, width]; every block takes and gives the like.
        options: those of :meth:`DiffusionCache.run`.

        Raises: DiffusionCacheError if no block is left to skip; what ``run`` raises.
        """
        end = len(blocks) - self.last
        if self.first >= end:
            raise DiffusionCacheError(
                f"{self.first} first and {self.last} last of {len(blocks)} blocks leave none "
                "to skip. Make the scope smaller."
            )
        measures_first = self.first > 0 and options.get("signal") is None
        # A copy, because blocks may write to what they are given.
        given = copied(bundle(x)[0]) if measures_first else None
        entering = _through(blocks[: self.first], x)
        if measures_first:
            # A function, because a policy that goes by the step measures nothing.
            options["signal"] = lambda: bundle(entering)[0] - given
        skippable = blocks[self.first : end]
        leaving = cache.run(step, entering, lambda states: _through(skippable, states), **options)
        return _through(blocks[end:], cast(States, leaving))


def _through(blocks: Sequence[Block[States]], x: States) -> States:
    for block in blocks:
        x = block(x)
    return x
