"""The pages as a whole: what they name exists, what there is is named, and nothing private is used.

``mkdocs build --strict``, which ``nox -s docs`` runs, checks links, anchors and the navigation too.
"""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import kvcache
import kvcache.diffusion
import kvcache.errors
import kvcache.functional
import kvcache.prefix
import kvcache.prefix.policies
import kvcache.sizing
import kvcache.testing
import kvcache.verify

pytestmark = pytest.mark.docs
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TO_COME = set()
"""Paths that pages announce. One that has come fails: the page should say what it is now."""

PATH = re.compile(r"`((?:kvcache|backends)/[\w/.]*)`")
LISTED = re.compile(r"`((?:kvcache|backends)/[\w/]+\.py)`(?:: | \| )((?:`\w+`(?:, | and )?)+)")
CALL = re.compile(
    r"^[│├└─ ]*(?:or )?([\w.]+)(?:\([^)]*\))? +((?:kvcache|backends)/[\w/]+\.py)", re.MULTILINE
)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PUBLIC = (
    kvcache,
    kvcache.diffusion,
    kvcache.functional,
    kvcache.prefix,
    kvcache.prefix.policies,
    kvcache.sizing,
    kvcache.testing,
    kvcache.verify,
)
OF_REFERENCE = {"AudioFileError", "ModelFileError", "UnsupportedModelError"}


def name(page):
    return page.relative_to(ROOT).as_posix()


def test_every_page_is_in_the_navigation_once():
    listed = re.findall(
        r"^ +- (?:.*: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE
    )
    assert sorted(listed) == [page.relative_to(DOCS).as_posix() for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_path_exists(page):
    for path in set(PATH.findall(page.read_text())) - TO_COME:
        assert (ROOT / path).exists(), path
        assert (ROOT / path).is_dir() == path.endswith("/"), path


def test_what_is_to_come_has_not_come():
    assert not [path for path in TO_COME if (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_listed_name_is_in_its_module(page):
    for path, names in LISTED.findall(page.read_text()):
        for listed in re.findall(r"`(\w+)`", names):
            assert defines((ROOT / path).read_text(), listed), f"{listed} in {path}"


def test_every_call_of_the_diagrams_is_in_its_module():
    """``CellTable.insert   kvcache/pool/cells.py``: the class and the method are there."""
    text = (DOCS / "architecture.md").read_text()
    calls = [
        (call, path) for call, path in CALL.findall(text) if call[0].isupper() or "." not in call
    ]
    assert len(calls) > 35  # without those on a variable, such as cache.snapshot
    for call, path in calls:
        source = (ROOT / path).read_text()
        for part in call.split("."):
            assert defines(source, part) or inherits(source, part), f"{call} in {path}"


def defines(source, wanted):
    """Whether a module has a class, function or constant of that name, at any depth."""
    return bool(re.search(rf"^ *(?:class|def) {wanted}\b|^{wanted}\b.*=", source, re.MULTILINE))


def inherits(source, wanted):
    """Backend.write_slice in `_torch.py`: the module has a subclass."""
    return bool(re.search(rf"^class \w+\((?:\w+, )*{wanted}\b", source, re.MULTILINE))


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=name)
def test_examples_use_nothing_private(page):
    for block in BLOCK.findall(page.read_text()):
        code = re.sub(r"#.*", "", block)
        assert not re.search(r"\bkvcache(?:\.\w+)*\._|import _|[\w)\]]\._[a-z]", code), block


def reference():
    return "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_the_reference_has_every_public_name(module):
    text = reference()
    documented = set(re.findall(r"^::: [\w.]*\.(\w+)$", text, re.MULTILINE))
    documented |= set(re.findall(r"\w+", " ".join(re.findall(r"members: \[(.*)\]", text))))
    documented |= set(vars(kvcache.errors)) - OF_REFERENCE  # that page shows the whole module
    missing = set(module.__all__) - documented - OF_REFERENCE
    assert not missing


def test_the_reference_names_nothing_that_is_not_there():
    for path in re.findall(r"^::: ([\w.]+)$", reference(), re.MULTILINE):
        if not path.startswith("kvcache.adapters."):  # needs what it adapts
            assert resolve(path) is not None, path


def resolve(path):
    module, _, attribute = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), attribute, None)


def rooms():
    for module in pkgutil.iter_modules([str(ROOT / "kvcache")]):
        if not module.name.startswith("_"):
            yield module.name


def test_architecture_shows_every_room():
    picture = (DOCS / "architecture.md").read_text().split("```")[1]
    assert not {room for room in rooms() if not re.search(rf"\b{room}\b", picture)}
