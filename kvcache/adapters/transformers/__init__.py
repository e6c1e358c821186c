"""kvcache under the models of Hugging Face transformers.

::

    cache = make_cache(model)
    ids = model.generate(**inputs, cache=cache)      # past_key_values=cache before 5.24
    cache.caches.save("chat.safetensors")            # the kvcache.LayerCaches that hold the tokens

A model runs as it is; what its layers store is in the per-layer caches of kvcache.

``make``      caches that fit a model, by its configuration
``plan``      the caches that its layers need
``cache``     :class:`ModelCache`, a real ``transformers.Cache``
``layers``    one layer of it: attention, a recurrent state, or both
``fixed``     a layer of a fixed size, for compiled programs
"""

from kvcache.errors import BackendNotAvailableError

try:
    from .cache import EncoderDecoderModelCache, ModelCache
    from .make import layer_caches, make_cache, make_encoder_decoder_cache
except ImportError as error:
    raise BackendNotAvailableError(
        f"this needs transformers 5.24 and torch, of which one is missing or too old ({error}). "
        "Try: pip install 'kvcache[transformers]'"
    ) from error

__all__ = [
    "EncoderDecoderModelCache",
    "ModelCache",
    "layer_caches",
    "make_cache",
    "make_encoder_decoder_cache",
]
