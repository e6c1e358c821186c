"""The layout of the caches of a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from kvcache.errors import DTypeError

from .integers import as_index

Layout: TypeAlias = Literal["htd", "thd", "hdt"]
"""Order of the axes of keys or values in a pool: h kv_heads, t tokens, d head_dim."""
_MASK_DTYPES = ("bool", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class CacheConfig:
    """Layout of the caches of a backend; a model may override it before first use.

    padding: lengths of returned keys and values are multiples of so many tokens.
    key_layout, value_layout: order of axes in ``put`` and ``get`` of a pool; ``"htd"`` is
        ``[kv_heads, tokens, head_dim]``.
    mask_dtype: ``"bool"`` (True = attend) or a float dtype (0 = attend, -inf = hidden; a row that
        sees nothing is finite, minus the largest power of two).

    Raises: ValueError, DTypeError.
    """

    padding: int = 1
    key_layout: Layout = "htd"
    value_layout: Layout = "htd"
    mask_dtype: str = "bool"

    def __post_init__(self) -> None:
        # The dataclass is frozen, for everyone but its constructor.
        object.__setattr__(self, "padding", as_index(self.padding, "padding"))
        if self.padding < 1:
            raise ValueError(f"padding must be >= 1 token; got {self.padding}.")
        for layout in (self.key_layout, self.value_layout):
            if layout not in get_args(Layout):
                raise ValueError(f"a layout is one of {get_args(Layout)}; got {layout!r}.")
        if self.mask_dtype not in _MASK_DTYPES:
            raise DTypeError(f"mask_dtype is one of {_MASK_DTYPES}; got {self.mask_dtype!r}.")
