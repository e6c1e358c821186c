"""The command line: ``kvcache generate | backends | conformance | bench``.

Text that a model generates goes to standard output, everything else to standard error, so
that output can be piped. Frameworks are imported by the commands that need them.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as missing:
    raise SystemExit(
        f"The command line needs {missing.name}. Install it: pip install 'kvcache[cli]'"
    ) from missing

import kvcache
from kvcache.backends import Backend
from kvcache.backends.base import HOST_DTYPES
from kvcache.bench.cli import bench_app

if TYPE_CHECKING:
    from kvcache.reference.gguf import GGUFFile
    from kvcache.reference.llama import Llama
    from kvcache.reference.tokenizer import Tokenizer
    from kvcache.testing import Result

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="One key/value cache for every array framework: try it, check it, measure it.",
)
app.add_typer(bench_app, name="bench")
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


class CacheKind(StrEnum):
    """Which cache `generate` uses."""

    kv = "kv"
    rotating = "rotating"
    none = "none"


def main() -> None:
    """Run the command line; errors that kvcache foresees become one line and exit status 1."""
    try:
        app()
    except (kvcache.KVCacheError, ValueError, OSError) as error:
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


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(
        *columns,
        console=notes,
        transient=True,
        disable=not notes.is_terminal,
    )


# generate


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    backend: BackendName = "numpy",
    cache: Annotated[
        CacheKind,
        typer.Option(help="kv keeps every token, rotating a bounded number, none recomputes."),
    ] = CacheKind.kv,
    max_size: Annotated[
        int, typer.Option(help="Tokens that a rotating cache holds, sinks included.")
    ] = 1024,
    keep: Annotated[
        int, typer.Option(help="First tokens that a rotating cache never drops (sinks).")
    ] = 4,
    dtype: Annotated[
        str, typer.Option(help="What the cache holds; the model computes in float32.")
    ] = "float32",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Tokens at most.")] = 128,
    model: Annotated[
        Path | None,
        typer.Option(help="A GGUF file of llama architecture; default: SmolLM2-135M-Instruct."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer the prompt with the model's chat template.")
    ] = False,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the model's end token.")
    ] = False,
    prefill_chunk: Annotated[
        int | None, typer.Option(help="Feed the prompt in pieces of so many tokens.")
    ] = None,
) -> None:
    """Generate text greedily with a real model, token by token, through a kvcache.

    Example: [bold]kvcache generate --backend jax --cache rotating "The capital of France is"[/]
    """
    from kvcache.reference.runner import generate as run
    from kvcache.reference.runner import make_caches

    where = kvcache.get_backend(backend)
    llama, tokenizer = _load(model, where)
    caches = make_caches(
        where, llama.config, cache.value, max_size=max_size, keep=keep, dtype=dtype
    )
    ids = tokenizer.apply_chat(prompt) if chat else tokenizer.encode(prompt, bos=True)
    eos = None if ignore_eos else tokenizer.eos_id
    watch = _Stopwatch(run(llama, ids, caches, max_tokens, eos_id=eos, prefill_chunk=prefill_chunk))
    notes.print(prompt, style="dim", end="\n" if chat else "", markup=False, highlight=False)
    _stream(watch, tokenizer)
    notes.print(_generation_table(where, cache, caches, len(ids), watch))


class _Stopwatch:
    """Passes tokens on and remembers when they came."""

    def __init__(self, tokens: Iterator[int]) -> None:
        self._tokens = tokens
        self.started = time.perf_counter()
        self.first = self.last = self.started
        self.count = 0

    def __iter__(self) -> Iterator[int]:
        for token in self._tokens:
            self.last = time.perf_counter()
            if not self.count:
                self.first = self.last
            self.count += 1
            yield token

    @property
    def rate(self) -> str:
        """Tokens per second after the first one."""
        if self.count < 2:
            return "-"
        return f"{(self.count - 1) / (self.last - self.first):.1f}"


def _load(path: Path | None, backend: Backend) -> tuple[Llama, Tokenizer]:
    try:
        from kvcache.reference.gguf import default_model_path, open_gguf
        from kvcache.reference.tokenizer import Tokenizer
    except ImportError as missing:
        raise kvcache.BackendNotAvailableError(
            f"generate needs {missing.name}. Install it: pip install 'kvcache[demo]'"
        ) from missing
    with notes.status("Opening the model"):
        file = open_gguf(path or default_model_path())
        tokenizer = Tokenizer.from_gguf(file)
    return _load_weights(file, backend), tokenizer


def _load_weights(file: GGUFFile, backend: Backend) -> Llama:
    from kvcache.reference.llama import Llama

    with _progress() as bar:
        task = bar.add_task("Loading weights", total=None)
        return Llama.from_gguf(
            file, backend, lambda done, total: bar.update(task, completed=done, total=total)
        )


def _stream(tokens: _Stopwatch, tokenizer: Tokenizer) -> None:
    text = tokenizer.stream()
    for token in tokens:
        print(text.push(token), end="", flush=True)
    print(flush=True)


def _generation_table(
    backend: Backend, kind: CacheKind, caches: list[Any] | None, prompt: int, watch: _Stopwatch
) -> Table:
    layers = caches or []
    table = Table.grid(padding=(0, 2))
    table.add_row("backend", backend.spec)
    table.add_row("cache", ", ".join([kind.value, *{cache.dtype for cache in layers}]))
    table.add_row("prompt", f"{prompt} tokens, {watch.first - watch.started:.2f} s")
    table.add_row("generated", f"{watch.count} tokens, {watch.rate} tokens/s")
    if layers:
        held = f"{_size(sum(cache.nbytes for cache in layers))} for {layers[0].len} tokens"
        table.add_row("held", f"{held}, {sum(cache.growths for cache in layers)} growths")
    return table


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


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
    from kvcache.testing.report import suite

    where = kvcache.get_backend(backend)
    results = []
    with _progress() as bar:
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
