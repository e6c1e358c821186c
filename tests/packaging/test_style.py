"""What no linter checks: tests are written one way."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def annotated(source):
    """Names of what is annotated in a file: functions, parameters and variables, but no fields."""
    nodes = list(ast.walk(ast.parse(source)))
    fields = {id(line) for node in nodes if isinstance(node, ast.ClassDef) for line in node.body}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns:
            yield node.name
        elif isinstance(node, ast.arg) and node.annotation:
            yield node.arg
        elif isinstance(node, ast.AnnAssign) and node.value and id(node) not in fields:
            yield ast.unparse(node.target)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f(x: int, *, y=1) -> None: z: int = 1", ["f", "z", "x"]),
        ("class A:\n    x: int = 1\n    def f(self, y): pass", []),
    ],
)
def test_annotations_are_seen(source, names):
    assert list(annotated(source)) == names


def test_tests_have_no_annotations():
    """Either all or none: a reader need not wonder which."""
    found = {path.name: [*annotated(path.read_text())] for path in TESTS.rglob("*.py")}
    assert not {name: names for name, names in found.items() if names}
