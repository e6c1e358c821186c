"""Language models, loaded for the commands with a progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import kvcache
from kvcache.backends import Backend

from .console import notes, progress_bar

if TYPE_CHECKING:
    from kvcache.reference.llama.gguf import GGUFFile
    from kvcache.reference.llama.model import Llama
    from kvcache.reference.llama.tokenizer import Tokenizer


def load_model(path: Path | None, backend: Backend) -> tuple[Llama, Tokenizer]:
    """Load the model in `path`, by default SmolLM2, onto `backend`. Needs the extra ``demo``."""
    [model], tokenizer = load_models(path, [backend])
    return model, tokenizer


def load_models(path: Path | None, backends: Sequence[Backend]) -> tuple[list[Llama], Tokenizer]:
    """Load the model in `path` onto each of `backends`; a repeated one gets the same model.

    Raises: BackendNotAvailableError without the extra ``demo``; ModelFileError,
        UnsupportedModelError.
    """
    try:
        from kvcache.reference.llama.gguf import default_model_path, open_gguf
        from kvcache.reference.llama.tokenizer import Tokenizer
    except ImportError as missing:
        raise kvcache.BackendNotAvailableError(
            f"a model needs {missing.name}. Install it: pip install 'kvcache[demo]'"
        ) from missing
    with notes.status("Opening the model"):
        file = open_gguf(path or default_model_path())
        tokenizer = Tokenizer.from_gguf(file)
    models = {backend: _load_weights(file, backend) for backend in dict.fromkeys(backends)}
    return [models[backend] for backend in backends], tokenizer


def _load_weights(file: GGUFFile, backend: Backend) -> Llama:
    """Load the model in `file` onto `backend`, behind a progress bar."""
    from kvcache.reference.llama.model import Llama

    with progress_bar() as bar:
        task = bar.add_task(f"Loading weights onto {backend.spec}", total=None)
        return Llama.from_gguf(
            file, backend, lambda done, total: bar.update(task, completed=done, total=total)
        )
