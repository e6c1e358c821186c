"""Small real models, written once over the array API, that show the caches at work.

They are the end-to-end oracle of the library: the same tokens from every backend, with
every cache and with none. They need the packages of ``pip install 'kvcache[demo]'``.

``gguf``       model files: configuration, tensors, vocabulary
``tokenizer``  text to token ids and back
``llama``      the decoder
``whisper``    an encoder-decoder, from speech to text; it needs ``pip install 'kvcache[audio]'``
``runner``     greedy generation and the caches for it
"""

from importlib.util import find_spec

for _name in ("gguf", "jinja2", "tokenizers"):
    if find_spec(_name) is None:
        raise ImportError(
            f"kvcache.reference needs {_name}; it is not installed. pip install 'kvcache[demo]'",
            name=_name,
        )
