"""Whisper, an encoder-decoder: recordings in, text out."""
