"""The caches of all layers of a model, as one cache of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self, TypeAlias, TypeVar

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DummyLayer, LinearAttentionCacheLayerMixin

from kvcache.errors import NotSupportedError
from kvcache.layers.base import LayerCache
from kvcache.layers.growing import KVCache
from kvcache.layers.recurrent import StateCache
from kvcache.layers.stack import LayerCaches

from .fixed import FixedLayer
from .layers import AttentionLayer, HybridLayer, StateLayer, check_single
from .plan import LayerPlan, layer_plans

C = TypeVar("C", bound=LayerCache)
Layer: TypeAlias = CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer


class ModelCache(Cache):
    """A cache of transformers over `caches`, the per-layer caches of kvcache.

    config: of the model.
    caches: as :func:`layer_caches` makes them, empty or with tokens. They stay the caller's to read
        between two passes, through :attr:`caches`.
    slots: to run in compiled programs: the most tokens to hold, in buffers of this size.

    Raises: NotSupportedError for a layer of a type that kvcache has no cache for; ValueError for
        another number of caches than the layers need.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        caches: LayerCaches[LayerCache],
        *,
        slots: int | None = None,
    ) -> None:
        self.config, self._caches, self._slots, self._mark = config, caches, slots, 0
        super().__init__(layers=_layers(config, caches, slots))
        decoder = config.get_text_config(decoder=True)
        heads = getattr(decoder, "num_attention_heads", None)
        grouped = getattr(decoder, "num_key_value_heads", heads) != heads
        full = all(type(own) is AttentionLayer and not own.is_sliding for own in self.layers)
        self._decoder, self._grouped = decoder, grouped and full

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
            if isinstance(layer, StateLayer | FixedLayer):
                layer.settle()

    @property
    def is_compileable(self) -> bool:
        """Whether the library makes masks for steps of one token, as it does for programs.

        On a CPU it compiles nothing by itself. But with a mask it multiplies all query heads of a
        key head together there, where torch would take them one after the other: at 8,192 tokens,
        a step with four of them takes 0.8 of the time. So full attention of grouped heads asks for
        one; with layers of several kinds there would be several masks, which models pass on in a
        form of their own.
        """
        if super().is_compileable:
            return True
        # Asked anew, because a model may choose another attention, and be moved, at any time.
        if not self._grouped or self._decoder._attn_implementation != "sdpa":
            return False
        backend = self._caches[0].backend
        return backend is not None and backend.device == "cpu"

    @property
    def _own_layers(self) -> list[AttentionLayer | StateLayer]:
        return [layer for layer in self.layers if isinstance(layer, AttentionLayer | StateLayer)]

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        clone = type(self)(self.config, self.caches.copy(), slots=self._slots)
        if self._recording:
            clone.activate_past_recording()
        return clone

    # Recurrent layers.

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the last inputs of a convolution, to be written to; None before the first token.

        Raises: ValueError for a layer without a state.
        """
        check_single(state_idx)
        return self._state_layer(layer_idx).handed(0)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the recurrent state, as :meth:`get_conv_state`."""
        check_single(state_idx)
        return self._state_layer(layer_idx).handed(1)

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Return whether a layer, by default the last recurrent one, has a state.

        Raises: ValueError for a layer without states, or a model without recurrent layers.
        """
        check_single(state_idx)
        if layer_idx is None:
            recurrent = [i for i, layer in enumerate(self.layers) if isinstance(layer, StateLayer)]
            layer_idx = recurrent[-1] if recurrent else 0
        return self._state_layer(layer_idx).is_filled

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
        return any(layer.record_past for layer in self._own_layers)

    def activate_past_recording(self) -> None:
        """Keep what :meth:`crop` needs to go back, until then."""
        if self._slots is not None:
            return  # every token is held anyway
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
        for layer in self._own_layers:
            layer.record_past = past

    # Rows.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`: their numbers, or a mask of all rows."""
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._select(rows.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = max((layer.rows for layer in self._own_layers), default=0)
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


def _layers(
    config: PreTrainedConfig, caches: Sequence[LayerCache], slots: int | None
) -> list[Layer]:
    """Return the layers of a model around `caches`."""
    plans, remaining = layer_plans(config), iter(caches)
    needed = sum(plan.caches for plan in plans)
    if needed != len(caches):
        raise ValueError(
            f"this model needs {needed} caches for its {len(plans)} layers; got {len(caches)}. "
            "Make them by layer_caches."
        )
    return [_layer(plan, remaining, slots) for plan in plans]


def _layer(plan: LayerPlan, caches: Iterator[LayerCache], slots: int | None) -> Layer:
    """Return a layer around the next of `caches`, as many as it needs."""
    kv = _of_kind(next(caches), KVCache) if plan.keys else None
    states = _of_kind(next(caches), StateCache) if plan.state else None
    if states is not None:
        if slots is not None:
            raise NotSupportedError(
                "a cache for compiled programs is of attention layers; this model has recurrent "
                "ones. Use make_cache(model) without compileable."
            )
        return StateLayer(states, plan.conv_only) if kv is None else HybridLayer(kv, states)
    if kv is not None:
        return AttentionLayer(kv) if slots is None else FixedLayer(kv, slots, bool(plan.window))
    return DummyLayer()


def _of_kind(cache: LayerCache, kind: type[C]) -> C:
    if isinstance(cache, kind):
        return cache
    raise ValueError(
        f"this layer needs a {kind.__name__}; got {cache!r}. Make caches by layer_caches."
    )
