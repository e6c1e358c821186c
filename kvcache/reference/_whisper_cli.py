"""The command line of the Whisper reference: text to standard output, the rest to the other."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
except ImportError as missing:
    raise SystemExit(
        f"The command line needs {missing.name}. Install it: pip install 'kvcache[audio]'"
    ) from missing

import kvcache
from kvcache.backends.base import HostArray

from . import whisper
from ._mel import RATE

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
notes = Console(stderr=True)


def main() -> None:
    """Run it; what goes wrong for a foreseen reason becomes one line and exit status 1."""
    try:
        app(prog_name="python -m kvcache.reference.whisper")
    except (kvcache.KVCacheError, ValueError, OSError, ImportError) as error:
        notes.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)


@app.command()
def transcribe(
    recordings: Annotated[
        list[Path], typer.Argument(help="Sound files: WAV, FLAC, Ogg, MP3; any rate, any length.")
    ],
    backend: Annotated[
        str, typer.Option("--backend", "-b", help="numpy, torch, torch:cuda:1, jax, mlx, auto, ...")
    ] = "numpy",
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
    """Write down what English recordings say, with Whisper through kvcache.

    Each recording becomes one line of text; of several, behind the file's name.
    They are decoded together, as the sequences of one cache: its encoder part is
    filled once per 30 seconds of sound, and only read afterwards.

    Example: [bold]python -m kvcache.reference.whisper --backend jax a.wav b.wav[/]
    """
    where = kvcache.get_backend(backend)
    with notes.status("Reading the recordings") as status:
        sounds = _read(recordings)
        status.update("Loading the model")
        network, vocabulary = whisper.load_whisper(model or whisper.default_model_folder(), where)
        status.update("Listening")
        started = time.perf_counter()
        texts = whisper.transcribe(
            network,
            vocabulary,
            sounds,
            together=together,
            progress=lambda done, total: status.update(f"{done} of {total} windows done"),
        )
    for path, text in zip(recordings, texts, strict=True):
        typer.echo(f"{path.name}: {text}" if len(recordings) > 1 else text)
    notes.print(_summary(network, sounds, time.perf_counter() - started), highlight=False)


def _read(paths: Sequence[Path]) -> list[HostArray]:
    from ._audio import read_recording

    return [read_recording(path) for path in paths]


def _summary(model: whisper.Whisper, sounds: Sequence[HostArray], seconds: float) -> str:
    length = sum(sound.size for sound in sounds) / RATE
    return (
        f"encoder ran {_times(model.encoder_runs, 'time')} for "
        f"{_times(len(sounds), 'recording')}, {_times(model.decoder_passes, 'decoder pass', 'es')}"
        f"\n{length:.1f} s of sound in {seconds:.1f} s on {model.backend.spec}"
    )


def _times(count: int, what: str, plural: str = "s") -> str:
    return f"{count} {what}{plural if count != 1 else ''}"
