"""Caches that fit a model of transformers."""

from __future__ import annotations

from functools import partial

from kvcache.errors import NotSupportedError
from kvcache.layers.base import LayerCache
from kvcache.layers.growing import KVCache
from kvcache.layers.recurrent import StateCache
from kvcache.layers.rotating import RotatingKVCache
from kvcache.layers.stack import LayerCaches

from .cache import EncoderDecoderModelCache, ModelCache
from .plan import LayerPlan, ModelOrConfig, backend_for, config_of, layer_plans


def make_cache(
    model_or_config: ModelOrConfig, *, capacity: int = 0, compileable: bool = False
) -> ModelCache:
    """Return an empty cache for ``model.generate(..., cache=cache)`` and ``model(...)``.

    model_or_config: a decoder of any kind: full attention, windows, chunks, recurrent layers, or
        layers that share keys and values. With a configuration, caches take the device of the first
        arrays that come.
    capacity: tokens to make room for at the first update already.
    compileable: whether models that go through ``torch.compile`` can be called with it. It holds
        `capacity` tokens at most then, in windows, too.

    Raises: as :func:`layer_caches`; ValueError for a compileable cache without a capacity;
        NotSupportedError for one of recurrent layers.
    """
    config = config_of(model_or_config)
    if not compileable:
        return ModelCache(config, layer_caches(model_or_config, capacity=capacity))
    if capacity < 1:
        raise ValueError(
            f"a compileable cache has a fixed capacity, 1 or more; got capacity={capacity}."
        )
    backend = backend_for(model_or_config)
    make = partial(KVCache, backend, capacity, capacity=capacity)
    layers = layer_caches(model_or_config)
    caches = (make() if isinstance(cache, KVCache) else cache for cache in layers)
    return ModelCache(config, LayerCaches(caches), slots=capacity)


def layer_caches(model_or_config: ModelOrConfig, *, capacity: int = 0) -> LayerCaches[LayerCache]:
    """Return the empty caches that the layers of a model need, in their order.

    One for each layer, two for one that has keys and a state, its :class:`StateCache` second; none
    for a layer that reads those of another.

    Raises: NotSupportedError for a layer that kvcache has no cache for; ValueError, TypeError for
        a bad capacity.
    """
    backend, plans = backend_for(model_or_config), layer_plans(config_of(model_or_config))
    return LayerCaches(cache for plan in plans for cache in _caches(plan, backend, capacity))


def _caches(plan: LayerPlan, backend: str | None, capacity: int) -> list[LayerCache]:
    caches: list[LayerCache] = []
    if plan.window is not None:
        caches.append(RotatingKVCache(plan.window, backend=backend, capacity=capacity))
    elif plan.keys:
        caches.append(KVCache(backend, capacity=capacity))
    return [*caches, StateCache(backend)] if plan.state else caches


def make_encoder_decoder_cache(
    model_or_config: ModelOrConfig, *, capacity: int = 0
) -> EncoderDecoderModelCache:
    """Return an empty cache for a model with an encoder and a decoder: T5, Bart, Whisper.

    It has as many layers as the decoder, whatever the depth of the encoder.

    capacity: tokens of the decoder to make room for at the first update already.

    Raises: as :func:`layer_caches`; NotSupportedError for a model without an encoder.
    """
    config = config_of(model_or_config)
    if not config.is_encoder_decoder:
        raise NotSupportedError(
            "make_encoder_decoder_cache is for models with an encoder and a decoder; got a "
            f"{type(config).__name__}. Use make_cache."
        )
    decoder = layer_caches(model_or_config, capacity=capacity)
    # Computed once and read by every token: no window, and no room for more.
    output: list[LayerCache] = [KVCache(backend_for(model_or_config)) for _ in decoder]
    return EncoderDecoderModelCache(
        ModelCache(config, decoder), ModelCache(config, LayerCaches(output))
    )
