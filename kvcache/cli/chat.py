"""``kvcache chat``: a conversation without computing anything twice."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import kvcache
from kvcache.prefix import TierStats
from kvcache.prefix.policies import make_policy

from .console import BackendName, check_folder, notes
from .models import ModelPath, fingerprint_of, load_model
from .store_options import StoreOptions, open_with

if TYPE_CHECKING:
    from kvcache.reference.chat import Chat, Conversation, Turn
    from kvcache.reference.tokenizer import Tokenizer


class ChatCache(StrEnum):
    """Caches of ``kvcache chat``."""

    kv = "kv"
    rotating = "rotating"
    pool = "pool"


def chat(
    backend: BackendName = "numpy",
    cache: Annotated[
        ChatCache,
        typer.Option(
            help="kv: every token, layer by layer. rotating: a bounded number. "
            "pool: one cache for all sequences, where a hit copies nothing."
        ),
    ] = ChatCache.kv,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, help="Tokens of an answer, at most.")
    ] = 128,
    system: Annotated[
        str | None, typer.Option(help="Instructions to the model, before the first turn.")
    ] = None,
    max_size: Annotated[int, typer.Option(help="Rotating: tokens held, sinks included.")] = 1024,
    keep: Annotated[int, typer.Option(help="Rotating: first tokens never dropped (sinks).")] = 4,
    capacity: Annotated[int, typer.Option(help="Pool: tokens of the conversation.")] = 4096,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the cache; the model computes in float32.")
    ] = "float32",
    budget: Annotated[
        int, typer.Option(min=0, help="MiB that all turns together may take in the cache.")
    ] = 1024,
    policy: Annotated[
        str, typer.Option(help="Eviction policy: lru, s3fifo, cost, gittins.")
    ] = "lru",
    compare: Annotated[
        bool,
        typer.Option(help="Measure the time to the first token without reuse, too."),
    ] = True,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say why the other tokens were not reused.")
    ] = False,
    tree: Annotated[
        Path | None, typer.Option(help="Draw the tree of stored prefixes to this SVG at the end.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Keep what was computed for later chats, on any backend: file:///var/cache/kv, "
            "redis://127.0.0.1:6379, or another URL."
        ),
    ] = None,
    option: StoreOptions = None,
    history: Annotated[
        Path | None,
        typer.Option(help="Go on with the conversation in this file; it is kept there."),
    ] = None,
    model: ModelPath = None,
) -> None:
    """Talk to a real model; every turn reuses the computation of the turns before.

    After each answer a line says how many tokens were reused, and how long the first token took
    with and without that. One line of input is one turn; the end of the input, or /quit, ends it.

    Many turns from a file: [bold]kvcache chat --backend torch --cache rotating < turns.txt[/]

    Go on after a restart: [bold]kvcache chat --store file:///var/cache/kv --history chat.json[/]

    With a small hybrid: [bold]python -m kvcache.reference.hybrid.train small-hybrid[/], and then
    [bold]kvcache chat --model small-hybrid[/]
    """
    target = kvcache.get_backend(backend)
    # What is wrong raises now, and not after loading or at the end.
    target.dtype(dtype)
    make_policy(policy)
    check_folder("--tree", tree)
    check_folder("--history", history)
    if system is not None and history is not None and history.exists():
        raise typer.BadParameter(f"--system begins a conversation, and {history} has one already.")
    if option and store is None:
        raise typer.BadParameter("--option needs --store beside it.")
    opened = None if store is None else open_with(store, option)
    decoder, tokenizer = load_model(model, target)
    from kvcache.reference.chat import Chat, Conversation
    from kvcache.reference.history import load_history, save_history

    named = "" if store is None and history is None else fingerprint_of(model)
    resumed = None if history is None else load_history(history, tokenizer, named)
    conversation = Conversation(tokenizer, system) if resumed is None else resumed
    talk = Chat(
        decoder,
        cache.value,
        max_size=max_size,
        keep=keep,
        capacity=capacity,
        dtype=dtype,
        budget=budget << 20,
        policy=policy,
        eos_id=tokenizer.eos_id,
        compare=compare,
        store=opened,
        fingerprint=named,
        explain=tokenizer.decode if explain else None,
    )
    turns = []
    try:
        for text in _lines():
            turns.append(_turn(talk, conversation, tokenizer, text, max_tokens))
            if history is not None:
                save_history(history, conversation, named)
        notes.print(_summary(turns))
    finally:
        totals = talk.close()
        if opened is not None and totals is not None:
            notes.print(_stored(totals), style="yellow", highlight=False, soft_wrap=True)
            opened.close()
    if tree is not None:
        tree.write_text(talk.prefix.render(svg=True, decode=tokenizer.decode), encoding="utf-8")
        notes.print(f"The tree is in {tree}.", highlight=False)


def _lines() -> Iterator[str]:
    """Yield the lines of the user, until the end of input or /quit; empty ones are skipped.

    Raises: ValueError for bytes that are no text.
    """
    while True:
        if sys.stdin.isatty():
            notes.print("[bold]you>[/] ", end="")
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise ValueError(f"turns are lines of {error.encoding} text; {error}.") from error
        text = line.strip()
        if not line or text == "/quit":
            return
        if text:
            if not sys.stdin.isatty():  # nobody has typed the line onto the screen
                notes.print(f"[bold]you>[/] {text}", highlight=False)
            yield text


def _turn(
    talk: Chat, conversation: Conversation, tokenizer: Tokenizer, text: str, max_tokens: int
) -> Turn:
    """Print the answer to `text` and its costs; return them."""
    from kvcache.reference.chat import Turn

    turn, stream = Turn(conversation.ask(text)), tokenizer.stream()
    for token in talk.reply(turn, max_tokens):
        print(stream.push(token), end="", flush=True)
    print(flush=True)
    conversation.answer(turn.tokens)
    notes.print(_described(turn), style="yellow", highlight=False, soft_wrap=True, markup=False)
    return turn


def _described(turn: Turn) -> str:
    line = (
        f"{turn.reused} of {len(turn.prompt)} tokens reused, first token after {turn.seconds:.3f} s"
    )
    # Where nothing was reused, both computed the same: the times tell of the first one's start.
    if turn.cold_seconds is not None and turn.reused:
        ratio = turn.cold_seconds / turn.seconds
        line += f"; without reuse {turn.cold_seconds:.3f} s, {ratio:.1f} times as long"
    if turn.explanation is not None:
        line += f"\nnot reused: {', '.join(map(str, turn.explanation.reasons))}"
    return line


def _stored(totals: TierStats) -> str:
    line = f"{totals.fetched_tokens} tokens came from the store, {totals.written} pages went there"
    troubles = {"late": "times it was late", "failed": "pages were damaged", "dropped": "were lost"}
    counts = {text: getattr(totals, field) for field, text in troubles.items()}
    return "; ".join([line, *(f"{count} {text}" for text, count in counts.items() if count)])


def _summary(turns: list[Turn]) -> Table:
    table = Table("turn", "prompt", "reused", "first token", "without reuse", box=None)
    for number, turn in enumerate(turns, 1):
        cold = "" if turn.cold_seconds is None else f"{turn.cold_seconds:.3f} s"
        row = [number, len(turn.prompt), turn.reused, f"{turn.seconds:.3f} s", cold]
        table.add_row(*map(str, row))
    return table
