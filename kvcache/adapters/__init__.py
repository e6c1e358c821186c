"""Adapters: caches inside the models of other libraries, and stores under engines.

No line is changed there.

``diffusers``     recipes of :mod:`kvcache.diffusion` in the transformers of Hugging Face diffusers
``flax``          per-layer states in the attention modules of flax
``jax``           states of all layers for plain JAX programs
``mlx_lm``        prompt caches and prefix reuse for the generators and the server of mlx-lm
``transformers``  caches and prefix reuse for ``generate`` of Hugging Face transformers
``lmcache``       a store as an L2 adapter of LMCache
``sglang``        a store as the storage of SGLang's HiCache
``vllm``          a store as a tier of vLLM's offloading

Each of these is named after the library that it adapts, and imports it; nothing else does.
"""
