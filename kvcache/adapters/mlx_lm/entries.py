"""Entries of a prompt cache: keys and values of one layer, by the protocol of mlx-lm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, Self

import mlx.core as mx

from kvcache import KVCache, NotSupportedError, RotatingKVCache

from .headers import Header, decoded


class AttentionEntry:
    """A `KVCache` or `RotatingKVCache` as mlx-lm's models and generators want it.

    cache: taken over, not copied. It has to name its backend, ``"mlx"``, because models make
        masks before they update.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        # Where is_trimmable was asked last: see there.
        self._asked_at = -1

    # What models call.

    @property
    def offset(self) -> Any:
        """Position of the next token: an int, or an array [B] if rows are padded."""
        padding = self.cache.padding
        return self.cache.offset if padding is None else self.cache.offset - mx.array(padding)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values, and return those that the queries of this update attend to."""
        return self.cache.update(keys, values)

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """Return the mask of the next `N` queries: an array, "causal", or None to see all."""
        cache = self.cache
        if cache.padding is None and not return_array and self._sees_all(N, window_size):
            return None if N == 1 else "causal"
        mask: mx.array | None = cache.mask(N, window_size, ahead=True)
        return mask

    def _sees_all(self, tokens: int, window: int | None) -> bool:
        """Return whether windows hide none of the columns from the next queries."""
        cache, stop = self.cache, self.cache.offset + tokens
        if window is not None and stop > window:
            return False
        return not isinstance(cache, RotatingKVCache) or stop <= cache.max_size

    # What generators call.

    def size(self) -> int:
        """Return the tokens that the next query sees."""
        cache = self.cache
        most = cache.max_size if isinstance(cache, RotatingKVCache) else cache.offset
        return min(cache.offset, most)

    def empty(self) -> bool:
        """Return whether no token came."""
        return not self.cache.offset

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare capacity included."""
        return self.cache.nbytes

    def is_trimmable(self) -> bool:
        """Return whether tokens can be taken back.

        Two callers ask, and neither says how many. A rotating cache that dropped tokens can take
        back a draft, within its `slack`, but not the answer of a request. Speculative decoding asks
        after each update. A cache of prompts asks again of an entry at rest: it hears False.
        """
        cache, asked_at = self.cache, self._asked_at
        self._asked_at = cache.offset
        if not isinstance(cache, RotatingKVCache) or cache.can_trim(cache.offset):
            return True
        return asked_at != cache.offset and cache.can_trim(1)

    def trim(self, n: int) -> int:
        """Take back the last `n` tokens, all if there are fewer, and return their number.

        Raises: TrimError where a rotating cache dropped tokens that are needed.
        """
        tokens = min(n, self.cache.offset)
        self.cache.trim(tokens)
        self._asked_at = self.cache.offset
        return tokens

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> NoReturn:
        """Raise NotSupportedError: there is no quantized cache."""
        raise NotSupportedError(
            f"keys and values are cached in the dtype of the model; got kv_bits={bits}, "
            f"kv_group_size={group_size}. Leave kv_bits out, or use mlx-lm's own cache."
        )

    # Copies and files.

    @property
    def state(self) -> tuple[object, ...]:
        """A header, and keys and values held unless the cache is empty."""
        cache, padding = self.cache, self.cache.padding
        header = Header(
            dict(cache.options),
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
        kind = RotatingKVCache if "max_size" in header.options else KVCache
        cache = kind.make("mlx", header.options)
        if header.padding:
            cache.pad(header.padding)
        if arrays:
            keys, values = arrays
            cache.fill(keys, values, header.offset)
        return cls(cache)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return type(self)(self.cache.copy())
