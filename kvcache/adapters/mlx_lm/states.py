"""Entries of a prompt cache: the state of one recurrent layer, by the protocol of mlx-lm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import mlx.core as mx

from kvcache import NotSupportedError, StateCache

from .headers import Header, decoded


class RecurrentEntry:
    """A `StateCache` as mlx-lm's recurrent layers and convolutions want it.

    cache: taken over, not copied. size: number of arrays that the layer may assign.
    """

    def __init__(self, cache: StateCache, size: int) -> None:
        self.cache, self.arrays = cache, size
        # Assigned by the layer, and not counted before it says how many tokens went by.
        self._coming: dict[int, mx.array] = {}

    # What layers call.

    def __getitem__(self, index: int) -> mx.array | None:
        """Return an array of the state behind the tokens seen; None for no state."""
        if len(self._coming) == self.arrays:
            self._coming = {}
            raise NotSupportedError(
                "a recurrent layer says advance(tokens) behind its assignments, so that the state "
                "has a position; this model has not. Use mlx-lm's own cache for it."
            )
        state = self.cache.state
        return state[index] if index < len(state) else None

    def __setitem__(self, index: int, array: mx.array) -> None:
        """Take an array of the state behind the tokens of the coming :meth:`advance`."""
        self._coming[index] = array

    def advance(self, N: int) -> None:
        """Note that `N` tokens went by: what was assigned is the state behind them."""
        state = dict(enumerate(self.cache.state)) | self._coming
        self.cache.advance(N, *(state[index] for index in sorted(state)))
        self._coming = {}

    lengths: mx.array | None = None

    def make_mask(self, N: int) -> mx.array | None:
        """Return which of the next `N` tokens of each row are tokens, [B, N]; None for all."""
        return None

    # What generators call.

    @property
    def offset(self) -> int:
        """Tokens seen."""
        return self.cache.offset

    def size(self) -> int:
        """Return 0, as for every cache whose state does not grow."""
        return 0

    def empty(self) -> bool:
        """Return whether no token came."""
        return not self.cache.offset

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return self.cache.nbytes

    def is_trimmable(self) -> bool:
        """Return False: a state has no tokens to take back."""
        return False

    def trim(self, n: int) -> int:
        """Go back `n` tokens, to where a state was kept, and return their number.

        Raises: TrimError where there is none.
        """
        tokens = min(n, self.cache.offset)
        self.cache.trim(tokens)
        return tokens

    # Copies and files.

    @property
    def state(self) -> tuple[object, ...]:
        """A header, and the arrays of the state unless the cache is empty."""
        cache, padding = self.cache, self.cache.padding
        header = Header(
            {"size": self.arrays},
            cache.offset,
            cache.rows or 1,
            () if padding is None else padding.tolist(),
        )
        return header.encoded(), *cache.state

    @classmethod
    def from_state(cls, state: Sequence[object]) -> Self:
        """Return an entry with what :attr:`state` told.

        Raises: ForeignFileError for the state of something else.
        """
        header, arrays = decoded(state[0]), state[1:]
        cache = StateCache("mlx")
        if header.padding:
            cache.pad(header.padding)
        if arrays:
            cache.advance(header.offset, *arrays)
        return cls(cache, header.options["size"])

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return type(self)(self.cache.copy(), self.arrays)
