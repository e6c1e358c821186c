"""Runs what README.md and docs/ show, one document at a time, from top to bottom.

- ``python`` blocks run; those of one document share their variables.
- ``console`` blocks run the lines that begin with ``$ ``; when output follows a command, it is
  compared, with ``...`` for what may vary.
- Everything else is only shown, ``sh`` blocks too: that is where installing is explained.
- ``<!-- skip: next "why" -->`` before a block skips it.
"""

import doctest
import os
import subprocess
import sys
from pathlib import Path
from unittest import SkipTest

import pytest

sybil = pytest.importorskip("sybil", reason="sybil is not installed")
markdown = pytest.importorskip("sybil.parsers.markdown", reason="sybil is not installed")

pytestmark = pytest.mark.docs
ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CHECKER = doctest.OutputChecker()
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def transcript(text):
    """Splits a console block into commands and the output that each is said to print."""
    parts = ("\n" + text).split("\n$ ")
    assert not parts[0].strip(), f"a console block begins with '$ ', not with {parts[0]!r}"
    return [
        (command, output) for command, _, output in (part.partition("\n") for part in parts[1:])
    ]


def run_console(example):
    """Runs a console block with the programs of this environment first on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for command, expected in transcript(str(example.parsed)):
        result = subprocess.run(
            ["bash", "-c", command],
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"$ {command}\n{result.stdout}{result.stderr}"
        if expected.strip():
            same = CHECKER.check_output(expected, result.stdout, FLAGS)
            assert same, f"$ {command}\n{result.stdout}\nbut the document shows\n{expected}"


def parsers():
    return [
        markdown.PythonCodeBlockParser(),
        markdown.CodeBlockParser("console", run_console),
        markdown.SkipParser(),
    ]


def run(path):
    """Runs the examples of a document; a skipped one is none, a failed one raises."""
    for example in sybil.document.Document.parse(str(path), *parsers()).examples():
        try:
            example.evaluate()
        except SkipTest as skipped:
            print(f"{path.name}:{example.line} skipped: {skipped}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_document(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(path)


FENCE = "```"


@pytest.mark.parametrize(
    "block",
    ["python\nassert 1 == 2", "console\n$ false", "console\n$ echo one\ntwo", "python\nx = y"],
)
def test_a_wrong_example_fails(block, tmp_path):
    document = tmp_path / "wrong.md"
    document.write_text(f"{FENCE}{block}\n{FENCE}\n")
    with pytest.raises((AssertionError, NameError)):
        run(document)


@pytest.mark.parametrize(
    "text",
    [
        f"{FENCE}python\nx = 1\n{FENCE}\n\n{FENCE}python\nassert x == 1\n{FENCE}\n",
        f"{FENCE}console\n$ echo one 2\none ...\n$ echo three\n{FENCE}\n",
        f"{FENCE}sh\nfalse\n{FENCE}\n",
        f'<!-- skip: next "needs a GPU" -->\n\n{FENCE}python\nassert False\n{FENCE}\n',
    ],
)
def test_a_right_example_passes(text, tmp_path):
    document = tmp_path / "right.md"
    document.write_text(text)
    run(document)
