"""kvcache under mlx-lm: prompt caches for its models and generators.

::

    from mlx_lm import generate, load
    from kvcache.adapters.mlx_lm import make_prompt_cache

    model, tokenizer = load(...)
    cache = make_prompt_cache(model)
    generate(model, tokenizer, "...", prompt_cache=cache)

=================  ===========================================
:mod:`.making`     prompt caches for a model, and their caches
:mod:`.entries`    layers with keys and values
:mod:`.states`     recurrent layers and convolutions
:mod:`.lists`      layers with both
:mod:`.headers`    what files say of a layer
:mod:`.prefix`     prefix reuse around generators
:mod:`.sessions`   one request of it
:mod:`.server`     prefix reuse in the server
=================  ===========================================
"""

from .entries import AttentionEntry
from .lists import EntryList
from .making import caches_of, layer_caches, make_prompt_cache, prompt_cache
from .prefix import ModelPrefixCache, prefix_cache
from .sessions import PromptSession
from .states import RecurrentEntry

__all__ = [
    "AttentionEntry",
    "EntryList",
    "ModelPrefixCache",
    "PromptSession",
    "RecurrentEntry",
    "caches_of",
    "layer_caches",
    "make_prompt_cache",
    "prefix_cache",
    "prompt_cache",
]
