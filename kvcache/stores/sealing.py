"""Encryption of pages: nobody without the key reads one, changes one, or passes one off."""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvcache.errors import PageError, StoreError

from .outcomes import KEY_NBYTES, Buffer, Key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.modes import GCM

_NONCE_NBYTES, _TAG_NBYTES = 12, 16
_SECRET_NBYTES = 32
_PIECE_NBYTES = 1 << 20


class Seal:
    """Authenticated encryption with AES-256-GCM, with the secret of a tenant.

    secret: 32 random bytes, known to all processes that share the pages of the tenant.

    Every page has a key of its own, HMAC-SHA256 of the secret and the key of the page, and a random
    nonce, so that no number of pages wears a secret out. The key of the page, its label and its
    header are authenticated: a page under another name, or at another position, is refused.

    Raises: TypeError, ValueError for another secret; StoreError if ``cryptography`` is missing.
    """

    def __init__(self, secret: bytes) -> None:
        if not isinstance(secret, bytes):
            raise TypeError(f"a secret is bytes; got {type(secret).__name__}.")
        if len(secret) != _SECRET_NBYTES:
            raise ValueError(
                f"a secret has {_SECRET_NBYTES} bytes; got {len(secret)}. Use os.urandom(32)."
            )
        self._secret = secret
        self._cipher(bytes(KEY_NBYTES), bytes(_NONCE_NBYTES), None)  # is the package there?

    def __repr__(self) -> str:
        return "<Seal>"  # never the secret

    def encrypt(self, buffers: Sequence[Buffer], key: Key, bound: bytes) -> list[Buffer]:
        """Return nonce, ciphertext and tag; `bound` is authenticated and not contained."""
        nonce = os.urandom(_NONCE_NBYTES)
        encryptor = self._cipher(key, nonce, None).encryptor()
        encryptor.authenticate_additional_data(key + bound)
        sealed: list[Buffer] = [nonce]
        for buffer in buffers:
            flat = memoryview(buffer)
            sealed += [
                encryptor.update(flat[start : start + _PIECE_NBYTES])
                for start in range(0, flat.nbytes, _PIECE_NBYTES)
            ]
        encryptor.finalize()
        return [*sealed, encryptor.tag]

    def decrypt(self, sealed: memoryview, key: Key, bound: bytes) -> memoryview:
        """Return what was encrypted. Raise PageError unless all of it is authentic."""
        from cryptography.exceptions import InvalidTag

        nbytes = sealed.nbytes - _NONCE_NBYTES - _TAG_NBYTES
        if nbytes < 0:
            raise PageError(f"a sealed page has a nonce and a tag; got {sealed.nbytes} bytes")
        nonce, tag = bytes(sealed[:_NONCE_NBYTES]), bytes(sealed[-_TAG_NBYTES:])
        decryptor = self._cipher(key, nonce, tag).decryptor()
        decryptor.authenticate_additional_data(key + bound)
        plain = np.empty(nbytes + _TAG_NBYTES, np.uint8)  # update_into asks for a block more
        for start in range(0, nbytes, _PIECE_NBYTES):
            stop = min(start + _PIECE_NBYTES, nbytes)
            piece = sealed[_NONCE_NBYTES + start : _NONCE_NBYTES + stop]
            decryptor.update_into(piece, plain.data[start : stop + _TAG_NBYTES])
        try:
            decryptor.finalize()
        except InvalidTag:
            raise PageError(
                f"the page {key.hex()} was sealed with another secret, or changed since"
            ) from None
        return plain[:nbytes].data.toreadonly()

    def _cipher(self, key: Key, nonce: bytes, tag: bytes | None) -> Cipher[GCM]:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError as error:
            raise StoreError(
                "pages are sealed by the package cryptography, which is not installed. "
                "pip install 'kvcache[seal]'"
            ) from error
        own = hmac.digest(self._secret, b"kvcache page" + key, "sha256")
        return Cipher(algorithms.AES(own), modes.GCM(nonce, tag))
