"""Small real models, written once over the array API, for testing the caches end to end.

The same weights give the same tokens on every backend, with every cache and with none.

``llama``      a decoder: GGUF files, tokenizer, generation, continuous batching, chat; needs
               ``pip install 'kvcache[demo]'``
``hybrid``     a decoder with recurrent layers, from transformers checkpoints; needs a backend and
               no more
``whisper``    an encoder-decoder, from speech to text; needs ``pip install 'kvcache[audio]'``
``dit``        a small diffusion transformer and toy data for it; needs a backend and no more
``chat``       conversations with a decoder, through a prefix cache
``server``     continuous batching with a decoder
``template``   chat templates, in a process of their own
``errors``     errors of model files and recordings

Each package lists its modules. Import from the modules: the packages re-export nothing, so that
one model does not need the libraries of another.
"""
