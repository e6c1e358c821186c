"""``kvcache plan``: bytes of caches per token and per state, from the config of a model."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.markup import escape

from kvcache.bench.harness.tables import new_table
from kvcache.sizing import ModelShape, Sizes, bytes_at, model_shape, read_config, sizes_of

from .console import check_folder
from .units import as_bytes, in_bytes

FORMAT = "kvcache.plan/1"


class Planned(NamedTuple):
    """A model, and the bytes of its caches. totals: by number of tokens, of one sequence."""

    name: str
    shape: ModelShape
    sizes: Sizes
    totals: dict[int, int]


def plan(
    configs: Annotated[
        list[Path], typer.Argument(help="Files config.json, or folders with one.", metavar="CONFIG")
    ],
    dtype: Annotated[str, typer.Option(help="Of keys and values.")] = "bfloat16",
    state_dtype: Annotated[str, typer.Option(help="Of recurrent states.")] = "float32",
    tokens: Annotated[
        str, typer.Option(help="Lengths of one sequence, comma-separated.")
    ] = "1024,8192,131072",
    budget: Annotated[
        str, typer.Option(help="How many sequences of each length fit: 16G, 500M, ...")
    ] = "",
    json: Annotated[Path | None, typer.Option(help="Write everything computed here.")] = None,
) -> None:
    """Compute the size of a cache from the config.json of a model, without loading it.

    Bytes per token of keys and values, of full windows, and of one recurrent state, and how many
    tokens weigh as much as that state: keep states that far apart, or further. A sequence of a
    length has one state behind its last token. Example:

    [bold]kvcache plan Qwen3-Next/config.json --tokens 8192,131072 --budget 64G[/]
    """
    check_folder("--json", json)
    lengths, room = _lengths(tokens), as_bytes("--budget", budget) if budget else None
    planned = [_planned(path, dtype, state_dtype, lengths) for path in configs]
    _show(Console(), planned, lengths, room)
    if json is not None:
        records = [_record(one, dtype, state_dtype) for one in planned]
        document = {"format": FORMAT, "models": records}
        json.write_text(json_format.dumps(document, indent=1) + "\n", encoding="utf-8")


def _lengths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdecimal() for part in parts):
        raise typer.BadParameter(f"--tokens takes numbers like 1024,8192; got {text!r}.")
    return sorted({int(part) for part in parts})


def _planned(path: Path, dtype: str, state_dtype: str, lengths: list[int]) -> Planned:
    file = path / "config.json" if path.is_dir() else path
    shape = model_shape(read_config(file))
    totals = {tokens: bytes_at(shape, tokens, dtype, state_dtype) for tokens in lengths}
    name = file.parent.name if file.name == "config.json" and file.parent.name else file.stem
    return Planned(name, shape, sizes_of(shape, dtype, state_dtype), totals)


def _show(console: Console, planned: list[Planned], lengths: list[int], room: int | None) -> None:
    table = new_table("Bytes of one sequence", "", "layers", "a token", "windows", "a state", "=")
    for name, shape, sizes, _ in planned:
        table.add_row(escape(name), _layers(shape), *_cells(sizes))
    console.print(table)
    console.print(
        "layers: with attention, with a window, with a state. =: tokens as large as a state.",
        style="dim",
        highlight=False,
    )
    console.print()
    title = "One sequence of so many tokens" + (
        f", and how many fit into {in_bytes(room)}" if room else ""
    )
    totals = new_table(title, "", *(f"{tokens:,}" for tokens in lengths))
    for name, _, _, by_length in planned:
        totals.add_row(escape(name), *map(in_bytes, by_length.values()))
        if room is not None:
            fits = [f"{room // nbytes:,}" if nbytes else "" for nbytes in by_length.values()]
            totals.add_row("", *fits, style="dim")
    console.print(totals)


def _layers(shape: ModelShape) -> str:
    whole = sum(group.layers for group in shape.tokens if group.window is None)
    windowed = sum(group.layers for group in shape.tokens if group.window is not None)
    states = sum(group.layers for group in shape.recurrent)
    return f"{whole} {windowed} {states}"


def _cells(sizes: Sizes) -> tuple[str, str, str, str]:
    equal = sizes.state_tokens
    return (
        in_bytes(sizes.per_token) if sizes.per_token else "",
        in_bytes(sizes.full_windows) if sizes.full_windows else "",
        in_bytes(sizes.per_state) if sizes.per_state else "",
        f"{equal:,.0f}" if equal else "",
    )


def _record(planned: Planned, dtype: str, state_dtype: str) -> dict[str, object]:
    name, shape, sizes, totals = planned
    return {
        "name": name,
        "family": shape.family,
        "layers": shape.layers,
        "dtype": dtype,
        "state_dtype": state_dtype,
        "bytes_per_token": sizes.per_token,
        "bytes_per_token_in_windows": sizes.per_window_token,
        "window_tokens": sizes.window,
        "bytes_of_full_windows": sizes.full_windows,
        "bytes_per_state": sizes.per_state,
        "tokens_per_state": sizes.state_tokens,
        "bytes_of_sequences": {str(tokens): nbytes for tokens, nbytes in totals.items()},
    }
