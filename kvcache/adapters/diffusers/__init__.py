"""Recipes inside the transformers of Hugging Face diffusers.

::

    pipeline = FluxPipeline.from_pretrained(...)
    recipe = Recipe(Threshold(0.1), limits=Limits(warmup=4))
    with attach(pipeline.transformer, recipe) as caching:
        image = pipeline(prompt).images[0]

It goes by the hooks that diffusers has for its own caches, so that pipelines tell it, too, which
pass they make (``transformer.cache_context("cond")``) and when they are done.
"""

from .attach import STREAMS, Attached, Measure, attach

__all__ = ["STREAMS", "Attached", "Measure", "attach"]
