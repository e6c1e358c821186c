"""The command line: ``kvcache generate | chat | transcribe | backends | ...``.

Text that a model generates goes to standard output, everything else to standard error, so
that output can be piped. Frameworks are imported by the commands that need them.
"""

from __future__ import annotations

# First, because importing it says how to install typer and rich where they are missing.
from .console import notes

# isort: split

import sys
from typing import Annotated

import typer
from rich.markup import escape

import kvcache

from . import (
    backends,
    bench,
    chat,
    conformance,
    generate,
    inspect,
    plan,
    simulate,
    transcribe,
    verify,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="One key/value cache for every array framework: try it, check it, measure it.",
)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(simulate.simulate)
app.command()(inspect.inspect)
app.command()(plan.plan)
app.command()(transcribe.transcribe)
app.command()(backends.backends)
app.command()(conformance.conformance)
app.command("verify")(verify.verify_command)
app.add_typer(bench.bench_app, name="bench")


def main() -> None:
    """Run the command line; print an error of kvcache as one line, with exit status 1."""
    # Bad options and files, missing packages and devices: no fault of the program, so no traceback.
    try:
        app()
    except (kvcache.KVCacheError, ValueError, OSError, ImportError) as error:
        notes.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        print(version_of("kvcache"))
        raise typer.Exit
