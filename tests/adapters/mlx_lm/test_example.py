"""The example script runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

ROOT = Path(__file__).parents[3]


@pytest.mark.matrix
def test_the_example():
    script = ROOT / "examples" / "mlx_lm_generate.py"
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, env=os.environ
    )
    lines = result.stdout.splitlines()
    assert lines[0].startswith("<LayerCaches 4 of StateCache, KVCache, offset=60> in ")
    assert lines[1] == "from the file: the same tokens as in one run: True"
