"""A griffe extension for mkdocs.yml: docstrings as this project writes them become Markdown.

========================================  =========================================
``:meth:`~kvcache.KVCache.update```       `update`, in code type
a line that ends in ``::``, and a block   the line, and a fenced block
``name: what it is`` at the margin        an item of a list
``Raises: ValueError``                    a paragraph of its own, with a bold word
========================================  =========================================

Members of the classes in ``_INHERITING``, and of their bases, that have no docstring get that of
the member which they override: their page shows the whole class, not the contract that it fulfils.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

import griffe

_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")
_SECTION = re.compile(r"(Raises|Returns): ?(.*)")
_ITEM = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.*)")
_INDENT = "    "
_INHERITING = ("kvcache.layers.growing.KVCache", "kvcache.layers.recurrent.StateCache")


class ProjectDocstrings(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Turn the docstring of `obj` into Markdown."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Let members without a docstring have an inherited one; a site would leave them out."""
        for path in _INHERITING:
            if path.startswith(f"{pkg.path}."):
                _inherit(pkg[path.removeprefix(f"{pkg.path}.")])


def _inherit(cls: griffe.Class) -> None:
    described: dict[str, griffe.Docstring] = {}
    for owner in reversed([cls, *cls.mro()]):  # the contract first
        for name, member in owner.members.items():
            if member.docstring is None:
                member.docstring = described.get(name)
            else:
                described[name] = member.docstring


def to_markdown(text: str) -> str:
    """A docstring of this project as Markdown."""
    lines = _ROLE.sub(_short, text).splitlines()
    return "\n".join(_converted(lines)).strip()


def _short(role: re.Match[str]) -> str:
    """``~a.b.C`` and ``C`` alike are shown as `C`; a module keeps its whole name."""
    name = role[1]
    whole = role[0].startswith(":mod:") and "~" not in role[0]
    return f"`{name if whole else name.rsplit('.', 1)[-1]}`"


def _converted(lines: list[str]) -> Iterator[str]:
    at, listing = 0, False
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.endswith("::"):
            yield line[:-1] if line.strip() != "::" else ""
            block, at = _block(lines, at)
            yield from _fenced(block)
        elif section := _SECTION.fullmatch(line):
            block, at = _block(lines, at)
            yield from _section(section, block)
        elif item := _ITEM.fullmatch(line):
            if not listing:  # a list begins after an empty line
                yield ""
            yield f"- `{item[1]}`: {item[2]}"
            listing = True
            continue
        else:
            yield line
            if line.startswith(_INDENT):  # the item goes on
                continue
        listing = False


def _block(lines: list[str], at: int) -> tuple[list[str], int]:
    """The indented and empty lines from `at` on, and where they end."""
    stop = at
    while stop < len(lines) and (not lines[stop] or lines[stop].startswith(_INDENT)):
        stop += 1
    return textwrap.dedent("\n".join(lines[at:stop])).strip("\n").splitlines(), stop


def _fenced(block: list[str]) -> Iterator[str]:
    drawn = any("─" in line for line in block)
    yield from ("", "```text" if drawn else "```python", *block, "```", "")


def _section(section: re.Match[str], block: list[str]) -> Iterator[str]:
    yield from ("", f"**{section[1]}**: {section[2]}".rstrip())
    if section[2]:  # the text goes on, indented
        yield from block
    else:
        yield from _converted(
            ["", *(re.sub(r"^([A-Z]\w*): ", r"- `\1`: ", line) for line in block)]
        )
    yield ""
