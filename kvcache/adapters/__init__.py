"""Adapters: caches of kvcache inside the models of other libraries, with no line changed there.

``diffusers``     recipes of :mod:`kvcache.diffusion` in the transformers of Hugging Face diffusers
``flax``          per-layer states in the attention modules of flax
``jax``           states of all layers for plain JAX programs
``mlx_lm``        prompt caches and prefix reuse for the generators and the server of mlx-lm
``transformers``  caches and prefix reuse for ``generate`` of Hugging Face transformers

Each package here is named after the library that it adapts, and imports it; nothing else does.
"""
