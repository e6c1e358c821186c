"""kvcache under the models of Hugging Face transformers.

::

    cache = make_cache(model)
    ids = model.generate(**inputs, cache=cache)      # past_key_values=cache before 5.24
    cache.caches.save("chat.safetensors")            # the kvcache.LayerCaches that hold the tokens

    prefix = prefix_cache(model, budget=1 << 30)
    with prefix.session(**inputs) as session:        # begins with what earlier prompts left
        ids = model.generate(**inputs, cache=session.cache)

A model runs as it is; what its layers store is in the per-layer caches of kvcache.

``make``      caches that fit a model, by its configuration
``plan``      the caches that its layers need
``cache``     :class:`ModelCache`, a real ``transformers.Cache``
``layers``    one layer of it: attention, a recurrent state, or both
``fixed``     a layer of a fixed size, for compiled programs
``prefix``    reuse of results of earlier prompts around ``generate``
``prompts``   prompts of a batch, and the cache that knows the ids of what it holds
``prefill``   a prompt in pieces that end where recurrent layers are to leave a state
"""

from kvcache.errors import BackendNotAvailableError

try:
    from .cache import EncoderDecoderModelCache, ModelCache
    from .make import layer_caches, make_cache, make_encoder_decoder_cache
    from .prefix import ModelPrefixCache, ModelSession, prefix_cache
    from .prompts import PromptCache
except ImportError as error:
    raise BackendNotAvailableError(
        f"this needs transformers 5.24 and torch, of which one is missing or too old ({error}). "
        "Try: pip install 'kvcache[transformers]'"
    ) from error

__all__ = [
    "EncoderDecoderModelCache",
    "ModelCache",
    "ModelPrefixCache",
    "ModelSession",
    "PromptCache",
    "layer_caches",
    "make_cache",
    "make_encoder_decoder_cache",
    "prefix_cache",
]
