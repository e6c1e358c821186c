"""The example script runs."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[3]


@pytest.mark.matrix
def test_the_example():
    script = ROOT / "examples" / "transformers_generate.py"
    # The package that is installed: the checkout has its backends elsewhere.
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    assert lines[0].startswith("<LayerCaches 4 of StateCache, KVCache, offset=59> in ")
    assert lines[1] == "from the file: the same tokens as in one run: True"
