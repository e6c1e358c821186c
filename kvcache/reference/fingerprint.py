"""Fingerprints of models, so that what was computed with one is never taken for another's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kvcache.reference.errors import ModelFileError

__all__ = ["fingerprint"]


def fingerprint(path: str | Path) -> str:
    """Return the SHA-256 of a model, in hexadecimal: of its weights and its configuration.

    path: a GGUF file, or the directory of a checkpoint, of which ``config.json`` and all
        safetensors count.

    Raises: ModelFileError for a file that cannot be read, or a directory without any of these.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = [*path.glob("config.json"), *sorted(path.glob("*.safetensors"))]
    if not files:
        raise ModelFileError(f"a checkpoint has config.json and safetensors; {path} has none.")
    whole = hashlib.sha256()
    for name in files:
        try:
            with name.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ModelFileError(f"{name} cannot be read: {error.strerror}.") from error
    return whole.hexdigest()
