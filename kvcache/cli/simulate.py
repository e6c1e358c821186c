"""``kvcache simulate``: hit rates of eviction policies on a recorded trace."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvcache.prefix.policies import POLICIES
from kvcache.prefix.simulation.report import run_simulation
from kvcache.prefix.simulation.trace import read_trace

from .console import progress_bar

CAPACITIES = "0.1M,0.2M,0.5M,1M,2M,3M,5M,10M,20M,50M"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def simulate(
    trace: Annotated[
        Path, typer.Argument(help="JSON lines with timestamp in ms and hash_ids; .gz too.")
    ],
    capacity: Annotated[
        str, typer.Option(help="Tokens that the cache holds, comma-separated: 300k, 2.5M, ...")
    ] = CAPACITIES,
    policy: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(POLICIES),
    block_size: Annotated[int, typer.Option(help="Tokens that an id stands for.")] = 512,
    json: Annotated[Path | None, typer.Option(help="Write everything counted here.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw hit rate over capacity here, .png or .svg.")
    ] = None,
) -> None:
    """Replay recorded requests against a prefix cache, with several eviction policies.

    A request finds the longest beginning of its blocks that is kept. The last column is the best
    possible hit rate, of a policy that knows the future. Example:

    [bold]kvcache simulate trace.jsonl.gz --capacity 3M,10M --policy lru,gittins[/]
    """
    # Now, and not after minutes of replaying.
    if plot is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("--plot needs matplotlib. pip install 'kvcache[bench]'")
    capacities = [_tokens(item) for item in _items(capacity)]
    policies = _items(policy)
    with progress_bar() as bar:
        task = bar.add_task("Reading", total=len(capacities) * (len(policies) + 1))
        requests = read_trace(trace)
        bar.update(task, description="Replaying")
        report = run_simulation(
            trace.name, requests, policies, capacities, block_size, lambda: bar.advance(task)
        )
    Console().print(report.to_table())
    if json is not None:
        report.to_json(json)
    if plot is not None:
        report.plot(plot)


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _tokens(text: str) -> int:
    """Return a number of tokens; `text` may end in the unit k, m or g."""
    match = re.fullmatch(r"(\d+\.?\d*)([kmg]?)", text.lower())
    if match is None:
        raise typer.BadParameter(f"--capacity takes numbers like 300k, 3M or 2.5M; got {text!r}.")
    return round(float(match[1]) * _UNITS[match[2]])
