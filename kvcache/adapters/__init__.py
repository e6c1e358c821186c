"""Adapters: caches of kvcache inside the models of other libraries, with no line changed there.

``diffusers``     recipes of :mod:`kvcache.diffusion` in the transformers of Hugging Face diffusers

Each package here is named after the library that it adapts, and imports it; nothing else does.
"""
