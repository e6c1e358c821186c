"""A hybrid decoder in the shape of Qwen3-Next, in float32 over the array API.

Most layers are gated delta nets, which keep a state; every few layers one attends to all tokens.

``model``       the decoder, over the caches of its layers
``pooled``      the decoder over one cache of many sequences
``stages``      its computation between the caches, compiled
``blocks``      its computation, as pure functions
``delta``       the gated delta rule, token by token and many tokens at once
``weights``     from the tensors of a checkpoint to the weights of the decoder
``config``      sizes and constants, from ``config.json``
``checkpoint``  directories of safetensors files, as transformers writes them
``tokenizer``   the tokenizer of such a directory
``saving``      writing such a directory
``corpus``      questions and answers from Python's documentation
``train``       a command that trains a small model on these
"""
