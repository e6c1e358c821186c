"""A tree of spans that a person can read."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kvcache.errors import BackendNotAvailableError

from .radix import Node, RadixTree

Decode = Callable[[list[int]], str]


def render(
    trees: Mapping[str, RadixTree[Any]], size: int, decode: Decode | None, svg: bool, width: int
) -> str:
    """`trees` by salt, as text or SVG of `width` columns."""
    try:
        from rich.console import Console
        from rich.tree import Tree
    except ImportError as error:
        raise BackendNotAvailableError(
            "a drawing of the tree needs rich. Install it: pip install 'kvcache[cli]'."
        ) from error
    root = Tree(f"[bold]prefix cache[/], {_bytes(size)} stored")
    for salt, tree in trees.items():
        _grow(root.add(f"salt {salt!r}") if salt else root, tree.root, decode)
    console = Console(file=io.StringIO(), record=True, width=width, force_terminal=False)
    console.print(root)
    if svg:
        drawn = console.export_svg(title="kvcache.PrefixCache")
        # Whoever looks at it is not to fetch fonts from somewhere.
        return re.sub(r"@font-face {.*?}", "", drawn, flags=re.DOTALL)
    return console.export_text()


def _grow(branch: Any, node: Node[Any], decode: Decode | None) -> None:
    for child in node.children.values():
        _grow(branch.add(_label(child, decode)), child, decode)


def _label(node: Node[Any], decode: Decode | None) -> Any:
    from rich.text import Text

    span: Any = node.value
    label = Text(f"[{span.start}, {span.stop})  ", "bold" if span.payload is not None else "dim")
    label.append(_tokens(np.frombuffer(node.edge, "<i4").tolist(), decode), "cyan")
    if span.payload is None:
        return label.append("  forgotten", "dim")
    where = "resident" if span.payload.snapshot.resident else "host"
    label.append(f"  {_bytes(span.size)} {where}, used {span.uses}x")
    return label.append(f", in use by {span.pins}", "yellow") if span.pins else label


def _tokens(ids: list[int], decode: Decode | None) -> str:
    """The first and the last of them."""
    if decode is None or min(ids) < 0:  # media have ids of their own
        shown = (
            [*map(str, ids)] if len(ids) <= 8 else [*map(str, ids[:5]), "…", *map(str, ids[-2:])]
        )
        return " ".join(shown)
    text = repr(decode(ids))
    return text if len(text) <= 48 else f"{text[:30]} … {text[-14:]}"


def _bytes(size: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024  # type: ignore[assignment]
    return f"{size:.4g} GiB"
