"""The command line of the benchmarks: ``kvcache bench append | diffusion | plan | ...``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kvcache.bench import (
    installed_backends,
    run_append,
    run_attend,
    run_diffusion,
    run_plan,
    run_prefix,
    run_state,
    run_step,
    run_store,
    toy_model,
)
from kvcache.bench.attend.case import LOADS
from kvcache.bench.attend.run import ROUNDS as ATTEND_ROUNDS
from kvcache.bench.diffusion.run import FEWEST_STEPS, SAMPLES, STEPS
from kvcache.bench.diffusion.run import ROUNDS as DIFFUSION_ROUNDS
from kvcache.bench.harness import timing
from kvcache.bench.harness.report import MeasuredTiming, Report
from kvcache.bench.store.run import ROUNDS as STORE_ROUNDS

from .console import check_folder
from .units import as_bytes

bench_app = typer.Typer(no_args_is_help=True, help="Measure ours against others, in one run.")

Backends = Annotated[
    str, typer.Option(help="Comma-separated, devices too; default: all installed.")
]
Dtypes = Annotated[str, typer.Option(help="Comma-separated.")]
Heads = Annotated[int, typer.Option(help="Key and value heads.")]
HeadDim = Annotated[int, typer.Option(help="Dimensions of a head.")]
Rounds = Annotated[int, typer.Option(help="Turns of every contestant.")]
Json = Annotated[Path | None, typer.Option(help="Write everything measured here.")]


@bench_app.command()
def append(
    backends: Backends = "",
    dtypes: Dtypes = "float32,bfloat16",
    capacities: Annotated[
        str, typer.Option(help="Tokens held, comma-separated.")
    ] = "1024,8192,32768",
    batch: Annotated[int, typer.Option(help="Streams per layer.")] = 1,
    heads: Heads = 8,
    head_dim: HeadDim = 128,
    rounds: Rounds = 101,
    json: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw cost over capacity here.")] = None,
) -> None:
    """Measure the cost of appending one token to K and V, at several capacities.

    Ours (a backend's slice_update, KVCache.update, RotatingKVCache.update), the raw framework
    call, memmove of the same bytes, and, if installed, the caches of transformers and mlx-lm:
    interleaved in one run, medians. Example:

    [bold]kvcache bench append --backends torch,jax --plot append.png[/]
    """
    if plot is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("--plot needs matplotlib. pip install 'kvcache[bench]'")
    with _bar() as progress:
        report = run_append(
            _list(backends) or installed_backends(),
            _list(dtypes),
            _numbers(capacities),
            batch,
            heads,
            head_dim,
            rounds,
            progress,
        )
    _show(report, json)
    if plot is not None:
        report.plot(plot)


@bench_app.command()
def attend(
    backends: Backends = "",
    dtypes: Annotated[str, typer.Option(help="Comma-separated.")] = "float32",
    loads: Annotated[str, typer.Option(help="How sequences lie, comma-separated.")] = ",".join(
        LOADS
    ),
    sequences: Annotated[str, typer.Option(help="In a pass, comma-separated.")] = "1,8,32",
    tokens: Annotated[int, typer.Option(help="Of a sequence.", min=8)] = 1024,
    heads: Heads = 8,
    query_heads: Annotated[int, typer.Option(help="A multiple of the heads.")] = 32,
    head_dim: HeadDim = 128,
    rounds: Rounds = ATTEND_ROUNDS,
    json: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw cost over sequences here.")] = None,
) -> None:
    """Measure attention of a decode pass over a pool of many sequences.

    CausalCache.attend, and get with its mask under the framework's kernel, as multiples of the
    ideal: that kernel, sequence by sequence, over keys in arrays of their own. Sequences are even,
    uneven (a 64th to four times the tokens), fragmented, in a window, or share a prefix of twice
    the tokens. Beside functional.attend in a compiled program on JAX, the batch cache of mlx-lm on
    MLX, and the paged cache of transformers' continuous batching on torch. For one thread set
    OMP_NUM_THREADS=1; JAX takes all cores, unless taskset -c 0 leaves it one. Example:

    [bold]kvcache bench attend --backends torch --loads even,shared --sequences 1,32[/]
    """
    if plot is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("--plot needs matplotlib. pip install 'kvcache[bench]'")
    with _bar() as progress:
        report = run_attend(
            _list(backends) or installed_backends(),
            _list(dtypes),
            _list(loads),
            _numbers(sequences),
            tokens,
            heads,
            query_heads,
            head_dim,
            rounds,
            progress,
        )
    _show(report, json)
    if plot is not None:
        report.plot(plot)


@bench_app.command()
def diffusion(
    backends: Backends = "",
    steps: Annotated[int, typer.Option(help="Steps of the sampler.", min=FEWEST_STEPS)] = STEPS,
    samples: Annotated[int, typer.Option(help="Drawn together.")] = SAMPLES,
    rounds: Annotated[int, typer.Option(help="Turns of every contestant.")] = DIFFUSION_ROUNDS,
    model: Annotated[
        Path | None, typer.Option(help="File of the model: read if it exists, else written.")
    ] = None,
    peers: Annotated[bool, typer.Option(help="Beside the caches of diffusers, on a FLUX.")] = True,
    json: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw error over time saved here.")] = None,
) -> None:
    """Measure the time saved by caches across denoising steps, and the error of the samples.

    Every policy and predictor, from careful to careless, on a small diffusion transformer, which
    torch first trains on toy shapes for half a minute; and beside the caches of diffusers, if it
    is installed, on a small FLUX of random weights. Example:

    [bold]kvcache bench diffusion --backends torch,jax --model toy.safetensors --plot it.png[/]
    """
    if plot is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("--plot needs matplotlib. pip install 'kvcache[bench]'")
    if find_spec("torch") is None and not (model and model.exists()):
        raise typer.BadParameter(
            "training the model needs torch. pip install 'kvcache[torch]', or give a --model "
            "that was kept elsewhere"
        )
    with _bar() as progress:
        report = run_diffusion(
            toy_model(model, progress),
            _list(backends) or installed_backends(),
            steps,
            samples,
            rounds,
            peers=peers,
            progress=progress,
        )
    _show(report, json)
    if plot is not None:
        report.plot(plot)


@bench_app.command()
def plan(
    window: Annotated[int, typer.Option(help="Tokens of the sliding window, under 1,500.")] = 1024,
    rounds: Rounds = 101,
    json: Json = None,
) -> None:
    """Measure the cost, on the host, of planning a decode step of 1, 64 and 256 sequences.

    Planning chooses the cells of the new tokens and of the old ones that a window drops; in the
    columns with mask, it also makes the mask: all of the work before the first layer. It must not
    cost more in a pool of ten times as many cells. No framework takes part. Example:

    [bold]kvcache bench plan --window 512 --json plan.json[/]
    """
    with _bar() as progress:
        report = run_plan(window=window, rounds=rounds, progress=progress)
    _show(report, json)


@bench_app.command()
def prefix(
    users: Annotated[int, typer.Option(help="Sequences for each of 20 shared prompts.")] = 100,
    spans: Annotated[int, typer.Option(help="Spans of which half are evicted.")] = 100_000,
    rounds: Rounds = 101,
    json: Json = None,
) -> None:
    """Measure the cost of finding prefixes common to several requests, and of evicting them.

    Sequences of 2,048 tokens, the first half of them a prompt common to many users, are looked up
    in and added to a radix tree and the index of spans on it. A query that leaves the tree early
    must not cost more if it is longer, and no eviction may take longer than 5 ms. Example:

    [bold]kvcache bench prefix --rounds 31 --json prefix.json[/]
    """
    with _bar() as progress:
        report = run_prefix(users=users, spans=spans, rounds=rounds, progress=progress)
    _show(report, json)


@bench_app.command()
def state(
    backends: Backends = "",
    dtypes: Annotated[str, typer.Option(help="Of matrices, comma-separated.")] = "float32",
    batches: Annotated[
        str, typer.Option(help="Sequences that decode together, comma-separated.")
    ] = "1,8,32",
    layers: Annotated[int, typer.Option(help="Recurrent layers of the model.")] = 12,
    heads: Annotated[int, typer.Option(help="Heads, each with a matrix.")] = 32,
    head_dim: HeadDim = 128,
    channels: Annotated[int, typer.Option(help="Channels of the convolution.")] = 8192,
    kernel: Annotated[int, typer.Option(help="Tokens that the convolution sees.")] = 4,
    rounds: Rounds = 101,
    json: Json = None,
) -> None:
    """Measure the cost of recurrent states: updates, forks, snapshots.

    StateCache.advance beside plain copies of the same arrays, and a decode step of a RecurrentCache
    beside a gather and a scatter of the same rows, in all layers. A fork (copy_prefix) copies
    nothing. The defaults are states of Qwen3-Next, in a third of its layers. Example:

    [bold]kvcache bench state --backends torch --batches 1,16 --layers 2[/]
    """
    with _bar() as progress:
        report = run_state(
            _list(backends) or installed_backends(),
            _list(dtypes),
            _numbers(batches),
            layers,
            heads,
            head_dim,
            channels,
            kernel,
            rounds,
            progress,
        )
    _show(report, json)


@bench_app.command()
def step(
    backends: Backends = "",
    dtypes: Dtypes = "float32,bfloat16",
    batches: Annotated[
        str, typer.Option(help="Sequences that decode together, comma-separated.")
    ] = "1,8",
    tokens: Annotated[int, typer.Option(help="Tokens that they hold in all.")] = 8192,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 32,
    heads: Heads = 8,
    head_dim: HeadDim = 128,
    rounds: Rounds = 101,
    program: Annotated[
        bool,
        typer.Option("--program", help="With attention, compiled: with and without the write."),
    ] = False,
    json: Json = None,
) -> None:
    """Measure the cost of a CausalCache in one decode step of a whole model.

    start_forward, then put and get in all layers, mask included, beside the raw framework calls:
    a slice of K and of V written and a view of each taken per layer. Raw plans nothing and has no
    mask; its sequences are of equal length. Each of them holds 2 GiB of float32. Example:

    [bold]kvcache bench step --backends torch --batches 1,4,16 --layers 16[/]
    """
    with _bar() as progress:
        report = run_step(
            _list(backends) or installed_backends(),
            _list(dtypes),
            _numbers(batches),
            tokens,
            layers,
            heads,
            head_dim,
            rounds,
            progress,
            program,
        )
    _show(report, json)


@bench_app.command()
def store(
    sizes: Annotated[str, typer.Option(help="Of values, comma-separated.")] = "1M,32M",
    directory: Annotated[
        Path | None, typer.Option(help="An existing one for files; default: a temporary one.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Turns of every contestant.")] = STORE_ROUNDS,
    json: Json = None,
) -> None:
    """Measure how fast values go into stores and out of them.

    MemoryStore, FileStore and RedisStore, beside what the machine does without a store: a copy in
    memory, a plain file, and one TCP stream over loopback. A redis-server and a valkey-server are
    started for RedisStore, where there are such programs. Example:

    [bold]kvcache bench store --sizes 32M --directory /dev/shm[/]
    """
    check_folder("--json", json)
    with _bar() as progress:
        report = run_store(
            [as_bytes("--sizes", size) for size in _list(sizes)], rounds, directory, progress
        )
    _show(report, json)


@contextmanager
def _bar() -> Iterator[timing.Progress]:
    """Show a bar on standard error; yield the function to move it."""
    notes = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # A thread that refreshes the bar would take its time from the measurement.
    with Progress(
        *columns,
        console=notes,
        transient=True,
        disable=not notes.is_terminal,
        auto_refresh=False,
    ) as bar:
        task = bar.add_task("Preparing", total=None)
        yield lambda done, total, label: bar.update(
            task, completed=done, total=total, description=label, refresh=True
        )


def _show(report: Report[MeasuredTiming], json: Path | None) -> None:
    Console().print(report.to_table())
    if json is not None:
        report.to_json(json)


def _list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _numbers(text: str) -> list[int]:
    return [int(item) for item in _list(text)]
