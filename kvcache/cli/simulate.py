"""``kvcache simulate``: hit rates of eviction policies on a recorded trace."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from kvcache.prefix.policies import POLICIES, make_policy
from kvcache.prefix.simulation.report import MOST_SEEDS, run_simulation
from kvcache.prefix.simulation.trace import read_trace

from .console import check_folder, progress_bar

T = TypeVar("T")

CAPACITIES = "0.1M,0.2M,0.5M,1M,2M,3M,5M,10M,20M,50M"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def simulate(
    trace: Annotated[
        Path, typer.Argument(help="JSON lines: timestamp in ms, hash_ids, output_length; .gz too.")
    ],
    capacity: Annotated[
        str, typer.Option(help="Tokens that the cache holds, comma-separated: 300k, 2.5M, ...")
    ] = CAPACITIES,
    policy: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(POLICIES),
    block_size: Annotated[int, typer.Option(help="Tokens that an id stands for.")] = 512,
    seeds: Annotated[
        int, typer.Option(help="Runs of gittins and the ceiling, which draw lots, for their mean.")
    ] = 1,
    hints: Annotated[
        float | None,
        typer.Option(help="Add gittins told which prompts return, this share of it wrong: 0.18."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything counted here.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw hit rate over capacity here, .png or .svg.")
    ] = None,
) -> None:
    """Replay recorded requests against a prefix cache, with several eviction policies.

    A request finds the longest beginning of its blocks that is kept. The last column is the best
    possible hit rate, of a policy that knows the future. The one before is of a policy that knows
    how likely each class of spans is requested again, as gittins has to learn. Example:

    [bold]kvcache simulate trace.jsonl.gz --capacity 3M,10M --policy lru,gittins[/]
    """
    # Now, and not after minutes of replaying.
    if plot is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("--plot needs matplotlib. pip install 'kvcache[bench]'")
    if plot is not None and plot.suffix.lower() not in {".png", ".svg"}:
        raise typer.BadParameter(f"--plot takes a name that ends in .png or .svg; got {plot}.")
    check_folder("--plot", plot)
    check_folder("--json", json)
    capacities = _items(capacity, _tokens)
    policies = _items(policy, _policy)
    if not capacities:
        raise _no_capacity(capacity)
    if block_size < 1:
        raise typer.BadParameter(f"--block-size takes tokens, at least 1; got {block_size}.")
    if not 1 <= seeds <= MOST_SEEDS:
        raise typer.BadParameter(f"--seeds takes runs, 1 to {MOST_SEEDS}; got {seeds}.")
    if hints is not None and not 0 <= hints <= 1:
        raise typer.BadParameter(f"--hints takes the share of wrong ones, 0 to 1; got {hints}.")
    columns = len(policies) + 2 + (hints is not None)
    with progress_bar() as bar:
        task = bar.add_task("Reading", total=len(capacities) * columns)
        requests = read_trace(trace)
        bar.update(task, description="Replaying")
        report = run_simulation(
            trace.name,
            requests,
            policies,
            capacities,
            block_size,
            lambda: bar.advance(task),
            seeds,
            hints,
        )
    Console().print(report.to_table())
    if json is not None:
        report.to_json(json)
    if plot is not None:
        report.plot(plot)


def _items(text: str, convert: Callable[[str], T]) -> list[T]:
    """Return the items of a comma-separated `text`, each once."""
    items = [convert(item.strip()) for item in text.split(",") if item.strip()]
    return list(dict.fromkeys(items))


def _policy(name: str) -> str:
    make_policy(name)
    return name


def _tokens(text: str) -> int:
    """Return a number of tokens; `text` may end in the unit k, m or g."""
    # 15 digits: more are no number of tokens, and a float loses count of them.
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{0,15})?)([kmg]?)", text.lower(), re.ASCII)
    if match is None:
        raise _no_capacity(text)
    return round(float(match[1]) * _UNITS[match[2]])


def _no_capacity(text: str) -> typer.BadParameter:
    return typer.BadParameter(f"--capacity takes numbers like 300k, 3M or 2.5M; got {text!r}.")
