"""Recipes inside the transformers of Hugging Face diffusers.

::

    pipeline = FluxPipeline.from_pretrained(...)
    recipe = Recipe(Threshold(0.1), limits=Limits(warmup=4))
    with attach(pipeline.transformer, recipe) as caching:
        image = pipeline(prompt).images[0]

It goes by the hooks that diffusers has for its own caches, so that pipelines tell it, too, which
pass they make (``transformer.cache_context("cond")``) and when they are done.

``attach``        puts a recipe into a transformer, and takes it out again
``scopes``        the part of the transformer that may be skipped: a range of blocks, or all of it
``call``          one call of a transformer, while it runs
``inputs``        the arguments of a call that tell its pass and its run
``passes``        the passes of a pipeline that sets no context
``counter``       numbers of steps, and where a run begins
``blocks``        the blocks of a transformer, and their inputs and outputs
``hooks``         the hooks of diffusers
"""

from .attach import STREAMS, Attached, Measure, attach

__all__ = ["STREAMS", "Attached", "Measure", "attach"]
