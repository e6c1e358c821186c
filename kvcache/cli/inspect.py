"""``kvcache inspect``: the prefixes in a store, their bytes, ages and damage."""

from __future__ import annotations

import json as json_format
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvcache.errors import StoreError
from kvcache.stores import Deadline, Entry, FileStore, Seal, Store, Unavailable, Usage
from kvcache.stores.inspection import (
    Finding,
    Removed,
    Run,
    beyond,
    forest,
    older_than,
    remove,
    verify,
)

from .console import check_folder, progress_bar
from .inspect_tables import damage_table, prefix_table, prefix_tree, summary
from .store_options import StoreOptions, open_with, read_seal
from .units import as_bytes, as_seconds, in_bytes

FORMAT = "kvcache.inspect/1"
_COUNTED = 1000
"""Entries after which the number so far is shown."""


@dataclass
class Inspection:
    """Everything that was found in a store. now: of its ages, in seconds since the epoch."""

    store: str
    now: float
    usage: Usage | Unavailable
    entries: list[Entry]
    prefixes: list[Run]
    findings: list[Finding] = field(default_factory=list)
    chosen: list[Entry] = field(default_factory=list)
    removed: Removed | None = None

    @property
    def trouble(self) -> list[Finding]:
        """Values that are not whole."""
        return [finding for finding in self.findings if finding.state != "whole"]


def inspect(
    url: Annotated[
        str, typer.Argument(help="file:///var/cache/kv, redis://host:port, s3://bucket/prefix, ...")
    ],
    tree: Annotated[bool, typer.Option("--tree", help="Show where prefixes branch.")] = False,
    limit: Annotated[int, typer.Option(help="Prefixes shown, used last first.", min=1)] = 20,
    check: Annotated[
        bool, typer.Option("--verify", help="Read every value, and report damage.")
    ] = False,
    older: Annotated[
        str, typer.Option("--older-than", help="Choose entries unused for so long: 12h, 7d, ...")
    ] = "",
    down_to: Annotated[
        str, typer.Option(help="Choose the entries used least recently, until so much is left: 10G")
    ] = "",
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Choose entries whose values are damaged.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove the chosen entries; else they are counted.")
    ] = False,
    secret: Annotated[
        Path | None,
        typer.Option(
            help="A file with the secret of a Seal, 32 bytes or 64 hexadecimal digits: --verify "
            "then opens sealed pages too."
        ),
    ] = None,
    option: StoreOptions = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds for one call of the store.", min=0.001)
    ] = 30.0,
    json: Annotated[Path | None, typer.Option(help="Write everything found here.")] = None,
) -> None:
    """Show the prefixes in a store: tokens, bytes, and when they were used last.

    A prefix is the beginning of a sequence, with all that goes on from it. Nothing is read but
    labels, unless --verify or --damaged is given: a read counts as a use, and removes a value that
    does not match its checksum. Exit status 1 if a value is damaged, could not be read, or has a
    seal that does not open. Examples:

    [bold]kvcache inspect file:///var/cache/kv --tree[/]

    [bold]kvcache inspect redis://127.0.0.1:6379 --verify --json found.json[/]

    [bold]kvcache inspect redis+cluster://a:6379,b:6379 --option prefix=my: --verify --secret key[/]

    [bold]kvcache inspect file:///var/cache/kv --older-than 7d --down-to 50G --prune[/]
    """
    age = as_seconds("--older-than", older) if older else None
    room = as_bytes("--down-to", down_to) if down_to else None
    chooses = age is not None or room is not None or damaged
    if prune and not chooses:
        raise typer.BadParameter("--prune needs --older-than, --down-to or --damaged beside it.")
    check_folder("--json", json)
    if secret is not None and not (check or damaged):
        raise typer.BadParameter("--secret needs --verify or --damaged beside it.")
    seal = None if secret is None else read_seal(secret)
    with _existing(url, option) as store:
        found = _listed(store, timeout)
        if check or damaged:
            found.findings = _verified(store, found.entries, timeout, seal)
        found.chosen = _chosen(found, age, room, damaged)
        if prune:
            found.removed = _removed(store, found.chosen, timeout)
    _show(Console(), found, limit, tree=tree, chooses=chooses)
    if json is not None:
        text = json_format.dumps(_record(found), indent=1)
        json.write_text(text + "\n", encoding="utf-8")
    if found.trouble:
        raise typer.Exit(1)


def _existing(url: str, options: Sequence[str] | None) -> Store:
    """Return the store of a URL. A directory that is not there is none, and is not made."""
    store = open_with(url, options)
    if isinstance(store, FileStore) and not store.directory.is_dir():
        raise StoreError(f"a store is in a directory that exists; there is no {store.directory}.")
    return store


def _listed(store: Store, timeout: float) -> Inspection:
    now, entries = time.time(), []
    usage = store.usage(deadline=Deadline.after(timeout))
    if isinstance(usage, Unavailable):
        usage = _of_readers(store, usage)
    with progress_bar() as bar:
        task = bar.add_task("Listing", total=None)
        for entry in store.entries():
            entries.append(entry)
            if len(entries) % _COUNTED == 0:
                bar.update(task, description=f"Listing: {len(entries):,} entries")
    return Inspection(repr(store), now, usage, entries, forest(entries))


def _of_readers(store: Store, usage: Unavailable) -> Unavailable:
    """Return the outcome of a directory that can only be read, whose index cannot be asked.

    Raises: StoreError for other stores, which do not answer.
    """
    if not isinstance(store, FileStore):
        raise StoreError(f"{store!r} is not available: {usage.reason}.")
    return usage


def _verified(
    store: Store, entries: Sequence[Entry], timeout: float, seal: Seal | None
) -> list[Finding]:
    with progress_bar() as bar:
        task = bar.add_task("Reading", total=sum(entry.nbytes for entry in entries))
        read = partial(bar.advance, task)
        return list(verify(store, entries, timeout, read, seal))


def _chosen(found: Inspection, age: float | None, room: int | None, damaged: bool) -> list[Entry]:
    """Return the entries to remove, each once."""
    chosen: dict[bytes, Entry] = {}
    if damaged:
        of_damage = [finding.entry for finding in found.findings if finding.state == "damaged"]
        chosen |= {entry.key: entry for entry in of_damage}
    if age is not None:
        chosen |= {entry.key: entry for entry in older_than(found.entries, found.now - age)}
    if room is not None:
        left = [entry for entry in found.entries if entry.key not in chosen]
        chosen |= {entry.key: entry for entry in beyond(left, room)}
    return list(chosen.values())


def _removed(store: Store, chosen: Sequence[Entry], timeout: float) -> Removed:
    with progress_bar() as bar:
        task = bar.add_task("Removing", total=len(chosen))
        return remove(store, chosen, timeout, lambda entries: bar.advance(task, entries))


def _show(console: Console, found: Inspection, limit: int, *, tree: bool, chooses: bool) -> None:
    lines = summary(found.store, found.usage, found.entries, found.prefixes)
    for line in lines:
        console.print(line, markup=False, highlight=False)
    if found.prefixes:
        console.print()
        make = prefix_tree if tree else prefix_table
        console.print(make(found.prefixes, found.now, limit))
    if found.findings:
        console.print()
        console.print(damage_table(found.findings))
    if chooses:
        console.print()
        nbytes = in_bytes(sum(entry.nbytes for entry in found.chosen))
        console.print(f"{len(found.chosen):,} entries chosen, {nbytes}", highlight=False)
        console.print(_end(found), highlight=False)


def _end(found: Inspection) -> str:
    if found.removed is None:
        return "Nothing was removed: add --prune."
    deleted, gone, unavailable = found.removed
    return f"{deleted:,} removed, {gone:,} gone already, {unavailable:,} not reached"


def _record(found: Inspection) -> dict[str, object]:
    findings = {finding.entry.key: finding for finding in found.findings}
    chosen = {entry.key for entry in found.chosen}
    return {
        "format": FORMAT,
        "store": found.store,
        "time": found.now,
        "usage": asdict(found.usage),
        "entries": [
            {
                "key": entry.key.hex(),
                "parent": entry.label.parent.hex(),
                "layout": entry.label.layout.hex(),
                "start": entry.label.start,
                "stop": entry.label.stop,
                "nbytes": entry.nbytes,
                "used": entry.used,
                "uses": entry.uses,
                "state": findings[entry.key].state if entry.key in findings else None,
                "reason": findings[entry.key].reason if entry.key in findings else None,
                "chosen": entry.key in chosen,
            }
            for entry in found.entries
        ],
        "removed": None if found.removed is None else found.removed._asdict(),
    }
