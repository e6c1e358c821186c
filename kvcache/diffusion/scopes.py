"""Scopes: which part of a network a cache stands in for.

The whole network needs no scope: :meth:`DiffusionCache.run` takes it as it is. Branches do not
either: apply several sites in one step. A range of blocks takes a little more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from kvcache.errors import DiffusionCacheError

from .cache import DiffusionCache
from .history import bundle
from .traced import TracedCache

Block: TypeAlias = Callable[[Any], Any]
"""One block of a network: an array, or a tuple of them, to the same."""


@dataclass(frozen=True)
class BlockRange:
    """The blocks of a transformer, but for some at either end, which every step computes.

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
        cache: DiffusionCache | TracedCache,
        step: Any,
        x: Any,
        blocks: Sequence[Block],
        **options: Any,
    ) -> Any:
        """What all `blocks` make of `x`, or a prediction of it.

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
        inner = _through(blocks[: self.first], x)
        if self.first and options.get("signal") is None:
            options["signal"] = lambda: bundle(inner)[0] - bundle(x)[0]
        rest = blocks[self.first : end]
        inner = cache.run(step, inner, lambda inner: _through(rest, inner), **options)
        return _through(blocks[end:], inner)


def _through(blocks: Sequence[Block], x: Any) -> Any:
    for block in blocks:
        x = block(x)
    return x
