"""``kvcache conformance``: the rules of the contract, checked on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

import kvcache
from kvcache.backends import HOST_DTYPES, Backend

from .console import BackendName, progress_bar

if TYPE_CHECKING:
    from kvcache.testing import Result

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


def conformance(
    backend: BackendName = "auto",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every check.")] = False,
) -> None:
    """Check a backend against the contract, on this machine, dtype by dtype.

    Exit status 1 if a check fails. Example: [bold]kvcache conformance --backend torch:cuda[/]
    """
    # The suite is large, and no other command needs it.
    from kvcache.testing import run_suite
    from kvcache.testing.run import suite

    checked = kvcache.get_backend(backend)
    results = []
    with progress_bar() as bar:
        task = bar.add_task(f"Checking {checked.spec}", total=len(suite()))
        for result in run_suite(checked):
            results.append(result)
            bar.advance(task)
    console = Console()
    console.print(_table(checked, results))
    _print_details(console, results, verbose)
    tally = Counter(result.outcome for result in results)
    console.print(
        f"{tally['passed']} passed, {tally['failed']} failed, "
        f"{tally['missing']} skipped: dtype not in {checked.name}"
    )
    if tally["failed"]:
        raise typer.Exit(1)


def _table(backend: Backend, results: Sequence[Result]) -> Table:
    """Return a table with a row for each rule and a column for each dtype."""
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


def _print_details(console: Console, results: Sequence[Result], verbose: bool) -> None:
    for result in results:
        if result.outcome == "failed" or verbose:
            text = f"{result.outcome}: {result.check} {result.reason}"
            console.print(text, markup=False, highlight=False)  # a reason may have brackets
