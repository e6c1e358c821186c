"""What the commands share: where they talk to people. Needs typer and rich."""

from __future__ import annotations

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

BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        "-b",
        help="numpy, torch, torch:cuda:1, jax, mlx, array_api:cupy, auto, ...",
        show_default=True,
    ),
]


def progress() -> Progress:
    """A bar on standard error, where a person looks at it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal)
