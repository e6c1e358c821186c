"""Output and options shared by the commands. Importing it needs typer and rich."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError as missing:
    raise SystemExit(
        f"The command line needs {missing.name}. Install it: pip install 'kvcache[cli]'"
    ) from missing

notes = Console(stderr=True)
"""Standard error: everything but results."""

BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        "-b",
        help="numpy, torch, torch:cuda:1, jax, mlx, array_api:cupy, auto, ...",
        show_default=True,
    ),
]


def progress_bar() -> Progress:
    """Make a progress bar on standard error, invisible unless it is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal)


def check_folder(option: str, path: Path | None) -> None:
    """Refuse a file to be written at the end whose folder does not exist. None: no file."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise typer.BadParameter(f"{option} takes a file in a folder that exists; got {path}.")
