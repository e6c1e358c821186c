"""Targets: caches of kvcache and of other libraries, with models small enough to ask often.

``nets``          tiny reference models, as targets run them
``reference``     caches of kvcache under them
``transformers``  caches of transformers and of its adapter
``mlx_lm``        prompt caches of mlx-lm and of its adapter
``endpoint``      servers that complete prompts and return logprobs

Each is imported by name, because each needs a library of its own.
"""
