"""The command line: ``kvcache generate | chat | transcribe | backends | ...``.

Text that a model generates goes to standard output, everything else to standard error, so
that output can be piped. Frameworks are imported by the commands that need them.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import kvcache
from .console import BackendName, notes, progress

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvcache.backends import Backend
from kvcache.backends import HOST_DTYPES

from . import bench, chat, generate, simulate, transcribe

if TYPE_CHECKING:
    from kvcache.testing import Result

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
app.command()(transcribe.transcribe)
app.add_typer(bench.bench_app, name="bench")

_SHORT = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
    "int8": "i8",
    "uint8": "u8",
    "int32": "i32",
}


def main() -> None:
    """Run the command line; errors that kvcache foresees become one line and exit status 1."""
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


# backends


@app.command()
def backends() -> None:
    """Show which backends work here, on which devices, and how to install the others."""
    with notes.status("Importing what is installed"):
        found = kvcache.available_backends()
    table = Table("backend", "version", "devices, default first", "dtypes it lacks", "to install")
    for name, info in found.items():
        if info.installed:
            devices = ", ".join(info.devices)
            table.add_row(name, info.version, devices, _lacking(name), "", style="green")
        else:
            table.add_row(name, "-", "", "", escape(info.remedy), style="dim")
    Console().print(table)
    best = kvcache.get_backend("auto")
    Console().print(f"[bold]auto[/] chooses {best.spec}. KVCACHE_BACKEND overrides it.")


def _lacking(name: str) -> str:
    if name == "array_api":
        return "depends on the library"
    has = kvcache.get_backend(name).dtypes
    return ", ".join(dtype for dtype in HOST_DTYPES if dtype not in has) or "none"


# conformance


@app.command()
def conformance(
    backend: BackendName = "auto",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every check.")] = False,
) -> None:
    """Check a backend against the contract, on this machine, dtype by dtype.

    Exit status 1 if a check fails. Example: [bold]kvcache conformance --backend torch:cuda[/]
    """
    from kvcache.testing import run_suite
    from kvcache.testing.run import suite

    where = kvcache.get_backend(backend)
    results = []
    with progress() as bar:
        task = bar.add_task(f"Checking {where.spec}", total=len(suite()))
        for result in run_suite(where):
            results.append(result)
            bar.advance(task)
    console = Console()
    console.print(_conformance_table(where, results))
    _print_details(console, results, verbose)
    tally = Counter(result.outcome for result in results)
    console.print(
        f"{tally['passed']} passed, {tally['failed']} failed, "
        f"{tally['missing']} skipped: dtype not in {where.name}"
    )
    if tally["failed"]:
        raise typer.Exit(1)


def _conformance_table(backend: Backend, results: list[Result]) -> Table:
    marks = {"passed": "[green]ok[/]", "failed": "[bold red]NO[/]", "missing": "[dim]-[/]"}
    table = Table(title=f"{backend.spec} against the contract", box=None, padding=(0, 1, 0, 0))
    table.add_column("rule", no_wrap=True, ratio=1)
    for dtype in HOST_DTYPES:
        short = _SHORT.get(dtype, dtype)
        table.add_column(short, justify="center", min_width=len(short))
    rows: dict[str, list[str]] = {}
    for result in results:
        rows.setdefault(result.check.name, []).append(marks[result.outcome])
    for name, cells in rows.items():
        table.add_row(name.replace("_", " "), *cells)
    return table


def _print_details(console: Console, results: list[Result], verbose: bool) -> None:
    for result in results:
        if result.outcome == "failed" or verbose:
            text = f"{result.outcome}: {result.check} {result.reason}"
            console.print(text, markup=False, highlight=False)
