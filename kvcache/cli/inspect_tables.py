"""Tables and trees of ``kvcache inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import get_args

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from kvcache.bench.harness.tables import new_table
from kvcache.stores import Entry, Unavailable, Usage
from kvcache.stores.inspection import Finding, Run, State

from .units import in_bytes, in_time

_DIGITS = 12
"""Hexadecimal digits of a key, enough to tell keys of a store from each other."""
_DEEPEST = 40
"""Branches above each other that a terminal has room for."""
_DAMAGE_SHOWN = 20


def summary(
    store: str, usage: Usage | Unavailable, entries: Sequence[Entry], prefixes: Sequence[Run]
) -> Iterator[str]:
    """Yield lines about a store as a whole."""
    nbytes = in_bytes(sum(entry.nbytes for entry in entries))
    yield store
    yield f"{len(entries):,} entries with {nbytes} of values, {_taken(usage)}"
    layouts = len({entry.label.layout for entry in entries})
    cut_off = sum(prefix.is_cut_off for prefix in prefixes)
    yield f"{len(prefixes):,} prefixes, {cut_off:,} without their beginning, {layouts:,} layouts"


def _taken(usage: Usage | Unavailable) -> str:
    if isinstance(usage, Unavailable):
        return "which can only be read"
    of_budget = "" if usage.budget is None else f" of {in_bytes(usage.budget)}"
    return f"which take {in_bytes(usage.nbytes)}{of_budget}"


def prefix_table(prefixes: Sequence[Run], now: float, limit: int) -> RenderableType:
    """Return a row for each prefix, all that goes on from it included."""
    table = new_table("Prefixes", "key", "positions", "entries", "ends", "bytes", "unused", "uses")
    for prefix in prefixes[:limit]:
        entries, runs = prefix.all_entries(), list(prefix.runs())
        table.add_row(
            _name(prefix),
            f"{prefix.start:,}..{max(run.stop for run in runs):,}",
            f"{len(entries):,}",
            f"{sum(not run.branches for run in runs):,}",
            *_figures(entries, now),
        )
    return Group(table, *_more(len(prefixes) - limit, "prefixes"))


def _name(run: Run) -> str:
    return run.entries[0].key.hex()[:_DIGITS]


def _figures(entries: Sequence[Entry], now: float) -> tuple[str, str, str]:
    used = max(entry.used for entry in entries)
    age = in_time(now - used) if used else "?"
    uses = sum(entry.uses for entry in entries)
    return in_bytes(sum(entry.nbytes for entry in entries)), age, f"{uses:,}"


def prefix_tree(prefixes: Sequence[Run], now: float, limit: int) -> RenderableType:
    """Return each prefix with its branches; entries without a branch between them are one line."""
    trees = []
    for prefix in prefixes[:limit]:
        tree = Tree(_line(prefix, now))
        _add_branches(tree, prefix, now, limit)
        trees.append(tree)
    return Group(*trees, *_more(len(prefixes) - limit, "prefixes"))


def _add_branches(tree: Tree, prefix: Run, now: float, limit: int) -> None:
    pending = [(tree, prefix, 1)]
    while pending:
        branch, run, depth = pending.pop()
        if depth > _DEEPEST and run.branches:
            hidden = sum(1 for _ in run.runs()) - 1
            branch.add(Text(f"{hidden:,} branches more", style="dim"))
            continue
        pending += [
            (branch.add(_line(child, now)), child, depth + 1) for child in run.branches[:limit]
        ]
        for text in _more(len(run.branches) - limit, "branches"):
            branch.add(text)


def _line(run: Run, now: float) -> Text:
    nbytes, age, _ = _figures(run.entries, now)
    count = len(run.entries)
    what = "entry" if count == 1 else "entries"
    line = Text(f"{_name(run)} {run.start:,}..{run.stop:,}: {count:,} {what}, {nbytes}, {age}")
    line.highlight_regex(r"^\w+", "bold")
    return line


def damage_table(findings: Sequence[Finding]) -> RenderableType:
    """Return how many values are whole, and a row for each of the others."""
    counts = Counter(finding.state for finding in findings)
    title = "Values: " + ", ".join(f"{counts[state]:,} {state}" for state in get_args(State))
    trouble = [finding for finding in findings if finding.state != "whole"]
    if not trouble:
        return Text(title)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("key", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("reason", overflow="fold")
    for finding in trouble[:_DAMAGE_SHOWN]:
        entry, state, reason = finding
        table.add_row(entry.key.hex()[:_DIGITS], state, Text(reason))
    return Group(table, *_more(len(trouble) - _DAMAGE_SHOWN, "values"))


def _more(hidden: int, name: str) -> Iterator[Text]:
    if hidden > 0:
        yield Text(f"{hidden:,} {name} more", style="dim")
