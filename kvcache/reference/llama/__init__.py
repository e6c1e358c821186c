"""A decoder of llama architecture, in float32 over the array API.

``model``      the decoder, over per-layer caches
``blocks``     its computation, as pure functions
``weights``    from the tensors of a file to the weights of the decoder
``gguf``       GGUF model files: configuration, metadata, tensors
``tokenizer``  byte-level BPE from the vocabulary in a GGUF file
``pooled``     the decoder over a multi-sequence cache, one program per pass
"""
