"""Language models, loaded for the commands with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

import kvcache
from kvcache.backends import Backend
from kvcache.reference._progress import Progress

from .console import notes, progress_bar

if TYPE_CHECKING:
    from kvcache.reference.decoder import Decoder
    from kvcache.reference.tokenizer import Tokenizer

ModelPath = Annotated[
    Path | None,
    typer.Option(
        help="A GGUF file of llama architecture, or a directory with a checkpoint of Qwen3-Next "
        "as transformers writes it; default: SmolLM2-135M-Instruct."
    ),
]


class ModelFile(NamedTuple):
    """A model that was found, with its weights still in the file."""

    tokenizer: Tokenizer
    load: Callable[[Backend, Progress], Decoder]


def load_model(path: Path | None, backend: Backend) -> tuple[Decoder, Tokenizer]:
    """Load the model in `path`, by default SmolLM2, onto `backend`. Needs the extra ``demo``."""
    [model], tokenizer = load_models(path, [backend])
    return model, tokenizer


def fingerprint_of(path: Path | None) -> str:
    """Return the fingerprint of the model that :func:`load_model` loads. Raises: ModelFileError."""
    from kvcache.reference.fingerprint import fingerprint
    from kvcache.reference.llama.gguf import default_model_path

    with notes.status("Computing the fingerprint of the model"):
        return fingerprint(path or default_model_path())


def load_models(path: Path | None, backends: Sequence[Backend]) -> tuple[list[Decoder], Tokenizer]:
    """Load the model in `path` onto each of `backends`; a repeated one gets the same model.

    Raises: BackendNotAvailableError without the extra ``demo``; ModelFileError,
        UnsupportedModelError.
    """
    with notes.status("Opening the model"):
        try:
            file = (
                _open_checkpoint(path) if path is not None and path.is_dir() else _open_gguf(path)
            )
        except ImportError as missing:
            raise kvcache.BackendNotAvailableError(
                f"a model needs {missing.name}. Install it: pip install 'kvcache[demo]'"
            ) from missing
    models = {backend: _load_weights(file, backend) for backend in dict.fromkeys(backends)}
    return [models[backend] for backend in backends], file.tokenizer


def _open_gguf(path: Path | None) -> ModelFile:
    from kvcache.reference.llama.gguf import default_model_path, open_gguf
    from kvcache.reference.llama.model import Llama
    from kvcache.reference.llama.tokenizer import GGUFTokenizer

    file = open_gguf(path or default_model_path())
    return ModelFile(GGUFTokenizer.from_gguf(file), partial(Llama.from_gguf, file))


def _open_checkpoint(path: Path) -> ModelFile:
    from kvcache.reference.hybrid.checkpoint import Checkpoint
    from kvcache.reference.hybrid.model import Hybrid
    from kvcache.reference.hybrid.tokenizer import read_tokenizer

    def load(backend: Backend, progress: Progress) -> Hybrid:
        # Opened for each backend: a checkpoint forgets the tensors that were taken.
        return Hybrid.from_checkpoint(Checkpoint(path), backend, progress)

    return ModelFile(read_tokenizer(Checkpoint(path)), load)


def _load_weights(file: ModelFile, backend: Backend) -> Decoder:
    """Load the weights of a model onto `backend`, behind a progress bar."""
    with progress_bar() as bar:
        task = bar.add_task(f"Loading weights onto {backend.spec}", total=None)
        return file.load(backend, lambda done, total: bar.update(task, completed=done, total=total))
