"""Small real models, written once over the array API, for testing the caches end to end.

The same weights give the same tokens on every backend, with every cache and with none.

``llama``      a decoder, from GGUF files; needs ``pip install 'kvcache[demo]'``
``hybrid``     a decoder with recurrent layers, from transformers checkpoints; needs a backend, and
               for text ``pip install 'kvcache[demo]'``
``whisper``    an encoder-decoder, from speech to text; needs ``pip install 'kvcache[audio]'``
``dit``        a small diffusion transformer and toy data for it; needs a backend and no more
``decoder``    the parts of a decoder that the next four use
``generate``   greedy generation, a relay between backends
``chat``       conversations through a prefix cache
``server``     continuous batching
``tokenizer``  text to token ids and back, chat templates
``template``   chat templates, in a process of their own
``errors``     errors of model files and recordings

Each package lists its modules. Import from the modules: the packages re-export nothing, so that
one model does not need the libraries of another.
"""
