"""Targets: caches of kvcache and of other libraries, with models small enough to ask often.

``nets``          tiny reference models, as targets run them
``reference``     caches of kvcache under them
``transformers``  caches of transformers and of its adapter, under ``transformers_models``
``mlx_lm``        prompt caches of mlx-lm and of its adapter, under ``mlx_models``
``kept``          reuse where a library leaves it to its users
``endpoint``      servers that complete prompts and return logprobs

Each is imported by name, because each needs a library of its own.
"""
