"""A cache for all attention modules of a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from types import TracebackType
from typing import Self, SupportsIndex, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from kvcache.adapters.jax import Full, Window, init, select, trim
from kvcache.backends.arrays import NativeArray
from kvcache.errors import KVCacheError, NotSupportedError
from kvcache.functional import LayerState, RingState

from .attention import LAYOUT, CachedAttention

Path: TypeAlias = tuple[Hashable, ...]
"""Names of the attributes that lead from a model to a module."""


def attach(
    model: nnx.Module,
    batch: SupportsIndex,
    max_len: SupportsIndex,
    *,
    window: SupportsIndex | Callable[[Path], SupportsIndex | None] | None = None,
    dtype: str | None = None,
    padding: Sequence[SupportsIndex] | NativeArray | None = None,
    sharding: jax.sharding.NamedSharding | None = None,
    only: Callable[[Path], bool] | None = None,
) -> Attached:
    """Give each ``nnx.MultiHeadAttention`` of a model a cache, until :meth:`Attached.detach`.

    batch, max_len: rows, and the most tokens of each. More are not written.
    window: latest tokens that a query sees, itself included, of all modules or by the path of each;
        a module with a window below `max_len` holds no more tokens than that.
    dtype: of keys and values; by default that in which a module computes them.
    padding: tokens that each row lacks on its left: a list, or an int32 array ``[batch]``.
    sharding: of keys and values ``[batch, kv_heads, tokens, head_dim]``.
    only: which modules, by their path; all by default. Leave out cross-attention.

    Modules with a cache are not in flax's own decode mode.

    Raises: NotSupportedError for a model without such modules, or with stacked weights;
        KVCacheError for modules with a cache; as :func:`kvcache.adapters.jax.init`. Nothing has
        changed then.
    """
    modules = [(path, module) for path, module in _modules(model) if only is None or only(path)]
    if not modules:
        raise NotSupportedError(
            f"a cache needs nnx.MultiHeadAttention modules; {type(model).__name__} has none"
            f"{' that only= takes' if only else ''}."
        )
    for path, module in modules:
        _check(path, module)
    caches = []
    for path, module in modules:
        size = window(path) if callable(window) else window
        states: NativeArray = init(
            [Full() if size is None else Window(size)],
            batch,
            max_len,
            kv_heads=module.num_kv_heads,
            head_dim=module.head_dim,
            dtype=dtype or jnp.dtype(module.dtype or module.param_dtype).name,
            layout=LAYOUT,
            sharding=sharding,
            padding=padding,
        )
        caches.append(CachedAttention(module.attention_fn, states[0], module.decode))
    for (_, module), cache in zip(modules, caches, strict=True):
        module.attention_fn = nnx.data(cache)
        module.decode = False
    return Attached(model)


class Attached:
    """The caches in the modules of a model. A context manager, which detaches them at its end.

    model: as :func:`attach` changed it; inside of ``nnx.jit``, or after ``nnx.merge``, that model.

    Raises: KVCacheError for a model without caches.
    """

    def __init__(self, model: nnx.Module) -> None:
        self._model = model
        if not any(True for _ in self._caches()):
            raise KVCacheError("this model has no caches. Call attach first.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def _caches(self) -> Iterator[tuple[Path, nnx.MultiHeadAttention, CachedAttention]]:
        for path, module in _modules(self._model):
            if isinstance(module.attention_fn, CachedAttention):
                yield path, module, module.attention_fn

    @property
    def states(self) -> dict[Path, LayerState | RingState]:
        """The state of each module, by its path. Assign such a dict to go on from it."""
        return {path: cache.state.get_value() for path, _, cache in self._caches()}

    @states.setter
    def states(self, states: dict[Path, LayerState | RingState]) -> None:
        caches = {path: cache for path, _, cache in self._caches()}
        if caches.keys() != states.keys():
            raise ValueError(
                f"states are of the modules with a cache, {sorted(map(str, caches))}; got "
                f"{sorted(map(str, states))}."
            )
        for path, cache in caches.items():
            cache.state.set_value(states[path])

    @property
    def offset(self) -> NativeArray:
        """Tokens seen, int32 []: the position of the next one, for models that ask for it."""
        return next(iter(self.states.values())).offset

    def select(self, rows: NativeArray) -> None:
        """Reorder, repeat and drop rows of the batch; see :func:`kvcache.functional.select`."""
        self.states = {path: select(state, rows) for path, state in self.states.items()}

    def trim(self, tokens: int | NativeArray) -> None:
        """Take the last `tokens` tokens back. Raises: TrimError if a module has a window."""
        self.states = {path: trim(state, tokens) for path, state in self.states.items()}

    def detach(self) -> None:
        """Give the modules what they attended with before; their tokens are given up."""
        for _, module, cache in list(self._caches()):
            module.attention_fn = nnx.static(cache.attend)
            module.decode = cache.decode


def _modules(model: nnx.Module) -> Iterator[tuple[Path, nnx.MultiHeadAttention]]:
    """Yield each attention module of a model once, shared ones too, with its path."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.MultiHeadAttention):
            yield path, module


def _check(path: Path, module: nnx.MultiHeadAttention) -> None:
    """Raise unless a module can be given a cache."""
    name = ".".join(map(str, path)) or "the model"
    if isinstance(module.attention_fn, CachedAttention):
        raise KVCacheError(f"{name} has a cache. Call detach before another attach.")
    if module.query.kernel.ndim != 3:
        raise NotSupportedError(
            f"a module has its own weights, [features, heads, head_dim]; those of {name} are "
            f"{list(module.query.kernel.shape)}: layers stacked for nnx.scan. Use the states of "
            "kvcache.adapters.jax."
        )
