"""Drawings of the trees of a prefix cache, for people."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from kvcache.errors import BackendNotAvailableError

from .radix import Node, RadixTree
from .stored import StoredSpan

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

Decode: TypeAlias = Callable[[list[int]], str]
"""Makes text of token ids."""


def render(
    trees: Mapping[str, RadixTree[StoredSpan]],
    nbytes: int,
    decode: Decode | None,
    svg: bool,
    width: int,
) -> str:
    """Draw `trees` by salt, as text or SVG of `width` columns. nbytes: stored in all of them.

    Raises: BackendNotAvailableError without the package rich.
    """
    try:
        from rich.console import Console
        from rich.tree import Tree
    except ImportError as error:
        raise BackendNotAvailableError(
            "a drawing of the tree needs rich. Install it: pip install 'kvcache[cli]'."
        ) from error
    root = Tree(f"[bold]prefix cache[/], {_with_unit(nbytes)} stored")
    for salt, tree in trees.items():
        _add_children(root.add(f"salt {salt!r}") if salt else root, tree.root, decode)
    console = Console(file=io.StringIO(), record=True, width=width, force_terminal=False)
    console.print(root)
    if svg:
        drawing = console.export_svg(title="kvcache.PrefixCache")
        # rich names fonts to be fetched from elsewhere, which looking at a drawing should not do.
        return re.sub(r"@font-face {.*?}", "", drawing, flags=re.DOTALL)
    return console.export_text()


def _add_children(branch: Tree, node: Node[StoredSpan], decode: Decode | None) -> None:
    for child in node.children.values():
        if child.value is not None:  # of a tree of spans, only the root has none
            _add_children(branch.add(_label(child.value, decode)), child, decode)


def _label(span: StoredSpan, decode: Decode | None) -> Text:
    """Return the line for a span: its range, its tokens, and where its payload is."""
    from rich.text import Text

    label = Text(f"[{span.start}, {span.stop})  ", "bold" if span.payload is not None else "dim")
    label.append(_tokens(span.node.tokens.tolist(), decode), "cyan")
    if span.payload is None:
        return label.append("  forgotten", "dim")
    place = "resident" if span.payload.snapshot.resident else "host"
    label.append(f"  {_with_unit(span.nbytes)} {place}, used {span.uses}x")
    return label.append(f", in use by {span.pins}", "yellow") if span.pins else label


def _tokens(ids: list[int], decode: Decode | None) -> str:
    """Return the first and the last of `ids`, or of their text, and an ellipsis between."""
    if decode is None or min(ids) < 0:  # stand-ins for media are no tokens
        shown = (
            [*map(str, ids)] if len(ids) <= 8 else [*map(str, ids[:5]), "…", *map(str, ids[-2:])]
        )
        return " ".join(shown)
    text = repr(decode(ids))
    return text if len(text) <= 48 else f"{text[:30]} … {text[-14:]}"


def _with_unit(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"
