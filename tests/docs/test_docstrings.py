"""Docstrings as this project writes them, as Markdown for the site."""

import importlib.util
from pathlib import Path

import pytest

griffe = pytest.importorskip("griffe", reason="mkdocstrings is not installed")

pytestmark = pytest.mark.docs
ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "docs" / "docstrings.py"


def to_markdown(text):
    spec = importlib.util.spec_from_file_location("docstrings", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.to_markdown(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("See :meth:`~kvcache.KVCache.update`.", "See `update`."),
        ("A :class:`Recipe`; :mod:`kvcache.functional`.", "A `Recipe`; `kvcache.functional`."),
        ("Say::\n\n    a = 1\n\nAnd.", "Say:\n\n```python\na = 1\n```\n\nAnd."),
        ("Errors.\n\n::\n\n    A\n    └── B", "Errors.\n\n\n\n```text\nA\n└── B\n```"),
        ("size: how\n    large.\nname: of it.", "- `size`: how\n    large.\n- `name`: of it."),
        ("Do.\n\nRaises: A, B; nothing\n    then.", "Do.\n\n\n**Raises**: A, B; nothing\nthen."),
        ("Raises:\n    A: why.\n    BError: no.", "**Raises**:\n\n- `A`: why.\n- `BError`: no."),
        ("Note that it is: so.", "Note that it is: so."),
    ],
)
def test_to_markdown(text, expected):
    assert to_markdown(text) == expected


@pytest.mark.parametrize(
    ("path", "some"),
    [
        ("layers.growing.KVCache", {"update", "trim", "rollback"}),
        ("layers.row_selection.SelectableRows", {"select", "split", "padding"}),
        ("layers.batch.BatchCache", {"pad", "rows", "concat"}),
        ("layers.recurrent.StateCache", {"advance", "trim", "rollback"}),
        ("layers.recurrent_batch.BatchStates", {"pad", "rows", "concat"}),
    ],
)
def test_a_cache_shows_the_docstrings_of_its_contract(path, some):
    """Members of a cache, or of its bases, that have none would be left out of the site."""
    package = griffe.load(
        "kvcache", search_paths=[ROOT], extensions=griffe.load_extensions(str(SOURCE))
    )
    members = package[path].members
    public = {name: member for name, member in members.items() if not name.startswith("_")}
    assert some <= public.keys()
    assert not [name for name, member in public.items() if member.docstring is None]
