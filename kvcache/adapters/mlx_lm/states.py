"""Entries of a prompt cache: the state of one recurrent layer, by the protocol of mlx-lm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import mlx.core as mx
import numpy as np

from kvcache import NotSupportedError, StateCache
from kvcache.backends.arrays import NativeArray

from .headers import decoded
from .rows import BatchedEntry, zeros


class RecurrentEntry(BatchedEntry[StateCache]):
    """A `StateCache` as mlx-lm's recurrent layers and convolutions want it.

    cache: taken over, not copied. size: number of arrays that the layer may assign.
    """

    def __init__(self, cache: StateCache, size: int) -> None:
        super().__init__(cache)
        self.arrays = size
        # Of the tokens to come, how many are none of padding, for each request; None for all.
        self._lengths: Sequence[int] | None = None
        # Assigned by the layer, and not counted before it says how many tokens went by.
        self._coming: dict[int, NativeArray] = {}

    def _with(self, cache: StateCache) -> Self:
        return type(self)(cache, self.arrays)

    # What layers call.

    def __getitem__(self, index: int) -> NativeArray | None:
        """Return an array of the state behind the tokens seen; None for no state."""
        if len(self._coming) == self.arrays:
            self._coming = {}
            raise NotSupportedError(
                "a recurrent layer says advance(tokens) behind its assignments, so that the state "
                "has a position; this model has not. Use mlx-lm's own cache for it."
            )
        state = self.cache.state
        return state[index] if index < len(state) else None

    def __setitem__(self, index: int, array: NativeArray) -> None:
        """Take an array of the state behind the tokens of the coming :meth:`advance`."""
        self._coming[index] = array

    def advance(self, N: int) -> None:
        """Note that `N` tokens went by: what was assigned is the state behind them."""
        state = dict(enumerate(self.cache.state)) | self._coming
        self.cache.advance(N, *(state[index] for index in sorted(state)))
        self._coming = {}
        if self._lengths is not None:
            self._lengths = [length - N for length in self._lengths]

    @property
    def lengths(self) -> mx.array | None:
        """Tokens to come before padding, of each request, int32 [B]; None without padding."""
        return None if self._lengths is None else mx.array(list(self._lengths))

    def make_mask(self, N: int) -> mx.array | None:
        """Return which of the next `N` columns are no padding, bool [B, N]; None for all."""
        first = self.cache.padding
        last, columns = self._lengths, np.arange(N)
        is_token = np.ones((self.rows, N), np.bool_)
        if first is not None:
            is_token &= columns >= first[:, None] - self.cache.offset
        if last is not None:
            is_token &= columns < np.array(last)[:, None]
        return None if is_token.all() else mx.array(is_token)

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

    # Batches.

    def _padded_row(self, like: StateCache, rows: int) -> StateCache:
        cache = StateCache("mlx")
        cache.pad([1] * rows)
        cache.advance(1, *(zeros(rows, array) for array in like.state))
        return cache

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        super().prepare(left_padding=left_padding)
        self._lengths = lengths

    def finalize(self) -> None:
        if self._lengths is None:
            return
        cache, old = StateCache("mlx"), self.cache
        right = -np.minimum(self._lengths, 0)
        cache.pad(right if old.padding is None else old.padding + right)
        if old.offset:
            cache.advance(old.offset, *old.state)
        self.cache, self._lengths = cache, None

    # Copies and files.

    @property
    def state(self) -> tuple[object, ...]:
        """The arrays of the state unless the cache is empty, and a header."""
        return *self.cache.state, self._header({"size": self.arrays})

    @classmethod
    def from_state(cls, state: Sequence[NativeArray]) -> Self:
        """Return an entry with what :attr:`state` told.

        Raises: ForeignFileError for the state of something else.
        """
        *arrays, text = state
        header = decoded(text)
        cache = StateCache("mlx")
        if header.padding:
            cache.pad(header.padding)
        if arrays:
            cache.advance(header.offset, *arrays)
        entry = cls(cache, header.options["size"])
        entry._requests = header.rows
        return entry
