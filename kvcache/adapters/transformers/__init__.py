"""kvcache under the models of Hugging Face transformers.

::

    cache = make_cache(model)
    ids = model.generate(**inputs, cache=cache)      # past_key_values=cache before 5.24
    cache.caches.save("chat.safetensors")            # the kvcache.LayerCaches that hold the tokens

A model runs as it is; what its layers store is in the per-layer caches of kvcache.

``make``      caches that fit a model, by its configuration
``cache``     :class:`ModelCache`, a real ``transformers.Cache``
``layers``    one layer of it: attention, a recurrent state, or both
"""

from .cache import EncoderDecoderModelCache, ModelCache
from .make import layer_caches, make_cache, make_encoder_decoder_cache

__all__ = [
    "EncoderDecoderModelCache",
    "ModelCache",
    "layer_caches",
    "make_cache",
    "make_encoder_decoder_cache",
]
