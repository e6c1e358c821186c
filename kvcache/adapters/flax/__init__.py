"""A cache inside the ``nnx.MultiHeadAttention`` modules of any flax model.

::

    with attach(model, batch=2, max_len=1024) as caches:
        logits = model(prompt)                      # [2, tokens]: prefill, in chunks of any size
        logits = model(logits[:, -1:].argmax(-1))   # and on, also inside of nnx.jit

It takes the place of the function that a module attends with, which is all that a module lets be
exchanged: no line of a model changes, and its own ``decode=True`` stays off.

``attach``        puts a cache into the modules of a model, and takes it out again
``attention``     the cache in the place of a module's attention function
"""

from .attach import Attached, attach
from .attention import CachedAttention, KVState

__all__ = ["Attached", "CachedAttention", "KVState", "attach"]
