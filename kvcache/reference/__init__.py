"""Small real models, written once over the array API, that show the caches at work.

They are the end-to-end oracle of the library: the same tokens from every backend, with
every cache and with none.

With the packages of ``pip install 'kvcache[demo]'``:

``gguf``       model files: configuration, tensors, vocabulary
``tokenizer``  text to token ids and back
``llama``      the decoder
``runner``     greedy generation and the caches for it

``whisper``    an encoder-decoder, from speech to text; it needs ``pip install 'kvcache[audio]'``

With nothing but a backend:

``dit``        a small diffusion transformer
``toy_shapes`` what it draws, and how well it does
"""
