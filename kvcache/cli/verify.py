"""``kvcache verify``: compares conversations over a cache with cold runs of the same passes."""

from __future__ import annotations

import json as json_format
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvcache.errors import KVCacheError, NotSupportedError
from kvcache.verify import SCENARIOS, Report, Target, verify
from kvcache.verify.operations import describe
from kvcache.verify.report import details, junit

from .console import BackendName, check_folder, progress_bar

_MARKS = {
    "equal": "[green]equal[/]",
    "within noise": "[green]within noise[/]",
    "different": "[bold red]DIFFERENT[/]",
    "failed": "[bold red]FAILED[/]",
    "not supported": "[dim]not supported[/]",
}


@dataclass(frozen=True)
class _Choice:
    """The options that say what is verified."""

    subject: str
    caches: tuple[str, ...]
    model: str
    backend: str
    max_kv_size: int | None
    unchecked: bool
    cold: str
    warm: str
    options: str
    vocabulary: int


def verify_command(
    subject: Annotated[
        str, typer.Argument(help="reference, transformers, mlx-lm, or the URL of a server, /v1.")
    ] = "reference",
    cache: Annotated[
        str, typer.Option(help="Kinds of caches, comma-separated; default: all of the library.")
    ] = "",
    model: Annotated[
        str, typer.Option(help="A tiny random one by name, or the directory of a model.")
    ] = "",
    backend: BackendName = "numpy",
    scenario: Annotated[
        str, typer.Option(help=f"Comma-separated, of: {', '.join(SCENARIOS)}; default: all.")
    ] = "",
    runs: Annotated[int, typer.Option(min=1, help="Conversations of each scenario.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the conversations.")] = 0,
    first: Annotated[
        bool, typer.Option("--first", "-x", help="Stop at the first fault of each cache.")
    ] = False,
    max_kv_size: Annotated[int | None, typer.Option(min=1, help="Of prompt caches.")] = None,
    unchecked: Annotated[
        bool, typer.Option(help="Take tokens back without asking the cache each time if it can.")
    ] = False,
    cold: Annotated[
        str, typer.Option(help="Of a server: JSON of options that reuse nothing, or a second URL.")
    ] = "",
    warm: Annotated[str, typer.Option(help="Of a server: JSON of options of other requests.")] = "",
    options: Annotated[str, typer.Option(help="Of a server: JSON of options, as model.")] = "",
    vocabulary: Annotated[int, typer.Option(min=2, help="Of a server: ids are below it.")] = 1000,
    json: Annotated[Path | None, typer.Option(help="Write the reports here.")] = None,
    junit_file: Annotated[
        Path | None, typer.Option("--junit", help="Write XML of JUnit here.")
    ] = None,
) -> None:
    """Prove that warm equals cold: that reuse gives the logits of a run without reuse.

    Conversations are generated (they branch, are edited, cancelled, evicted, come back), run over
    the cache, and every pass is compared with a run over fresh caches, and without a cache where
    that is possible. Of a fault, the shortest conversation that shows it is printed.

    Exit status 0 if all is equal, or within the noise that the kernel shows on equal tokens; 1 if
    something differs; 2 for bad options. Examples:

    [bold]kvcache verify[/]
    [bold]kvcache verify transformers --model mistral --cache dynamic,ours-prefix --runs 50[/]
    [bold]kvcache verify mlx-lm --model gemma3 --scenario drafts --unchecked[/]
    [bold]kvcache verify http://localhost:8000/v1 --options '{"model": "..."}'
    --cold '{"cache_salt": "{unique}"}'[/]
    """
    check_folder("--json", json)
    check_folder("--junit", junit_file)
    scenarios = _items(scenario) or tuple(SCENARIOS)
    if unknown := [name for name in scenarios if name not in SCENARIOS]:
        raise typer.BadParameter(f"--scenario takes {', '.join(SCENARIOS)}; got {unknown[0]!r}.")
    choice = _Choice(
        subject,
        _items(cache),
        model,
        backend,
        max_kv_size,
        unchecked,
        cold,
        warm,
        options,
        vocabulary,
    )
    reports = []
    console = Console()
    for target in _targets(choice):
        report = _run(console, target, scenarios, runs, seed, first)
        if report is not None:
            reports.append(report)
    if json is not None:
        content = [json_format.loads(report.to_json()) for report in reports]
        json.write_text(json_format.dumps(content, indent=2) + "\n")
    if junit_file is not None:
        junit_file.write_text(junit(reports) + "\n")
    if not all(report.passed for report in reports):
        raise typer.Exit(1)


def _run(
    console: Console,
    target: Target,
    scenarios: Sequence[str],
    runs: int,
    seed: int,
    first: bool,
) -> Report | None:
    """Verify one target, and print its report; None if its cache cannot serve its model."""
    with progress_bar() as bar:
        task = bar.add_task(target.name, total=len(scenarios) * runs)

        def step(name: str) -> None:
            bar.update(task, advance=1, description=f"{target.name}: {name}")

        try:
            report = verify(
                target,
                runs=runs,
                seed=seed,
                scenarios=scenarios,
                first_only=first,
                progress=step,
            )
        except NotSupportedError as error:
            console.print(f"{target.name}: not supported: {error}", markup=False, highlight=False)
            return None
        except (KVCacheError, OSError) as error:  # before the first conversation
            raise typer.BadParameter(str(error)) from error
    _print(console, report)
    return report


def _print(console: Console, report: Report) -> None:
    table = Table(title=escape(report.target), box=None, padding=(0, 2, 0, 0), title_justify="left")
    for name in ("scenario", "verdict", ""):
        table.add_column(name)
    for result in report.results:
        table.add_row(result.scenario, _MARKS[result.verdict], details(result))
    console.print(table)
    console.print(f"Noise: {report.noise_text()}.", highlight=False)
    for result in report.faults:
        if result.finding is not None:
            console.print(f"[bold red]{result.scenario}[/]: {escape(result.finding.summary)}")
            for line in describe(result.finding.script):
                console.print(f"    {line}", markup=False, highlight=False, soft_wrap=True)
    console.print()


def _items(text: str) -> tuple[str, ...]:
    """Return the items of a comma-separated text, each once."""
    return tuple(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))


def _targets(choice: _Choice) -> Iterator[Target]:
    """Yield the targets chosen, one after the other. Raises: typer.BadParameter."""
    finders: dict[str, Callable[[_Choice], Iterator[Target]]] = {
        "reference": _reference_targets,
        "transformers": _transformers_targets,
        "mlx-lm": _mlx_targets,
    }
    finder = finders.get(choice.subject)
    if choice.subject.startswith(("http://", "https://")):
        finder = _endpoint
    if finder is None:
        raise typer.BadParameter(
            f"the argument is {', '.join(finders)}, or the URL of a server; got {choice.subject!r}."
        )
    try:
        yield from finder(choice)
    except (KVCacheError, ImportError, ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error


def _chosen(wanted: Sequence[str], kinds: Sequence[str]) -> Sequence[str]:
    """Return the kinds wanted, all of them by default. Raises: typer.BadParameter."""
    for kind in wanted:
        if kind not in kinds:
            raise typer.BadParameter(f"--cache takes {', '.join(kinds)}; got {kind!r}.")
    return wanted or kinds


def _reference_targets(choice: _Choice) -> Iterator[Target]:
    from kvcache.verify.targets.reference import LAYERS, POOLS, LayersTarget, PoolTarget

    forms: dict[str, Callable[[], Target]] = {}
    for kind in LAYERS:
        forms[f"layers-{kind}"] = partial(LayersTarget, kind, choice.backend)
    for kind in POOLS:
        forms[f"pool-{kind}"] = partial(PoolTarget, kind, choice.backend)
    for name in _chosen(choice.caches, tuple(forms)):
        yield forms[name]()


def _transformers_targets(choice: _Choice) -> Iterator[Target]:
    from kvcache.verify.targets.transformers import CACHES, TransformersTarget
    from kvcache.verify.targets.transformers_models import load

    kinds = _chosen(choice.caches, tuple(CACHES))
    model = load(choice.model or "llama")
    for kind in kinds:
        yield TransformersTarget(model, kind, checked=not choice.unchecked)


def _mlx_targets(choice: _Choice) -> Iterator[Target]:
    from kvcache.verify.targets.mlx_lm import CACHES, MlxLmTarget
    from kvcache.verify.targets.mlx_models import load

    kinds = _chosen(choice.caches, tuple(CACHES))
    model = load(choice.model or "llama")
    for kind in kinds:
        yield MlxLmTarget(model, kind, max_kv_size=choice.max_kv_size, checked=not choice.unchecked)


def _endpoint(choice: _Choice) -> Iterator[Target]:
    from kvcache.verify.targets.endpoint import EndpointTarget

    is_url = choice.cold.startswith(("http://", "https://"))
    yield EndpointTarget(
        choice.subject,
        cold_url=choice.cold if is_url else None,
        cold=None if is_url else _object("--cold", choice.cold),
        warm=_object("--warm", choice.warm),
        options=_object("--options", choice.options),
        vocab_size=choice.vocabulary,
    )


def _object(option: str, text: str) -> dict[str, Any]:
    """Return the JSON object in `text`; {} for none. Raises: typer.BadParameter."""
    try:
        value = json_format.loads(text or "{}")
    except ValueError as error:
        raise typer.BadParameter(f"{option} takes a JSON object; got {text!r}: {error}.") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{option} takes a JSON object; got {text!r}.")
    return value
