"""Entries of a prompt cache: keys and values of one layer, by the protocol of mlx-lm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, Self

import mlx.core as mx

from kvcache import KVCache, NotSupportedError, RotatingKVCache
from kvcache.backends.arrays import NativeArray, NativeArrays

from .headers import decoded
from .rows import BatchedEntry, zeros


class AttentionEntry(BatchedEntry[KVCache]):
    """A `KVCache` or `RotatingKVCache` as mlx-lm's models and generators want it.

    cache: taken over, not copied. It has to name its backend, ``"mlx"``, because models make
        masks before they update.
    """

    def __init__(self, cache: KVCache) -> None:
        super().__init__(cache)
        # Where is_trimmable was asked last: see there.
        self._asked_at = -1
        # A mask that stays as it is, and what it was made for.
        self._settled: tuple[object, NativeArray | None] | None = None
        # Of the tokens to come, for each request; and the slack of the cache behind them.
        self._right_padding: Sequence[int] = ()
        self._slack = 0

    def _with(self, cache: KVCache) -> Self:
        return type(self)(cache)

    # What models call.

    @property
    def offset(self) -> int | NativeArray:
        """Position of the next token: an int, or an array [B] if rows are padded."""
        padding = self.cache.padding
        return self.cache.offset if padding is None else self.cache.offset - mx.array(padding)

    def update_and_fetch(self, keys: NativeArray, values: NativeArray) -> NativeArrays:
        """Append keys and values, and return those that the queries of this update attend to."""
        return self.cache.update(keys, values)

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> NativeArray | str | None:
        """Return the mask of the next `N` queries: an array, "causal", or None to see all."""
        cache = self.cache
        if not return_array and self._sees_all(N, window_size):
            return None if N == 1 else "causal"
        if N > 1 or not self._is_settled():
            return cache.mask(N, window_size, ahead=True)
        # One token after the other, the columns move along with their queries.
        asked = window_size, cache
        if self._settled is None or self._settled[0] != asked:
            self._settled = asked, cache.mask(1, window_size, ahead=True)
        return self._settled[1]

    def _sees_all(self, tokens: int, window: int | None) -> bool:
        """Return whether the rule hides no column but those of later tokens from the next ones."""
        cache = self.cache
        stop, padding = cache.offset + tokens, cache.padding
        if not isinstance(cache, RotatingKVCache):
            return padding is None and (window is None or stop <= window)
        window = cache.max_size if window is None else window
        if tokens > 1 or stop <= cache.max_size:
            return padding is None and stop <= min(window, cache.max_size)
        # A full window, of which a single query sees all, unless sinks bring tokens of the slack.
        most = 0 if padding is None else int(padding.max())
        return window >= cache.max_size and not cache.keep and stop - most >= cache.max_size

    def _is_settled(self) -> bool:
        """Return whether each token displaces another, in a rotating cache without padding."""
        cache = self.cache
        if not isinstance(cache, RotatingKVCache) or cache.padding is not None:
            return False
        return cache.len == cache.max_size + cache.slack

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
        back a draft, within its `slack`, but not the answer to a request. Speculative decoding asks
        after each update, and hears True: :meth:`trim` says if it cannot. A cache of prompts asks
        again of an entry at rest, and hears False.
        """
        cache, asked_at = self.cache, self._asked_at
        self._asked_at = cache.offset
        if not isinstance(cache, RotatingKVCache) or cache.can_trim(cache.offset):
            return True
        return asked_at != cache.offset

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

    # Batches.

    def _padded_row(self, like: KVCache, rows: int) -> KVCache:
        cache = like.make("mlx", like.options)
        cache.pad([1] * rows)
        cache.update(*(zeros(rows, array, tokens=1) for array in like.state))
        return cache

    def extract(self, idx: int) -> Self:
        entry = super().extract(idx)
        entry._asked_at = entry.cache.offset  # at rest: see is_trimmable
        return entry

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        super().prepare(left_padding=left_padding)
        if right_padding is None or not max(right_padding):
            return
        cache, slack = self.cache, 0
        if isinstance(cache, RotatingKVCache):
            # Padding would displace tokens that the requests still see.
            slack = cache.slack
            cache = with_slack(cache, slack + max(right_padding))
        self.cache, self._slack, self._right_padding = cache, slack, right_padding

    def finalize(self) -> None:
        if not self._right_padding:
            return
        rows = self.cache.split()
        for row, tokens in zip(rows, self._right_padding, strict=True):
            row.trim(tokens)
        cache = self._concat([(with_slack(row, self._slack), 1) for row in rows])
        self.cache, self._right_padding = cache, ()

    # Copies and files.

    @property
    def state(self) -> tuple[object, ...]:
        """Keys and values held unless the cache is empty, and a header."""
        return *self.cache.state, self._header(self.cache.options)

    @classmethod
    def from_state(cls, state: Sequence[NativeArray]) -> Self:
        """Return an entry with what :attr:`state` told.

        Raises: ForeignFileError for the state of something else.
        """
        *arrays, text = state
        header = decoded(text)
        kind = RotatingKVCache if "max_size" in header.options else KVCache
        cache = kind.make("mlx", header.options)
        if header.padding:
            cache.pad(header.padding)
        if arrays:
            keys, values = arrays
            cache.fill(keys, values, header.offset)
        entry = cls(cache)
        entry._requests = header.rows
        return entry


def with_slack(cache: KVCache, slack: int) -> KVCache:
    """Return a rotating cache with the tokens of `cache` and another slack; else `cache` itself."""
    if not isinstance(cache, RotatingKVCache) or slack == cache.slack:
        return cache
    other = RotatingKVCache.make("mlx", {**cache.options, "slack": slack})
    held: NativeArrays = cache.state
    surplus, keep = cache.len - cache.max_size - slack, cache.keep
    if cache.padding is not None:
        other.pad(cache.padding)
    elif surplus > 0:
        parts = [[array[:, :, :keep], array[:, :, keep + surplus :]] for array in held]
        held = tuple([mx.concatenate(part, axis=2) for part in parts])
    if held:
        other.fill(held[0], held[1], cache.offset)
    return other
