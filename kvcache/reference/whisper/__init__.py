"""Whisper (Radford et al., 2022), an encoder-decoder in float32 over the array API.

``transcribe``    recordings to text: windows of 30 seconds, decoded together in one cache
``model``         both halves of the network; loading a model from a folder
``blocks``        its computation, as pure functions
``weights``       from the variables of a model file to the weights of the network
``ctranslate2``   model files of CTranslate2
``vocabulary``    the tokenizer, and the tokens that a text may consist of
``mel``           the log-mel spectrogram of a window
``audio``         sound files
"""
