"""``kvcache generate``: a real model goes on from one prompt, or from many at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

import kvcache
from kvcache.backends import Backend, nbytes

from .console import BackendName, notes, progress

if TYPE_CHECKING:
    from kvcache.reference.llama.gguf import GGUFFile
    from kvcache.reference.llama.model import Llama
    from kvcache.reference.llama.server import Request, Server
    from kvcache.reference.llama.tokenizer import Tokenizer


class CacheKind(StrEnum):
    """Which cache `generate` uses."""

    kv = "kv"
    rotating = "rotating"
    none = "none"
    pool = "pool"


@dataclass
class Pool:
    """How a pool is laid out."""

    max_sequences: int
    capacity: int
    cells: int | None
    window: int | None
    context_shift: bool
    keep: int


def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="Text to go on from.")] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Another one, decoded together with the others."),
    ] = None,
    backend: BackendName = "numpy",
    cache: Annotated[
        CacheKind,
        typer.Option(
            help="kv keeps every token, rotating a bounded number, none recomputes, "
            "pool is one for all prompts; several prompts use that."
        ),
    ] = CacheKind.kv,
    max_size: Annotated[
        int, typer.Option(help="Tokens that a rotating cache holds, sinks included.")
    ] = 1024,
    keep: Annotated[
        int, typer.Option(help="First tokens that are never dropped (sinks; --context-shift).")
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
    relay: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Instead of --backend: begin on the first of these backends and hand the caches "
            "to the next one every few tokens, in turn. The text stays the same.",
        ),
    ] = None,
    relay_every: Annotated[
        int, typer.Option(min=1, help="Relay: tokens until the next hand-over.")
    ] = 4,
    max_sequences: Annotated[
        int, typer.Option(help="Pool: prompts decoded at once; others wait.")
    ] = 8,
    capacity: Annotated[int, typer.Option(help="Pool: tokens of one sequence, at most.")] = 1024,
    cells: Annotated[
        int | None,
        typer.Option(
            help="Pool: tokens of all sequences together; when they are used up, the newest "
            "waits. Default: capacity for all."
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Pool: sliding window, the token itself included.")
    ] = None,
    context_shift: Annotated[
        bool,
        typer.Option(
            "--context-shift",
            help="Pool: a sequence at its capacity drops its middle and goes on; else it ends.",
        ),
    ] = False,
) -> None:
    """Generate text greedily with a real model, token by token, through a kvcache.

    Example: [bold]kvcache generate --backend jax --cache rotating "The capital of France is"[/]

    Many at once: [bold]kvcache generate "Once upon a time" -p "A recipe for bread" -n 40[/]

    From framework to framework: [bold]kvcache generate --relay numpy,torch "Once upon a time"[/]
    """
    prompts = [text for text in (prompt, *(more or [])) if text is not None]
    if not prompts:
        raise typer.BadParameter("a prompt is needed. kvcache generate 'Once upon a time'")
    pooled = cache is CacheKind.pool or len(prompts) > 1
    stations = _stations(context, relay, cache, pooled)
    backends = [kvcache.get_backend(name) for name in stations or [backend]]
    for where in backends:
        where.dtype(dtype)
    pool = Pool(max_sequences, capacity, cells, window, context_shift, keep)
    _refuse_mixtures(cache, prefill_chunk, pool, pooled)
    llamas, tokenizer = _load(model, backends)
    llama = llamas[0]
    encode = tokenizer.apply_chat if chat else lambda text: tokenizer.encode(text, bos=True)
    ids = [encode(text) for text in prompts]
    eos = None if ignore_eos else tokenizer.eos_id
    if pooled:
        _many(llama, tokenizer, ids, pool, dtype, max_tokens, eos)
        return
    from kvcache.reference.llama import generate as runner

    kind: Any = cache.value
    layers = runner.make_caches(
        llama.backend, llama.config, kind, max_size=max_size, keep=keep, dtype=dtype
    )
    ends: Any = {"eos_id": eos, "prefill_chunk": prefill_chunk}
    if layers and stations:
        note = _hand_over_note(layers)
        tokens = runner.relay(
            llamas, ids[0], layers, max_tokens, every=relay_every, note=note, **ends
        )
    else:
        tokens = runner.generate(llama, ids[0], layers, max_tokens, **ends)
    watch = _Stopwatch(tokens)
    notes.print(prompts[0], style="dim", end="\n" if chat else "", markup=False, highlight=False)
    _stream(watch, tokenizer)
    notes.print(_generation_table(backends, cache, layers, len(ids[0]), watch))


def _refuse_mixtures(cache: CacheKind, prefill_chunk: int | None, pool: Pool, pooled: bool) -> None:
    """Options that would be ignored are refused instead."""
    if pooled and (cache in {CacheKind.rotating, CacheKind.none} or prefill_chunk is not None):
        raise typer.BadParameter(
            f"several prompts share a pool; got --cache {cache.value}"
            f"{'' if prefill_chunk is None else ' --prefill-chunk'}. "
            "Leave that out; --window bounds what a sequence holds."
        )
    if not pooled and (pool.window or pool.cells or pool.context_shift):
        raise typer.BadParameter(
            "--window, --cells and --context-shift are those of a pool. Add --cache pool."
        )


def _stations(
    context: typer.Context, relay: str | None, cache: CacheKind, pooled: bool
) -> list[str]:
    """The backends of a relay, by name; none without one. Refuses what it would ignore."""

    def given(option: str) -> bool:
        source = context.get_parameter_source(option)
        return source is not None and source.name == "COMMANDLINE"

    if relay is None:
        if given("relay_every"):
            raise typer.BadParameter("--relay-every is that of a relay. Add --relay numpy,torch.")
        return []
    names = [name.strip() for name in relay.split(",")]
    if len(names) < 2 or not all(names):
        raise typer.BadParameter(
            f"--relay names two backends or more, with commas between them; got {relay!r}. "
            "For example --relay numpy,torch,jax,mlx."
        )
    if given("backend"):
        raise typer.BadParameter("--relay names the backends, the first one too. Drop --backend.")
    if pooled or cache is CacheKind.none:
        raise typer.BadParameter(
            f"--relay hands over the caches of one prompt; got --cache {cache.value}"
            f"{' with several prompts' if pooled and cache is not CacheKind.pool else ''}. "
            "Give one prompt, and --cache kv or rotating."
        )
    return names


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


def _load(path: Path | None, backends: Sequence[Backend]) -> tuple[list[Llama], Tokenizer]:
    """The model on each of `backends`, loaded once where one occurs twice."""
    try:
        from kvcache.reference.llama.gguf import default_model_path, open_gguf
        from kvcache.reference.llama.tokenizer import Tokenizer
    except ImportError as missing:
        raise kvcache.BackendNotAvailableError(
            f"a model needs {missing.name}. Install it: pip install 'kvcache[demo]'"
        ) from missing
    with notes.status("Opening the model"):
        file = open_gguf(path or default_model_path())
        tokenizer = Tokenizer.from_gguf(file)
    models = {backend: _load_weights(file, backend) for backend in dict.fromkeys(backends)}
    return [models[backend] for backend in backends], tokenizer


def load_model(path: Path | None, backend: Backend) -> tuple[Llama, Tokenizer]:
    """The model in `path`, by default SmolLM2, on `backend`. Needs the extra ``demo``."""
    [model], tokenizer = _load(path, [backend])
    return model, tokenizer


def _load_weights(file: GGUFFile, backend: Backend) -> Llama:
    from kvcache.reference.llama.model import Llama

    with progress() as bar:
        task = bar.add_task(f"Loading weights onto {backend.spec}", total=None)
        return Llama.from_gguf(
            file, backend, lambda done, total: bar.update(task, completed=done, total=total)
        )


def _stream(tokens: _Stopwatch, tokenizer: Tokenizer) -> None:
    text = tokenizer.stream()
    for token in tokens:
        print(text.push(token), end="", flush=True)
    print(flush=True)


def _hand_over_note(caches: Sequence[kvcache.KVCache]) -> Callable[[Llama], None]:
    def note(model: Llama) -> None:
        # On a terminal the text is on the same screen, in the middle of a line.
        line = "\n" if notes.is_terminal else ""
        line += f"[{len(caches)} caches of {caches[0].len} tokens handed to {model.backend.spec}]"
        notes.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)

    return note


def _generation_table(
    backends: Sequence[Backend],
    kind: CacheKind,
    caches: list[kvcache.KVCache] | None,
    prompt: int,
    watch: _Stopwatch,
) -> Table:
    layers = caches or []
    table = Table.grid(padding=(0, 2))
    table.add_row("backend", ", ".join(backend.spec for backend in backends))
    table.add_row("cache", ", ".join([kind.value, *{str(cache.dtype) for cache in layers}]))
    table.add_row("prompt", f"{prompt} tokens, {watch.first - watch.started:.2f} s")
    table.add_row("generated", f"{watch.count} tokens, {watch.rate} tokens/s")
    if layers:
        held = f"{_size(sum(cache.nbytes for cache in layers))} for {layers[0].len} tokens"
        table.add_row("held", f"{held}, {sum(cache.growths for cache in layers)} growths")
    return table


# Many at once.


def _many(
    llama: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    pool: Pool,
    dtype: str,
    max_tokens: int,
    eos: int | None,
) -> None:
    """Decode all prompts in one pool; print each text when it is over."""
    from kvcache.reference.llama.server import Server

    def note(line: str) -> None:
        notes.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)

    server = Server(llama, **vars(pool), dtype=dtype, eos_id=eos, note=note)
    started = time.perf_counter()
    requests = [server.submit(ids, max_tokens) for ids in prompts]
    with progress() as bar:
        task = bar.add_task("Generating", total=max_tokens * len(requests))
        left = list(requests)
        while left:
            bar.advance(task, len(server.step()))
            for request in [each for each in left if each.finish]:
                left.remove(request)
                print(f"[{request.number}] {tokenizer.decode(request.generated)}", flush=True)
    notes.print(_pool_table(llama, server, requests, dtype, time.perf_counter() - started))


def _pool_table(
    llama: Llama, server: Server, requests: Sequence[Request], dtype: str, seconds: float
) -> Table:
    config, cells = llama.config, server.cells
    generated = sum(len(request.generated) for request in requests)
    size = nbytes((config.layers, 2, cells, config.kv_heads, config.head_dim), dtype)
    table = Table.grid(padding=(0, 2))
    table.add_row("backend", llama.backend.spec)
    table.add_row("cache", f"pool, {dtype}, {_size(size)} for {cells:,} tokens")
    table.add_row("generated", f"{generated} tokens, {generated / seconds:.1f} tokens/s")
    table.add_row("passes", f"{server.passes} for {len(requests)} prompts")
    ends = [f"{request.number} {request.finish}" for request in requests]
    table.add_row("ended by", ", ".join(ends))
    return table


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
