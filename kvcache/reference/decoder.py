"""The parts of a language model that generation, chats, servers and commands use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy.typing as npt

from kvcache import Cache, KVCache, LayerCaches, RotatingKVCache
from kvcache.backends import Array, Backend

LayerKind: TypeAlias = Literal["kv", "rotating"]
"""Per-layer caches of keys and values: ``"kv"`` holds every token, ``"rotating"`` a bounded number.

Recurrent layers have a state in either case.
"""
ModelCaches: TypeAlias = LayerCaches[Any]
"""The caches of all layers of a model; of which classes, the model alone knows."""


class PassPart(NamedTuple):
    """Tokens of one sequence in a forward pass."""

    sequence: int
    start: int
    """Position of the first token."""
    ids: list[int]
    last: bool
    """True if the pass is to return the token after them."""


class DecoderPass(Protocol):
    """A forward pass of a decoder over a cache of many sequences."""

    @property
    def cache(self) -> Cache:
        """The cache, with a part for each kind of layer if there are several."""

    @property
    def cells(self) -> int:
        """Tokens that there is room for, of all sequences together."""

    @property
    def nbytes(self) -> int:
        """Bytes of the memory of the cache."""

    @property
    def any_length(self) -> bool:
        """False where every number of tokens is compiled by itself, so that there should be few."""

    def __call__(self, parts: Sequence[PassPart], /) -> list[int]:
        """Feed `parts`; return the likeliest next token of each part with `last` set.

        Raises: CacheFullError; nothing has changed then.
        """


class Decoder(Protocol):
    """A language model on one backend; every decoder in this package is one."""

    @property
    def backend(self) -> Backend:
        """The backend of its weights and caches."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    def __call__(self, tokens: npt.ArrayLike, caches: Sequence[Any] | None = None, /) -> Array:
        """Return logits after the last of `tokens` [B, L]: float32 [B, vocab].

        caches: one per layer, updated by this call; None computes from these tokens alone.
        """

    def make_caches(
        self,
        kind: LayerKind = "kv",
        *,
        max_size: int = 4096,
        keep: int = 0,
        dtype: str = "float32",
    ) -> ModelCaches:
        """Make the empty cache of each layer.

        max_size, keep: of rotating caches: they hold the first `keep` tokens and the latest others,
            `max_size` in all.
        dtype: of keys and values. The model casts, if it is not float32.

        Raises: ValueError for an unknown kind or sizes that leave no window; DTypeError for a
            dtype that the backend lacks.
        """

    def make_pass(
        self,
        max_sequences: int,
        capacity: int,
        max_batch: int,
        *,
        dtype: str = "float32",
        window: int | None = None,
        context_shift: bool = False,
    ) -> DecoderPass:
        """Make a cache of many sequences, and the forward pass of this model over it.

        max_sequences: in the cache. capacity: tokens of each. max_batch: tokens of a pass, at most.
        window: attend to so many tokens at most, the token itself included.
        context_shift: tokens can be removed from the middle of a sequence.

        Raises: ValueError for sizes below 1; DTypeError; UnsupportedModelError for a model that
            cannot have tokens removed.
        """


def attention_caches(
    backend: Backend, kind: LayerKind, max_size: int, keep: int, dtype: str
) -> Callable[[], KVCache]:
    """Return a function that makes the empty cache of one attention layer.

    Raises: as :meth:`Decoder.make_caches`; sizes that leave no window when a cache is made.
    """
    if kind not in ("kv", "rotating"):
        raise ValueError(f"a cache per layer is of kind 'kv' or 'rotating'; got {kind!r}.")
    backend.dtype(dtype)
    if kind == "kv":
        return lambda: KVCache(backend, dtype=dtype)
    return lambda: RotatingKVCache(max_size, keep, backend, dtype=dtype)


class AttentionCache(Protocol):
    """The cache of one attention layer, or a stand-in for one."""

    @property
    def dtype(self) -> str | tuple[str, str] | None:
        """Dtype of keys and values, or of each; None for any."""

    def update(self, keys: Array, values: Array, /) -> tuple[Array, Array]:
        """Add [B, kv_heads, L, head_dim]; return all held tokens, [B, kv_heads, n, head_dim]."""


def updated_in_float32(
    backend: Backend, cache: AttentionCache, k: Array, v: Array
) -> tuple[Array, Array]:
    """Update `cache` with float32 keys and values, cast to its dtypes; return float32 again."""
    if cache.dtype in (None, "float32"):
        return cache.update(k, v)
    cast, computed, named = backend.xp.astype, backend.dtype("float32"), cache.dtype
    key_dtype, value_dtype = named if isinstance(named, tuple) else (named, named)
    k, v = cache.update(cast(k, backend.dtype(key_dtype)), cast(v, backend.dtype(value_dtype)))
    return cast(k, computed), cast(v, computed)
