"""The example runs, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax", reason="needs pip install 'kvcache[jax]'")

EXAMPLE = Path(__file__).parents[3] / "examples" / "jax_decode.py"
pytestmark = pytest.mark.one_backend(name="jax")


def test_example():
    command = [sys.executable, str(EXAMPLE)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [len(row) for row in rows] == [16, 16]
    assert len({*rows[0], *rows[1]}) > 5
