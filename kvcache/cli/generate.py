"""``kvcache generate``: a real model goes on from one prompt, or from many at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

import kvcache
from kvcache.backends import Backend
from kvcache.layers.base import LayerCache

from .console import BackendName, notes, progress_bar
from .models import ModelPath, load_models
from .progress import Stopwatch, generation_table, pool_table, tokens_held

if TYPE_CHECKING:
    from kvcache.reference.decoder import Decoder, LayerKind
    from kvcache.reference.tokenizer import Tokenizer


class CacheKind(StrEnum):
    """Caches of ``kvcache generate``."""

    kv = "kv"
    rotating = "rotating"
    none = "none"
    pool = "pool"


# The per-layer caches, by the names that the reference model has for them.
_LAYER_KINDS: dict[CacheKind, LayerKind] = {
    CacheKind.kv: "kv",
    CacheKind.rotating: "rotating",
}


@dataclass
class PoolOptions:
    """Options of a pool, as :class:`~kvcache.reference.server.Server` takes them."""

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
        str, typer.Option(help="Dtype of the cache; the model computes in float32.")
    ] = "float32",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Tokens at most.")] = 128,
    model: ModelPath = None,
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
    relay_names = _relay_names(context, relay, cache, pooled)
    backends = _backends(relay_names or [backend], dtype)
    pool = PoolOptions(max_sequences, capacity, cells, window, context_shift, keep)
    _refuse_mixtures(cache, prefill_chunk, pool, pooled)
    models, tokenizer = load_models(model, backends)
    encode = tokenizer.apply_chat if chat else lambda text: tokenizer.encode(text, bos=True)
    ids = [encode(text) for text in prompts]
    eos_id = None if ignore_eos else tokenizer.eos_id
    if pooled:
        _generate_in_pool(models[0], tokenizer, ids, pool, dtype, max_tokens, eos_id)
        return
    from kvcache.reference import generate as generation

    caches = []
    if cache in _LAYER_KINDS:
        kind = _LAYER_KINDS[cache]
        caches = list(models[0].make_caches(kind, max_size=max_size, keep=keep, dtype=dtype))
    if relay_names:
        tokens = generation.relay(
            models,
            ids[0],
            caches,
            max_tokens,
            every=relay_every,
            eos_id=eos_id,
            prefill_chunk=prefill_chunk,
            note=_hand_over_note(caches),
        )
    else:
        tokens = generation.generate(
            models[0],
            ids[0],
            caches or None,
            max_tokens,
            eos_id=eos_id,
            prefill_chunk=prefill_chunk,
        )
    watch = Stopwatch(tokens)
    # Plain completion goes on in the same line; the prompt is text of the user, not markup.
    notes.print(prompts[0], style="dim", end="\n" if chat else "", markup=False, highlight=False)
    _print_text(watch, tokenizer)
    notes.print(generation_table(backends, cache.value, caches, len(ids[0]), watch))


def _refuse_mixtures(
    cache: CacheKind, prefill_chunk: int | None, pool: PoolOptions, pooled: bool
) -> None:
    """Raise for options without an effect in this mixture, instead of ignoring them."""
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


def _relay_names(
    context: typer.Context, relay: str | None, cache: CacheKind, pooled: bool
) -> list[str]:
    """Return the names of a relay's backends; none without a relay.

    Raises: BadParameter for fewer than two names, and for options that a relay would ignore.
    """

    def given(option: str) -> bool:
        # A default is no choice of the user: only the command line counts.
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


def _backends(names: Sequence[str], dtype: str) -> list[Backend]:
    """Return the backends called `names`. Raise unless each has `dtype`."""
    backends = [kvcache.get_backend(name) for name in names]
    for backend in backends:  # before a model is loaded, which takes a while
        backend.dtype(dtype)
    return backends


def _print_text(tokens: Iterable[int], tokenizer: Tokenizer) -> None:
    text = tokenizer.stream()
    for token in tokens:
        print(text.push(token), end="", flush=True)  # as it comes, also into a pipe
    print(flush=True)


def _hand_over_note(caches: Sequence[LayerCache]) -> Callable[[Decoder], None]:
    """Return a function to note a hand-over of `caches`, a list changed in place by the relay."""

    def note(model: Decoder) -> None:
        # On a terminal the text is on the same screen, in the middle of a line.
        line = "\n" if notes.is_terminal else ""
        line += (
            f"[{len(caches)} caches of {tokens_held(caches)} tokens handed to {model.backend.spec}]"
        )
        notes.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)

    return note


def _generate_in_pool(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    pool: PoolOptions,
    dtype: str,
    max_tokens: int,
    eos_id: int | None,
) -> None:
    """Decode all prompts in one pool; print each text when it is complete."""
    from kvcache.reference.server import Server

    def note(line: str) -> None:
        notes.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)

    server = Server(
        model,
        pool.max_sequences,
        pool.capacity,
        cells=pool.cells,
        window=pool.window,
        dtype=dtype,
        context_shift=pool.context_shift,
        keep=pool.keep,
        eos_id=eos_id,
        note=note,
    )
    started = time.perf_counter()
    requests = [server.submit(ids, max_tokens) for ids in prompts]
    with progress_bar() as bar:
        task = bar.add_task("Generating", total=max_tokens * len(requests))
        left = list(requests)
        while left:
            bar.advance(task, len(server.step()))
            finished = [request for request in left if request.finish]
            for request in finished:
                left.remove(request)
                print(f"[{request.number}] {tokenizer.decode(request.generated)}", flush=True)
    notes.print(pool_table(model.backend, server, requests, dtype, time.perf_counter() - started))
