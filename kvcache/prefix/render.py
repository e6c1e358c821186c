"""Drawings of the trees of a prefix cache, for people."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from kvcache._checks import as_index
from kvcache.errors import BackendNotAvailableError

from .marks import Mark, details_of, mark_of
from .radix import Node, RadixTree
from .stored import StoredSpan

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

Decode: TypeAlias = Callable[[list[int]], str]
"""Makes text of token ids."""
_INDENT = 4
"""Columns by which rich indents a branch."""
_WIDTHS = range(20, 10_001)


def render(
    trees: Mapping[str, RadixTree[StoredSpan]],
    nbytes: int,
    policy: str,
    decode: Decode | None,
    svg: bool,
    width: int,
) -> str:
    """Draw `trees` by salt, as text or SVG of `width` columns, with a legend of the marks in it.

    nbytes: stored in all of them. policy: name of the one that evicts.

    Raises: BackendNotAvailableError without the package rich; TypeError, ValueError for arguments
        that make no drawing.
    """
    width = _checked_width(width)
    if decode is not None and not callable(decode):
        raise TypeError(f"decode is a function from a list of token ids to text; got {decode!r}.")
    try:
        from rich.console import Console
        from rich.text import Text
        from rich.tree import Tree
    except ImportError as error:
        raise BackendNotAvailableError(
            "a drawing of the tree needs rich. Install it: pip install 'kvcache[cli]'."
        ) from error
    root = Tree(f"[bold]prefix cache[/], {_with_unit(nbytes)} stored")
    drawn = _Drawn(policy, decode)
    for salt, tree in trees.items():
        # As Text, because rich reads "[red]" in a str as a style.
        branch = root.add(Text(f"salt {salt!r}")) if salt else root
        _add_spans(branch, tree.root, drawn, max_level=width // (2 * _INDENT))
    console = Console(file=io.StringIO(), record=True, width=width, force_terminal=False)
    console.print(root)
    for mark in drawn.marks:
        console.print(Text(f"{mark.sign} ", mark.style).append(mark.meaning, "default"))
    if svg:
        drawing = console.export_svg(title="kvcache.PrefixCache")
        # rich names fonts to be fetched from elsewhere, which looking at a drawing should not do.
        return re.sub(r"@font-face {.*?}", "", drawing, flags=re.DOTALL)
    return console.export_text()


def _checked_width(width: int) -> int:
    columns = as_index(width, "width")
    if columns not in _WIDTHS:
        raise ValueError(
            f"a drawing is {_WIDTHS.start} to {_WIDTHS.stop - 1:,} columns wide; got {columns}."
        )
    return columns


class _Drawn:
    """Lines of spans, and the marks in them. policy: name of the one that evicts."""

    def __init__(self, policy: str, decode: Decode | None) -> None:
        self._policy, self._decode = policy, decode
        self.marks: dict[Mark, None] = {}
        """In the order of the lines."""

    def label(self, span: StoredSpan) -> Text:
        """Return the line of a span: its mark, its range, its tokens, where it is, and why not."""
        from rich.text import Text

        label, mark = Text(), mark_of(span)
        if mark is not None:
            self.marks[mark] = None
            label.append(f"{mark.sign} ", mark.style)
        stored = span.payload is not None
        label.append(f"[{span.start}, {span.stop})  ", "bold" if stored else "dim")
        label.append(_tokens(span.node.tokens.tolist(), self._decode), "cyan")
        if span.payload is not None:
            place = "resident" if span.payload.snapshot.resident else "host"
            label.append(f"  {_with_unit(span.nbytes)} {place}, used {span.uses}x")
            if span.pins:
                label.append(f", in use by {span.pins}", "yellow")
        if details := details_of(span, self._policy):
            style = "dim" if mark is None else mark.style
            label.append(("; " if stored else "  ") + "; ".join(details), style)
        return label


def _add_spans(branch: Tree, root: Node[StoredSpan], drawn: _Drawn, max_level: int) -> None:
    """Add all spans under `root` to `branch`, each before those behind it.

    max_level: deepest level of branches. A conversation of many turns is a path of many spans,
    which would be indented beyond the width of the drawing: deeper spans stand on this level.
    """
    # A list of what is left to do, because a path may be longer than Python's limit of recursion.
    pending = [(branch, root, 0)]
    while pending:
        branch, node, level = pending.pop()
        if node.value is not None:  # of a tree of spans, only the root has none
            added = branch.add(drawn.label(node.value))
            branch = added if level < max_level else branch
        pending += [(branch, child, level + 1) for child in reversed(node.children.values())]


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
