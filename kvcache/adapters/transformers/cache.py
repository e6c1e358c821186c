"""The caches of all layers of a model, as one cache of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self, TypeAlias, TypeVar

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DummyLayer

from kvcache.errors import NotSupportedError
from kvcache.layers.base import LayerCache
from kvcache.layers.growing import KVCache
from kvcache.layers.recurrent import StateCache
from kvcache.layers.stack import LayerCaches

from .layers import AttentionLayer, HybridLayer, StateLayer
from .plan import LayerPlan, layer_plans

C = TypeVar("C", bound=LayerCache)
Layer: TypeAlias = AttentionLayer | StateLayer | DummyLayer


class ModelCache(Cache):
    """A cache of transformers over `caches`, the per-layer caches of kvcache.

    config: of the model.
    caches: as :func:`layer_caches` makes them, empty or with tokens. They stay the caller's to read
        between two passes, through :attr:`caches`.

    Raises: NotSupportedError for a layer of a type that kvcache has no cache for; ValueError for
        another number of caches than the layers need.
    """

    def __init__(self, config: PreTrainedConfig, caches: LayerCaches[LayerCache]) -> None:
        self.config, self._caches, self._mark = config, caches, 0
        super().__init__(layers=_layers(config, caches))

    def __repr__(self) -> str:
        return f"<ModelCache of {self._caches!r}>"

    @property
    def caches(self) -> LayerCaches[LayerCache]:
        """The caches that hold the tokens, a layer with keys and a state having two.

        Ask anew after every pass: the state that a recurrent layer wrote in place is taken over
        here.
        """
        self.settle()
        return self._caches

    def settle(self) -> None:
        """Take over the states that recurrent layers wrote in place."""
        for layer in self.layers:
            if isinstance(layer, StateLayer):
                layer.settle()

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        clone = type(self)(self.config, self.caches.copy())
        if self._recording:
            clone.activate_past_recording()
        return clone

    # Recurrent layers.

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._state_layer(layer_idx).conv_states[state_idx]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._state_layer(layer_idx).recurrent_states[state_idx]

    def _state_layer(self, layer_idx: int) -> StateLayer:
        layer = self.layers[layer_idx]
        if isinstance(layer, StateLayer):
            return layer
        raise ValueError(f"layer {layer_idx} has no state; it is a {type(layer).__name__}.")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens seen, of a model without attention layers, too."""
        if any(isinstance(layer, CacheLayerMixin) for layer in self.layers):
            length: int = super().get_seq_length(layer_idx)
            return length
        return self.caches.offset

    # Going back.

    @property
    def _recording(self) -> bool:
        return any(getattr(layer, "record_past", False) for layer in self.layers)

    def activate_past_recording(self) -> None:
        """Keep what :meth:`crop` needs to go back, until then."""
        caches = self.caches
        caches.checkpoint()
        self._mark = caches.offset
        self._record(True)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens of all layers, or of none.

        Raises: ValueError for a positive number, as the library; TrimError where a layer cannot go
            back: a window that displaced tokens, without :meth:`activate_past_recording`, and a
            recurrent state.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                "crop takes minus the number of tokens to remove, 0 or less; got "
                f"{tokens_to_remove}."
            )
        caches = self.caches
        accepted = caches.offset - self._mark + tokens_to_remove
        if not self._recording or accepted < 0:
            caches.trim(-tokens_to_remove)
        else:
            caches.rollback(accepted)
        if self._recording:
            self._mark = caches.offset
            caches.checkpoint()

    def reset(self) -> None:
        """Forget all tokens."""
        self.caches.reset()
        self._record(False)

    def _record(self, past: bool) -> None:
        for layer in self.layers:
            if not isinstance(layer, DummyLayer):
                layer.record_past = past

    # Rows.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`: their numbers, or a mask of all rows."""
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._select(rows.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = max((cache.rows or 0 for cache in self._caches), default=0)
        self._select([row for row in range(rows) for _ in range(repeats)])

    def _select(self, rows: list[int]) -> None:
        self.caches.select(rows)

    # Refused.

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Raises: NotSupportedError."""
        _refuse_offloading()

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Raises: NotSupportedError."""
        _refuse_offloading()


class EncoderDecoderModelCache(EncoderDecoderCache):
    """The caches of a decoder, and of its attention to the output of an encoder."""

    def check_dynamic_cache(self, method: str) -> None:
        """Do nothing: both caches can do what the library trusts its own class only to do."""


def _refuse_offloading() -> None:
    raise NotSupportedError(
        "a cache of kvcache stays on the device of its model; got a request to offload it. Use "
        "caches.to_backend to move it, or the library's DynamicCache(offloading=True)."
    )


def _layers(config: PreTrainedConfig, caches: Sequence[LayerCache]) -> list[Layer]:
    """Return the layers of a model around `caches`."""
    plans, remaining = layer_plans(config), iter(caches)
    needed = sum(plan.caches for plan in plans)
    if needed != len(caches):
        raise ValueError(
            f"this model needs {needed} caches for its {len(plans)} layers; got {len(caches)}. "
            "Make them by layer_caches."
        )
    return [_layer(plan, remaining) for plan in plans]


def _layer(plan: LayerPlan, caches: Iterator[LayerCache]) -> Layer:
    """Return a layer around the next of `caches`, as many as it needs."""
    kv = states = None
    if plan.keys:
        kv = _of_kind(next(caches), KVCache)
    if plan.state:
        states = _of_kind(next(caches), StateCache)
    if kv is not None:
        return AttentionLayer(kv) if states is None else HybridLayer(kv, states)
    return DummyLayer() if states is None else StateLayer(states, plan.conv_only)


def _of_kind(cache: LayerCache, kind: type[C]) -> C:
    if isinstance(cache, kind):
        return cache
    raise ValueError(
        f"this layer needs a {kind.__name__}; got {cache!r}. Make caches by layer_caches."
    )
